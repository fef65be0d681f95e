"""Shifted readings: a query that is read four times, moved by half a cell."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_export
import toy_tokenizer
from PIL import Image

from icl_moe import InContextModel
from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.protocol import evaluate
from icl_moe.images import to_image, to_square_pixels
from icl_moe.inference.decode import Sampling
from icl_moe.inference.edges import follow_edges
from icl_moe.inference.shifts import shifted_views
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.synthetic import draw_scene

CORNERS = ((0, 0), (0, 4), (4, 0), (4, 4))
"""How far the readings of 64 x 64 pixels in 8 x 8 cells are moved, (x, y)."""


@pytest.fixture(scope="module")
def model() -> InContextModel:
    return InContextModel.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, (64, 64)) for _ in range(3)]


def moved(picture: Image.Image, x: int, y: int) -> Image.Image:
    """The picture moved left and upwards, mirrored at the other edges."""
    pixels_HW3 = np.asarray(picture)
    wide_HW3 = np.concatenate([pixels_HW3, pixels_HW3[:, -2 : -2 - x : -1]], axis=1)[:, x:]
    high_HW3 = np.concatenate([wide_HW3, wide_HW3[-2 : -2 - y : -1]], axis=0)[y:]
    return Image.fromarray(high_HW3)


def averaged(levels: list[np.ndarray]) -> np.ndarray:
    """Pixel by pixel, the mean over the moved readings that contain it."""
    mean_HW = np.zeros((64, 64))
    for row in range(64):
        for column in range(64):
            seen = [
                level_HW[row - y, column - x]
                for (x, y), level_HW in zip(CORNERS, levels, strict=True)
                if row >= y and column >= x
            ]
            mean_HW[row, column] = np.mean(seen)
    return mean_HW


def test_views_are_the_image_moved_by_half_a_cell(scenes: list[Any]) -> None:
    picture = scenes[0].image
    views = shifted_views(to_square_pixels(picture, 64), cells=64)
    for view_3HW, corner in zip(views, CORNERS, strict=True):
        np.testing.assert_array_equal(np.asarray(to_image(view_3HW)), moved(picture, *corner))


def test_a_mask_is_the_mean_of_the_masks_of_moved_images(
    model: InContextModel, scenes: list[Any]
) -> None:
    one, other, query = scenes
    examples = {
        "one": [(one.image, one.objects[-1].mask_HW)],
        "other": [(other.image, other.objects[-1].mask_HW)],
    }
    edges, model.edges = model.edges, None
    assert edges is not None
    try:
        plain = model.session(examples)
        readings = [plain.draw(moved(query.image, *corner)).masks for corner in CORNERS]
    finally:
        model.edges = edges
    found = model.session(examples).draw([query.image, one.image], shifts=True, batch=3)[0]
    for name, drawn in found.masks.items():
        levels = [masks[name].brightness_HW for masks in readings]
        expected = follow_edges(
            type(drawn)(averaged(levels).astype(np.float32), True, drawn.threshold),
            query.image,
            edges,
        )
        np.testing.assert_allclose(drawn.brightness_HW, expected.brightness_HW, atol=2e-3)
        assert (levels[0] != drawn.brightness_HW).any()
    one_shot = model.segment(examples["one"], query.image, shifts=True)
    assert np.mean(one_shot != found.masks["one"].mask_HW) < 1e-3


def test_masks_that_are_written_code_by_code_have_no_shifts(
    model: InContextModel, scenes: list[Any]
) -> None:
    session = model.session([(scenes[0].image, scenes[0].objects[-1].mask_HW)])
    for how in ({"decoding": "autoregressive"}, {"sampling": Sampling(temperature=1.0)}):
        with pytest.raises(InputError, match="Shifted readings need masks in one pass"):
            session.segment(scenes[1].image, shifts=True, **how)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that decodes in one pass, and shards of both tasks with the images they are of."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = [
        "synthetic.images=30",
        "samples=4",
        "examples=1",
        "vocabulary.mask=true",
        *toy_tokenizer.recipe_settings(tokenizer),
    ]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    exported = toy_export.save_toy_model(folder, folder / "shards", mask_corruption=True)
    return exported, folder / "shards"


def test_an_evaluation_reads_the_queries_of_segmentation_shifted(
    toy: tuple[Path, Path], tmp_path: Path, no_java: None
) -> None:
    folder, shards = toy
    metrics = evaluate(folder, shards, tmp_path / "out", controls=[], shifts=True)
    assert metrics is not None and metrics.decoding == "parallel, shifted"
    model = InContextModel.from_pretrained(folder, "cpu")
    episodes = EpisodeSet(ShardSet(str(shards)), model.codec, "segmentation")
    photographs = Photographs(ShardSet(str(shards)), "segmentation")
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()[1:]
    said = {line["key"]: line for line in map(json.loads, lines)}
    for episode in (episodes[number] for number in range(4)):
        shown = photographs.at_model_size(episode, 0)
        mask_HW = decode_rle(episode.meta["masks"][0]).astype(bool)
        session = model.session([(shown, mask_HW)])
        drawn = session.draw(photographs.at_model_size(episode, -1), shifts=True)
        assert np.mean(decode_rle(said[episode.key]["mask"]) == drawn.mask_HW) > 0.99
    plain = evaluate(folder, shards, tmp_path / "plain", controls=[])
    assert plain is not None and plain.decoding == "parallel"
    assert "captioning" in metrics.tasks and metrics.tasks["captioning"].rows


def test_shifted_readings_need_segmentation_and_its_images(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shards = toy
    moved_shards = tmp_path / "moved"
    shutil.copytree(shards, moved_shards, ignore=shutil.ignore_patterns("synthetic"))
    out = str(tmp_path / "out")
    assert main(["evaluate", str(folder), str(moved_shards), "--shifts", "--out", out]) == 2
    said = capsys.readouterr().err
    assert "name its folder with --images, or leave out --shifts." in said
    command = ["evaluate", str(folder), str(shards), "--shifts", "--out", out]
    assert main([*command, "--decoding", "autoregressive"]) == 2
    assert "Shifted readings need masks in one pass" in capsys.readouterr().err


def test_a_folder_is_labelled_with_shifts(scenes: list[Any], tmp_path: Path) -> None:
    for part in ("examples/images", "examples/masks", "images"):
        (tmp_path / part).mkdir(parents=True)
    scenes[0].image.save(tmp_path / "examples/images/a.png")
    Image.fromarray(scenes[0].objects[-1].mask_HW).save(tmp_path / "examples/masks/a.png")
    scenes[0].image.rotate(5).save(tmp_path / "images/b.png")
    where = ["--examples", str(tmp_path / "examples"), "--images", str(tmp_path / "images")]
    for name, more in (("plain", []), ("shifted", ["--shifts"])):
        out = ["--out", str(tmp_path / f"{name}.json")]
        assert main(["label", "demo", *where, *out, "--device", "cpu", *more]) == 0
    plain, shifted = (
        json.loads((tmp_path / f"{name}.json").read_text())["annotations"]
        for name in ("plain", "shifted")
    )
    assert plain and shifted and plain != shifted
    out = ["--out", str(tmp_path / "shifted.json"), "--overwrite", "--shifts"]
    assert main(["label", "demo", *where, *out, "--decoding", "autoregressive"]) == 2
    assert not list(tmp_path.glob("*journal*")), "a refused call leaves nothing to go on from"
