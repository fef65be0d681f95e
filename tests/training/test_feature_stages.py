"""Training on shards whose input images are codes of several stages: from new weights, and from a
model that knows the first stage alone.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_features
import toy_tokenizer
from safetensors.torch import load_file
from training.training_on_ranks import load, run

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.protocol import evaluate
from icl_moe.model.decoder import InContextDecoder, initialise, start_from_codebook
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.tokenizers.features import read_centroids
from icl_moe.training.codebook import read_codebook
from icl_moe.training.preflight import open_checked
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.stats import shard_stats
from preprocessing.tokenizers.features import refine_features_tokenizer

PARTS = (
    *("model.link=true", "model.initialisation=fan_in", "model.codebook_init=true"),
    *("training.mask_corruption=true", "training.loss_on=query"),
)
STILL = ("training.steps=1", "optimizer.learning_rate=1e-30")
"""With a learning rate close to 0 the checkpoint holds the initial weights."""

CODES = toy_features.CODES


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[int, Path]:
    """Shards of the same scenes, by the number of stages of their features tokenizer."""
    folder = tmp_path_factory.mktemp("stages")
    drawer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    toy_features.make_toy_features(folder).save_pretrained(folder / "reader1")
    refined = refine_features_tokenizer(folder / "pictures", folder / "reader1", 2, seed=0)
    refined.save_pretrained(folder / "reader2")
    for stages in (1, 2):
        settings = [
            *("synthetic.images=30", "samples=8", "vocabulary.mask=true", "captioning=null"),
            *toy_tokenizer.recipe_settings(drawer),
            *toy_features.recipe_settings(folder / f"reader{stages}", stages),
        ]
        recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
        build_shards(recipe, folder / f"shards{stages}", workers=0)
    return {stages: folder / f"shards{stages}" for stages in (1, 2)}


@pytest.fixture(scope="module")
def train(rank_group, shards, tmp_path_factory):
    """Trains on two ranks and returns the exported model."""

    def train(stages: int, *settings: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        settings = (*PARTS, *toy_features.vocabulary_settings(stages), *settings)
        for part in rank_group(2).run(run, shards[stages], folder / "run", settings):
            assert part["ended"] == "well", part["printed"]
        assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
        return folder / "model"

    return train


@pytest.fixture(scope="module")
def coarse(train) -> Path:
    return train(1, "training.steps=3")


def test_codes_of_all_stages_start_from_their_centroids(train, shards):
    found = InContextDecoder.from_pretrained(train(2, *STILL))
    codebook = read_codebook(ShardSet(shards[2]))
    assert torch.equal(codebook.vectors_KC, read_centroids(shards[2] / "features_tokenizer"))
    assert codebook.stages == 2 and len(codebook.frequencies_K) == CODES
    first = found.sequence_format.vocabulary.feature_range.start
    counted = np.ones(CODES)
    for index in range(8):
        sequence = ShardSet(shards[2]).sample("segmentation", index).sequence
        codes = sequence.tokens_L[sequence.tokens_L >= first].astype(np.int64) - first
        np.add.at(counted, codes // CODES, 1)
    assert codebook.frequencies_K.tolist() == counted.tolist()
    expected = InContextDecoder(found.config)
    initialise(expected, seed=0)
    start_from_codebook(expected, codebook.vectors_KC, codebook.frequencies_K, first, 0, False, 2)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("layout", [("parallel.tp_size=2",), ("engine=zero0_fp32",)])
def test_tensor_ranks_and_another_engine_train_the_same(train, layout):
    settings = ("training.steps=2", "model.feed_forward=dense", "optimizer.name=adamw")
    settings += ("model.dropout=0", "model.attention_dropout=0")
    plain, spread = (
        load_file(model / "model.safetensors")
        for model in (train(2, *settings), train(2, *settings, *layout))
    )
    start = load_file(train(2, *STILL, "model.feed_forward=dense") / "model.safetensors")
    moved = (plain["token_embedding.weight"] - start["token_embedding.weight"]).abs()
    assert moved[-CODES:].max() > 1e-5
    # A gradient that is zero but for rounding, such as that of a key's bias, moves AdamW anyhow.
    for name in ("token_embedding.weight", "link.weight"):
        torch.testing.assert_close(spread[name], plain[name], atol=2e-5, rtol=1e-4, msg=name)


def test_a_model_goes_on_with_a_refined_tokenizer(train, shards, coarse, tmp_path):
    model = train(2, *STILL, f"training.init_from={coarse}")
    was, now = (load_file(folder / "model.safetensors") for folder in (coarse, model))
    for name, value in was.items():
        torch.testing.assert_close(now[name][: len(value)], value, rtol=0, atol=1e-9)
    # The new rows, by the normal equations of least squares.
    vectors = read_centroids(shards[2] / "features_tokenizer").double().numpy()
    known, new = now["token_embedding.weight"].double().numpy()[-2 * CODES :].reshape(2, CODES, -1)
    z, e = vectors[:CODES] - vectors[:CODES].mean(0), known - known.mean(0)
    expected = vectors[CODES:] @ np.linalg.solve(z.T @ z, z.T @ e)
    np.testing.assert_allclose(new, expected, atol=1e-4)

    metrics = evaluate(model, shards[2], tmp_path, shots=[1], limit=2)
    rows = [row.name for row in metrics.tasks["segmentation"].rows]
    assert "the training-free matcher, 1 example" in rows
    config = json.loads((model / "config.json").read_text())
    assert config["vocabulary"]["feature_stages"] == 2
    for stage in (1, 2):
        assert f"features codes, stage {stage} of segmentation" in shard_stats(shards[2])


def test_a_tokenizer_that_is_no_refinement_is_refused(shards, coarse, tmp_path):
    other = Path(shutil.copytree(coarse, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["features_tokenizer"] = toy_features.make_toy_features(
        tmp_path, dimensions=5
    ).fingerprint
    (other / "config.json").write_text(json.dumps(config))
    settings = (*PARTS, *toy_features.vocabulary_settings(2), f"training.init_from={other}")
    with pytest.raises(
        InputError, match=r"training\.init_from: .*but does not begin with its codes; make it with"
    ):
        open_checked(load(shards[2], tmp_path / "run", *settings), world=1)


def test_a_model_cannot_be_trained_to_write_combined_codes():
    settings = [*toy_features.vocabulary_settings(2), "training.input_loss_weight=0.5"]
    with pytest.raises(
        InputError, match=r"input_loss_weight must be 0 with vocabulary\.feature_stages"
    ):
        load_recipe(TrainingRecipe, "demo", settings)
