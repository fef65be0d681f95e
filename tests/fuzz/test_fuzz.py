"""Any content of input files leads to a result or a one-sentence error: never to another exception,
a hang, a file outside the output folder, or an annotation that is lost without being counted.

`pytest tests/fuzz --fuzz 20000` tries more; a failure names its seed.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutations import mutate_bytes, mutate_json, mutate_lines, mutate_yaml

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.images import load_image, load_mask
from icl_moe.inference.model import InContextModel
from icl_moe.inference.region import Region
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.coco import load_instances, read_segmentation
from preprocessing.coco_captions import read_captioning as read_coco_captions
from preprocessing.folder import read_segmentation as read_folder
from preprocessing.image_check import ImageCheck
from preprocessing.jsonl import read_captioning as read_captioned_lines
from preprocessing.jsonl import read_segmentation as read_masked_lines
from preprocessing.lvis import read_segmentation as read_lvis
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource, DataRecipe, SegmentationSource
from preprocessing.tokenizers.recipe import TokenizerRecipe
from preprocessing.visual_genome import read_captioning as read_visual_genome

Door = Callable[[Path], Any]
"""Opens the content of a folder, in which one file was mutated."""

SECONDS = 20


def usable(folder: Path) -> ImageCheck:
    return ImageCheck("skip", "skip", folder / "notes", workers=0)


def open_coco(folder: Path) -> None:
    file, images = folder / "data/instances_train.json", folder / "data/images"
    source = SegmentationSource(images=str(images), annotations=str(file))
    pool = read_segmentation(source, 64, usable(folder), workers=0)
    check_nothing_is_lost(pool, set(load_instances(file).anns))


def open_visual_genome(folder: Path) -> None:
    data = folder / "data"
    source = CaptioningSource(
        images=str(data / "images"),
        regions=str(data / "region_descriptions.json"),
        objects=str(data / "objects.json"),
        image_data=str(data / "image_data.json"),
        classes=("disc", "square", "star", "ring"),
        min_descriptions=0,
    )
    pool = read_visual_genome(source, usable(folder))
    listed = json.loads((data / "region_descriptions.json").read_bytes())
    check_nothing_is_lost(pool, {id(region) for entry in listed for region in entry["regions"]})


def open_coco_captions(folder: Path) -> None:
    data = folder / "data"
    source = CaptioningSource(
        source="coco_captions",
        images=str(data / "images"),
        annotations=str(folder / "captions.json"),
        instances=str(data / "instances_train.json"),
        classes=("disc", "square", "star", "ring"),
        min_descriptions=0,
    )
    pool = read_coco_captions(source, usable(folder))
    captions = json.loads((folder / "captions.json").read_bytes())["annotations"]
    read = {number for region in pool.regions for number in region.annotations}
    lost = {caption["id"] for caption in captions} - read
    assert not lost or sum(pool.skipped.values()), f"{len(lost)} captions are nowhere"


def open_lvis(folder: Path) -> None:
    file = folder / "lvis.json"
    source = SegmentationSource("lvis", images=str(folder / "data"), annotations=str(file))
    pool = read_lvis(source, 64, usable(folder), workers=0)
    check_nothing_is_lost(pool, set(load_instances(file).anns))


def open_lines(folder: Path) -> None:
    files = {"images": str(folder / "data/images"), "annotations": str(folder / "lines.jsonl")}
    masks = read_masked_lines(SegmentationSource("jsonl", **files), 64, usable(folder), workers=0)
    lines = set(range((folder / "lines.jsonl").read_bytes().count(b'"class"')))
    check_nothing_is_lost(masks, lines)
    captions = CaptioningSource("jsonl", min_descriptions=0, **files)
    check_nothing_is_lost(read_captioned_lines(captions, usable(folder)), lines)


def open_folder(names: str) -> Door:
    def open_it(folder: Path) -> None:
        own = folder / "own"
        files = {"images": str(own / "images"), "masks": str(own / "masks")}
        source = SegmentationSource("folder", **files, names=str(own / names))
        pool = read_folder(source, 64, usable(folder), workers=0)
        assert len(pool.regions) + sum(pool.skipped.values()) >= 2

    return open_it


def check_nothing_is_lost(pool: Pool, annotations: set[Any]) -> None:
    kept = sum(len(region.annotations) for region in pool.regions)
    left_out = len(annotations) - kept
    assert left_out <= 0 or sum(pool.skipped.values()), f"{left_out} annotations are nowhere"


def open_shards(folder: Path) -> None:
    shards = ShardSet(folder / "shards")
    for task in shards.manifest.samples:
        for index in range(min(shards.count(task), 6)):
            sample = shards.sample(task, index)
            assert sample.category
    shards.close()


def open_model(folder: Path) -> None:
    InContextModel.from_pretrained(folder / "model", "cpu")


def open_tokenizer(folder: Path) -> None:
    VQGAN.from_pretrained(folder / "tokenizer")


DOORS: dict[str, tuple[str, Callable, Door, float]] = {
    "coco": ("data/instances_train.json", mutate_json, open_coco, 0.12),
    "coco captions": ("captions.json", mutate_json, open_coco_captions, 0.04),
    "visual genome, regions": (
        "data/region_descriptions.json",
        mutate_json,
        open_visual_genome,
        0.08,
    ),
    "visual genome, objects": ("data/objects.json", mutate_json, open_visual_genome, 0.08),
    "visual genome, images": ("data/image_data.json", mutate_json, open_visual_genome, 0.04),
    "lvis": ("lvis.json", mutate_json, open_lvis, 0.04),
    "lines": ("lines.jsonl", mutate_lines, open_lines, 0.06),
    "names": ("own/names.json", mutate_json, open_folder("names.json"), 0.06),
    "names as text": ("own/names.txt", mutate_bytes, open_folder("names.txt"), 0.04),
    "mask of ids": ("own/masks/a.png", mutate_bytes, open_folder("names.json"), 0.04),
    "region": ("region.json", mutate_json, lambda f: Region.load(f / "region.json"), 0.06),
    "image": ("image.jpg", mutate_bytes, lambda f: load_image(f / "image.jpg"), 0.1),
    "mask": ("mask.png", mutate_bytes, lambda f: load_mask(f / "mask.png", (64, 48)), 0.1),
    "manifest": ("shards/manifest.json", mutate_json, open_shards, 0.08),
    "index": ("shards/segmentation.index.npy", mutate_bytes, open_shards, 0.05),
    "shard": ("shards/captioning-000000.tar", mutate_bytes, open_shards, 0.04),
    "model's config": ("model/config.json", mutate_json, open_model, 0.04),
    "model's weights": ("model/model.safetensors", mutate_bytes, open_model, 0.01),
    "tokenizer's config": ("tokenizer/config.json", mutate_json, open_tokenizer, 0.04),
}
"""Entry point -> the file to mutate, the kind of mutation, the function that opens it, and its
share of all mutations.
"""

RECIPES: dict[str, tuple[type, str]] = {
    "icl_moe/recipes/demo.yaml": (TrainingRecipe, "icl_moe"),
    "preprocessing/recipes/coco_vg_256.yaml": (DataRecipe, "preprocessing"),
    "preprocessing/tokenizers/recipes/tokenizer_demo.yaml": (TokenizerRecipe, "preprocessing"),
}
RECIPE_SHARE = 0.04
"""Mutations per recipe."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"{what} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_door(what: str, open_it: Callable[[], Any]) -> None:
    try:
        with time_limit(what):
            open_it()
    except InputError as error:
        assert "\n" not in str(error).strip(), f"{what}: {error!r} is more than a line"
        assert str(error)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("name", DOORS)
