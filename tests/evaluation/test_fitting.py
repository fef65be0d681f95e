"""What is fitted for masks that are decoded in one pass, on some episodes, and used on others."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.fitting import fit_masks
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.protocol import evaluate
from icl_moe.inference.edges import EdgeFilter, follow_edges
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.mask_scores import mask_iou


@pytest.fixture(scope="module")
def fitted_folder(parallel_model_folder, toy_shards, tmp_path_factory) -> Path:
    """The model with a threshold fitted on the shards."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    shutil.copytree(parallel_model_folder, folder)
    model = InContextModel.from_pretrained(folder, "cpu")
    config = model.decoder.config
    config.mask_threshold, config.mask_edges = fit_masks(model, ShardSet(toy_shards), episodes=7)
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
        request = Episode(episode.task, episode.category, episode.pairs[:-1])
        (pair,) = model.complete([(request, episode.query.image)])
        assert pair.drawn.at_once
        expected.append(pair.drawn.expected_iou)
    least, second = sorted(expected)[:2]
    fitted = model.decoder.config.mask_threshold
    assert fitted["episodes"] == 7
    assert fitted["shards"] == shards.fingerprint[:16]
    # The quantile 0.02 of seven lies 0.02 x 6 of the way from the first to the second.
    assert fitted["value"] == pytest.approx(least + 0.12 * (second - least), abs=1e-4)


def test_the_fit_takes_the_next_query_that_shows_the_object(
    parallel_model_folder, toy_shards, monkeypatch
):
    model = InContextModel.from_pretrained(parallel_model_folder, "cpu")
    shards = ShardSet(toy_shards)
    episodes = EpisodeSet(shards, model.codec, "segmentation")
    images = [episodes[number].query.image for number in range(len(episodes))]
    read, complete, asked = ShardSet.sample, model.complete, []

    def sample(self, task, index):
        """As they are, but the queries of episodes 3 and 4 lack their class."""
        found = read(self, task, index)
        if index not in (3, 4):
            return found
        *examples, query = found.meta["sources"]
        scale = [*found.meta["scale"][:-1], 0]
        sources = [*examples, {**query, "annotations": []}]
        meta = {**found.meta, "scale": scale, "sources": sources}
        return replace(found, json=json.dumps(meta).encode())

    def recorded(requests):
        asked.extend(image for _, image in requests)
        return complete(requests)

    monkeypatch.setattr(ShardSet, "sample", sample)
    monkeypatch.setattr(model, "complete", recorded)
    fitted = fit_masks(model, shards, episodes=4)
    assert fitted.threshold["episodes"] == 4
    np.testing.assert_array_equal(asked, [images[number] for number in (0, 5, 7, 10)])


