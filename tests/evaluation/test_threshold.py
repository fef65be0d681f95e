"""The threshold of masks that are decoded in one pass: fitted on some episodes, used on others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.protocol import evaluate
from icl_moe.evaluation.threshold import fit_threshold
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode


@pytest.fixture(scope="module")
def fitted_folder(parallel_model_folder, toy_shards, tmp_path_factory) -> Path:
    """The model with a threshold fitted on the shards."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    shutil.copytree(parallel_model_folder, folder)
    model = InContextModel.from_pretrained(folder, "cpu")
    config = model.decoder.config
    config.mask_threshold = fit_threshold(model, ShardSet(toy_shards), episodes=7)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_shards(toy_shards, tmp_path_factory) -> Path:
    """The same episodes under another manifest, so that the model considers them other shards."""
    folder = shutil.copytree(toy_shards, tmp_path_factory.mktemp("other") / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Path(folder)


def test_the_threshold_is_what_the_model_expects_of_nearly_all_training_masks(
    fitted_folder, toy_shards
):
    model = InContextModel.from_pretrained(fitted_folder, "cpu")
    shards = ShardSet(toy_shards)
    episodes = EpisodeSet(shards, model.codec, "segmentation")
    expected = []
    for number in (0, 2, 3, 5, 7, 8, 10):  # Seven at even distances.
        episode = episodes[number]
        asked = Episode(episode.task, episode.category, episode.pairs[:-1])
        (pair,) = model.complete([(asked, episode.query.image)])
        assert pair.drawn.at_once
        expected.append(pair.drawn.expected_iou)
    least, second = sorted(expected)[:2]
    fitted = model.decoder.config.mask_threshold
    assert fitted["episodes"] == 7
    assert fitted["shards"] == shards.fingerprint[:16]
    # The quantile 0.02 of seven lies 0.02 x 6 of the way from the first to the second.
    assert fitted["value"] == pytest.approx(least + 0.12 * (second - least), abs=1e-4)


def test_a_model_is_not_evaluated_on_what_its_threshold_was_fitted_on(
    fitted_folder, toy_shards, tmp_path
):
    with pytest.raises(InputError, match=r"was fitted on .*: evaluate it on others"):
        evaluate(fitted_folder, toy_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_writes_masks_in_one_pass_with_the_models_threshold(
    fitted_folder, other_shards, tmp_path, no_java
):
    metrics = evaluate(fitted_folder, other_shards, tmp_path / "out", shots=(0, 2), limit=5)
    config = json.loads((fitted_folder / "config.json").read_text())
    assert metrics.decoding == "parallel"
    assert metrics.mask_threshold == config["mask_threshold"]
    model = InContextModel.from_pretrained(fitted_folder, "cpu")
    episodes = EpisodeSet(ShardSet(other_shards), model.codec, "segmentation")
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()[1:]
    own = [line for line in map(json.loads, lines) if line["control"] is None]
    said = [line for line in own if line["task"] == "segmentation"]
    assert len(said) == 2 * 5
    for line in said:
        episode = episodes[int(line["key"].rpartition("-")[2])]
        asked = Episode(episode.task, episode.category, episode.pairs[: line["shots"]])
        (pair,) = model.complete([(asked, episode.query.image)], decoding="parallel")
        assert np.mean(decode_rle(line["mask"]) == pair.drawn.mask_HW) > 0.999
    in_turn = evaluate(
        fitted_folder, other_shards, tmp_path / "turn", limit=5, decoding="autoregressive"
    )
    assert in_turn.decoding == "greedy"


def test_a_model_that_was_not_trained_for_it_refuses_to_decode_in_parallel(
    toy_model_folder, other_shards, tmp_path, capsys
):
    command = ["evaluate", str(toy_model_folder), str(other_shards), "--out", str(tmp_path / "out")]
    assert main([*command, "--decoding", "parallel"]) == 2
    said = capsys.readouterr().err
    assert "icl-moe: This model cannot decode in parallel, since it was not trained for it" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_images_with_a_vq_gan_cannot_decode_mirrored(parallel_model_folder):
    model = InContextModel.from_pretrained(parallel_model_folder, "cpu")
    assert model.decoding() == "parallel"
    with pytest.raises(InputError, match="cannot decode mirrored, since it reads images with a VQ"):
        model.decoding("mirrored")