def test_a_mutated_file_is_read_or_refused_in_a_sentence(name, material, tmp_path, request):
    file, mutate, door, share = DOORS[name]
    folder = tmp_path / "inside"
    shutil.copytree(material, folder)
    outside = snapshot(tmp_path)
    original = (folder / file).read_bytes()
    for seed in range(round(share * request.config.getoption("--fuzz"))):
        (folder / file).write_bytes(mutate(original, np.random.default_rng(seed)))
        shutil.rmtree(folder / "notes", ignore_errors=True)
        try_door(f"{file}, seed {seed}", lambda: door(folder))
    assert snapshot(tmp_path) == outside


@pytest.mark.parametrize("file", RECIPES)
def test_a_mutated_recipe_is_read_or_refused_in_a_sentence(file, repository, tmp_path, request):
    kind, package = RECIPES[file]
    original = (repository / file).read_bytes()
    path = tmp_path / "recipe.yaml"
    for seed in range(round(RECIPE_SHARE * request.config.getoption("--fuzz"))):
        path.write_bytes(mutate_yaml(original, np.random.default_rng(seed)))
        try_door(f"{file}, seed {seed}", lambda: load_recipe(kind, str(path), package=package))


def snapshot(folder: Path) -> set[str]:
    """The content of a folder and of its parent, without the mutated folder."""
    return {path.name for path in (*folder.iterdir(), *folder.parent.iterdir())}