def test_a_model_is_not_evaluated_on_what_its_threshold_was_fitted_on(
    fitted_folder, toy_shards, tmp_path
):
    with pytest.raises(InputError, match=r"was fitted on .*: evaluate it on others"):
        evaluate(fitted_folder, toy_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_writes_masks_in_one_pass_with_the_models_threshold(
    fitted_folder, other_shards, tmp_path, no_java
):
    metrics = evaluate(
        fitted_folder, other_shards, tmp_path / "out", shots=(0, 2), limit=5, edges=False
    )
    config = json.loads((fitted_folder / "config.json").read_text())
    assert metrics.decoding == "parallel"
    assert metrics.mask_threshold == config["mask_threshold"]
    model = InContextModel.from_pretrained(fitted_folder, "cpu")
    episodes = EpisodeSet(ShardSet(other_shards), model.codec, "segmentation")
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()[1:]
    own = [line for line in map(json.loads, lines) if line["control"] is None]
    segmentations = [line for line in own if line["task"] == "segmentation"]
    assert len(segmentations) == 2 * 5
    for line in segmentations:
        episode = episodes[int(line["key"].rpartition("-")[2])]
        request = Episode(episode.task, episode.category, episode.pairs[: line["shots"]])
        (pair,) = model.complete([(request, episode.query.image)], decoding="parallel")
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
    printed = capsys.readouterr().err
    assert (
        "icl-moe: This model cannot decode in parallel, since it was not trained for it" in printed
    )
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_images_with_a_vq_gan_cannot_decode_mirrored(parallel_model_folder):
    model = InContextModel.from_pretrained(parallel_model_folder, "cpu")
    assert model.decoding() == "parallel"
    with pytest.raises(InputError, match="cannot decode mirrored, since it reads images with a VQ"):
        model.decoding("mirrored")


EDGES = {"radius": 0.25, "epsilon": 0.001, "slope": 2.0, "offset": 0.5, "shards": "others"}


@pytest.fixture(scope="module")
def along_edges_folder(parallel_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("along_edges") / "model"
    shutil.copytree(parallel_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_edges": EDGES}))
    return folder


def without_images(shards: Path, out: Path) -> Path:
    """A copy of the shards that has no images next to it."""
    out.mkdir()
    for file in shards.iterdir():
        if file.name != "synthetic":
            (out / file.name).symlink_to(file)
    return out


def said_of(out: Path) -> dict[str, np.ndarray]:
    """The masks that the model wrote after its own examples, by key."""
    lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines()[1:])
    return {
        line["key"]: decode_rle(line["mask"])
        for line in lines
        if line["task"] == "segmentation" and line["control"] is None
    }


def test_an_evaluation_lets_outlines_follow_the_edges_of_the_queries(
    along_edges_folder, toy_shards, tmp_path, no_java
):
    metrics = evaluate(along_edges_folder, toy_shards, tmp_path / "along", limit=5)
    assert metrics.mask_edges == EDGES
    model = InContextModel.from_pretrained(along_edges_folder, "cpu")
    assert model.edges == EdgeFilter(0.25, 0.001, 2.0, 0.5)
    shards = ShardSet(toy_shards)
    episodes = EpisodeSet(shards, model.codec, "segmentation")
    photographs = Photographs(shards, "segmentation")
    along = said_of(tmp_path / "along")
    for number in range(5):
        episode = episodes[number]
        request = Episode(episode.task, episode.category, episode.pairs[:1])
        (pair,) = model.complete([(request, episode.query.image)])
        mask_HW = follow_edges(
            pair.drawn, photographs.at_model_size(episode, -1), model.edges
        ).mask_HW
        assert np.mean(along[episode.key] == mask_HW) > 0.999

    plain = evaluate(along_edges_folder, toy_shards, tmp_path / "plain", limit=5, edges=False)
    assert plain.mask_edges is None
    as_drawn = said_of(tmp_path / "plain")
    assert as_drawn.keys() == along.keys()
    assert any((as_drawn[key] != along[key]).any() for key in along)


def test_images_that_are_not_there_are_named_with_both_ways_out(
    along_edges_folder, toy_shards, tmp_path, capsys, no_java
):
    moved = without_images(toy_shards, tmp_path / "moved")
    command = ["evaluate", str(along_edges_folder), str(moved), "--limit", "2"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert (
        "name its folder with --images, or leave masks as the model draws them with --no-edges."
        in printed
    )
    assert main([*command, "--images", str(toy_shards / "synthetic/images")]) == 0
    assert main([*command[:-1], str(tmp_path / "plain"), "--no-edges"]) == 0


def drawn_in_cells(mask_HW: np.ndarray) -> DrawnMask:
    """A true mask as a model draws it that decides cell by cell, and is never quite sure."""
    shares = mask_HW.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    p_HW = np.kron(0.1 + 0.7 * shares, np.ones((8, 8)))
    return DrawnMask((2 * p_HW - 1).astype(np.float32), at_once=True)


def test_the_edges_are_those_with_the_best_masks_of_training_episodes(
    parallel_model_folder, toy_shards, monkeypatch
):
    model = InContextModel.from_pretrained(parallel_model_folder, "cpu")
    shards = ShardSet(toy_shards)
    episodes = EpisodeSet(shards, model.codec, "segmentation")
    queries = [episodes[number] for number in (0, 3, 7, 10)]
    true_EHW = np.stack([decode_rle(episode.meta["masks"][-1]) for episode in queries])
    drawn = [drawn_in_cells(mask_HW) for mask_HW in true_EHW]
    pairs = [
        replace(episode.query, drawn=mask) for episode, mask in zip(queries, drawn, strict=True)
    ]
    monkeypatch.setattr(model, "complete", lambda requests: pairs)
    fitted = fit_masks(model, shards, episodes=4).edges
    assert fitted is not None
    assert fitted["episodes"] == 4 and fitted["shards"] == shards.fingerprint[:16]
    best, photographs = EdgeFilter.of(fitted), Photographs(shards, "segmentation")

    def masks_of(edges):
        guides = [photographs.at_model_size(episode, -1) for episode in queries]
        return [follow_edges(mask, guide, edges) for mask, guide in zip(drawn, guides, strict=True)]

    def mean_iou(masks):
        return np.mean([mask_iou(m.mask_HW, t) for m, t in zip(masks, true_EHW, strict=True)])

    def log_loss(edges):
        p_EHW = (np.stack([mask.brightness_HW for mask in masks_of(edges)]) + 1.0) / 2
        return -np.log(np.where(true_EHW, p_EHW, 1 - p_EHW).clip(1e-7)).mean()

    assert fitted["mean_iou_as_drawn"] == pytest.approx(mean_iou(drawn), abs=1e-4)
    assert fitted["mean_iou"] == pytest.approx(mean_iou(masks_of(best)), abs=1e-4)
    for radius, epsilon in product((1 / 16, 1 / 4), (1e-4, 1e-2)):
        other = replace(best, radius=radius, epsilon=epsilon)
        assert mean_iou(masks_of(other)) <= fitted["mean_iou"] + 0.02, other
    for field, step in product(("slope", "offset"), (-0.1, 0.1)):
        other = replace(best, **{field: getattr(best, field) + step})
        assert log_loss(other) > log_loss(best), other


def test_edges_are_not_fitted_without_images(parallel_model_folder, toy_shards, tmp_path, capsys):
    moved = without_images(toy_shards, tmp_path / "moved")
    model = InContextModel.from_pretrained(parallel_model_folder, "cpu")
    threshold, edges = fit_masks(model, ShardSet(moved), episodes=4)
    assert edges is None and threshold["episodes"] == 4
    said = capsys.readouterr().out
    assert "The outlines of masks will not follow the edges of images:" in said
    assert "name its folder with --images." in said
    fit_masks(model, ShardSet(moved), episodes=4, images=toy_shards / "synthetic/images")
    assert "will not follow" not in capsys.readouterr().out
