"""A run with the link, codebook initialisation, mask corruption and the loss on the query, from the
recipe to a mask that is decoded in one pass.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_features
import toy_tokenizer
from PIL import Image
from safetensors.torch import load_file
from training.training_on_ranks import run

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.model.decoder import InContextDecoder, initialise, start_from_codebook
from icl_moe.recipe import TrainingRecipe
from icl_moe.sequence import NO_LINK
from icl_moe.settings import load_recipe
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from icl_moe.training.codebook import read_codebook
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe

PARTS = (
    "model.link=true",
    "model.initialisation=fan_in",
    "model.codebook_init=true",
    "training.mask_corruption=true",
    "training.loss_on=query",
)


@pytest.fixture(scope="module")
def trained(rank_group, shards, tmp_path_factory) -> Path:
    """Four steps on two ranks, in two starts."""
    output = tmp_path_factory.mktemp("trained") / "run"
    for stop in (2, 4):
        settings = (*PARTS, "training.steps=4", f"training.stop_after={stop}")
        for part in rank_group(2).run(run, shards, output, settings):
            assert part["ended"] == "well", part["printed"]
    return output


@pytest.fixture(scope="module")
def shards_of_features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    toy_features.make_toy_features(folder).save_pretrained(folder / "reader")
    settings = [
        *("synthetic.images=30", "samples=8", "vocabulary.mask=true"),
        *toy_tokenizer.recipe_settings(tokenizer),
        *toy_features.recipe_settings(folder / "reader"),
    ]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    return folder / "shards"


def test_a_run_that_goes_on_reads_and_hides_what_it_would_have(
    rank_group, shards, trained, tmp_path
):
    settings = (*PARTS, "training.steps=4")
    rank_group(2).run(run, shards, tmp_path, settings)
    for rank in (0, 1):
        name = f"checkpoints/step-00000004/weight-0000{rank}.safetensors"
        once, twice = load_file(tmp_path / name), load_file(trained / name)
        assert all(torch.equal(once[key], twice[key]) for key in once)


def test_the_exported_model_writes_masks_in_one_pass(trained, shards, tmp_path, capsys):
    model, picture = tmp_path / "model", tmp_path / "picture.png"
    export = ["export", str(trained), "--out", str(model)]
    assert main([*export, "--threshold-from", str(shards)]) == 0
    config = json.loads((model / "config.json").read_text())
    assert config["mask_corruption"] is True
    assert config["loss_on"] == "query"
    assert 0 < config["mask_threshold"]["value"] < 1
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    Image.fromarray(np.eye(40, 60, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    out, confidence = tmp_path / "out.png", tmp_path / "confidence.png"
    command = ["segment", str(model), "--example", str(picture), str(tmp_path / "mask.png")]
    command += ["--query", str(picture), "--out", str(out), "--confidence", str(confidence)]
    assert main(command) == 0
    assert Image.open(out).size == Image.open(confidence).size == (60, 40)
    assert main([*command, "--decoding", "autoregressive"]) == 2
    assert "--confidence needs masks in one pass" in capsys.readouterr().err


def test_a_new_models_image_codes_start_from_the_codebook_of_the_shards(
    rank_group, shards, tmp_path
):
    """With a learning rate close to 0 the checkpoint holds the initial weights."""
    settings = (*PARTS, "training.steps=1", "optimizer.learning_rate=1e-30")
    rank_group(2).run(run, shards, tmp_path / "run", settings)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    found = InContextDecoder.from_pretrained(tmp_path / "model")
    shard_set = ShardSet(shards)
    codebook = read_codebook(shard_set)
    tokenizer = VQGAN.from_pretrained(shards / "image_tokenizer")
    torch.testing.assert_close(codebook.vectors_KC, tokenizer.quantize.embedding.weight.detach())
    vocabulary = shard_set.manifest.format.vocabulary
    counts = np.ones(toy_tokenizer.CODES)
    for task, count in shard_set.manifest.samples.items():
        assert count <= 256
        for index in range(count):
            sequence = shard_set.sample(task, index).sequence
            for span in sequence.spans:
                if span.role == "input":
                    codes = sequence.tokens_L[span.start : span.stop] - vocabulary.text_size
                    np.add.at(counts, codes, 1)
    assert codebook.frequencies_K.tolist() == counts.tolist()
    expected = InContextDecoder(found.config)
    initialise(expected, seed=0)
    first = vocabulary.image_range.start
    start_from_codebook(expected, codebook.vectors_KC, codebook.frequencies_K, first, seed=0)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, msg=name)


def test_input_images_codes_start_from_the_centres_of_the_features_tokenizer(
    rank_group, shards_of_features, tmp_path
):
    settings = (*PARTS, "training.steps=1", "optimizer.learning_rate=1e-30")
    settings += (f"vocabulary.features={toy_features.CODES}",)
    for part in rank_group(2).run(run, shards_of_features, tmp_path / "run", settings):
        assert part["ended"] == "well", part["printed"]
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    found = InContextDecoder.from_pretrained(tmp_path / "model")
    codebook = read_codebook(ShardSet(shards_of_features))
    reader = FeaturesTokenizer.from_pretrained(shards_of_features / "features_tokenizer")
    assert torch.equal(codebook.vectors_KC, reader.codebook_KD)
    expected = InContextDecoder(found.config)
    initialise(expected, seed=0)
    ids = found.sequence_format.vocabulary.feature_range
    start_from_codebook(
        expected, codebook.vectors_KC, codebook.frequencies_K, ids.start, seed=0, whiten=False
    )
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, msg=name)


def test_links_of_shards_of_features_are_features_codes(shards_of_features):
    sequence = ShardSet(shards_of_features).sample("segmentation", 0).sequence
    vocabulary = ShardSet(shards_of_features).manifest.format.vocabulary
    linked = sequence.links()[sequence.links() != NO_LINK]
    assert len(linked) and np.isin(linked, vocabulary.feature_range).all()


def test_corruption_without_the_mask_token_is_refused():
    with pytest.raises(InputError, match=r"training\.mask_corruption needs vocabulary\.mask=true"):
        load_recipe(TrainingRecipe, "demo", ["training.mask_corruption=true"])
