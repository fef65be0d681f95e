"""The training-free matcher appears beside the other baselines and equals a plain implementation of
its formula.
"""

import numpy as np
import pytest
import torch
import toy_export
import toy_features
import toy_tokenizer

from icl_moe.data.shards import ShardSet
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.matcher import THRESHOLDS, Matcher
from icl_moe.evaluation.protocol import evaluate
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from icl_moe.tasks.mask_scores import mask_iou
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards of scenes encoded by a features tokenizer, and a model for them."""
    folder = tmp_path_factory.mktemp("matched")
    toy_features.make_toy_features(folder).save_pretrained(folder / "reader")
    settings = [
        *("synthetic.images=40", "samples=12", "examples=2", "captioning=null"),
        *toy_tokenizer.recipe_settings(toy_tokenizer.save_toy_tokenizer(folder / "drawer")),
        *toy_features.recipe_settings(folder / "reader"),
    ]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    toy_export.save_toy_model(folder / "model", folder / "shards")
    return folder


@pytest.fixture(scope="module")
def episodes(place):
    model = InContextModel.from_pretrained(place / "model", "cpu")
    return model, EpisodeSet(ShardSet(place / "shards"), model.codec, "segmentation")


def scores(table_KD: np.ndarray, episode, pair: int, source, shots: int) -> np.ndarray:
    """The scores of pixels, computed with plain loops over examples and cells."""
    inside, outside = np.zeros(table_KD.shape[1]), np.zeros(table_KD.shape[1])
    for number in range(shots):
        mask_HW = decode_rle(source.meta["masks"][number])
        for cell, code in enumerate(source.pairs[number].image):
            row, column = divmod(cell, 8)
            share = mask_HW[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean()
            inside += share * table_KD[code]
            outside += (1 - share) * table_KD[code]
    direction = inside / np.linalg.norm(inside) - outside / np.linalg.norm(outside)
    cells = table_KD[episode.pairs[pair].image]
    values = (cells / np.linalg.norm(cells, axis=1, keepdims=True)) @ direction
    grid = torch.from_numpy(values.reshape(1, 1, 8, 8))
    return torch.nn.functional.interpolate(grid, (64, 64), mode="bilinear")[0, 0].numpy()


@pytest.mark.parametrize("shots", [1, 2])
def test_masks_and_threshold_are_those_of_a_plain_count(episodes, shots):
    model, numbered = episodes
    features = model.tokenizers.features
    table_KD = features.codebook_KD.double().numpy()
    every = [numbered[number] for number in range(len(numbered))]
    curves = []
    for number, episode in enumerate(every):
        image = episode.meta["sources"][0]["image"]
        for source in every[number + 1 :] + every[:number]:
            images = [origin["image"] for origin in source.meta["sources"][:shots]]
            if source.category == episode.category and image not in images:
                pixels_HW = scores(table_KD, episode, 0, source, shots)
                right_HW = decode_rle(episode.meta["masks"][0])
                curves.append([mask_iou(pixels_HW > edge, right_HW) for edge in THRESHOLDS])
                break
    assert len(curves) > 3
    threshold = THRESHOLDS[np.mean(curves, axis=0).argmax()]
    predictions = Matcher(features, numbered, shots).said(every, every)
    for episode, output in zip(every, predictions, strict=True):
        expected_HW = scores(table_KD, episode, -1, episode, shots) > threshold
        assert np.mean(decode_rle(output["mask"]) != expected_HW) < 1e-3


def test_the_report_has_it_beside_the_other_baselines(place, tmp_path):
    metrics = evaluate(place / "model", place / "shards", tmp_path, shots=[1, 2]).to_json()
    result = metrics["tasks"]["segmentation"]
    for rows in (result["rows"], result["swapped"]):
        names = [row["name"] for row in rows if row["prediction"] == "matcher"]
        assert names == [
            "the training-free matcher, 1 example",
            "the training-free matcher, 2 examples",
        ]
    assert "training-free matcher" in (tmp_path / "report.html").read_text()
