"""Queries that lack the class of their examples: which images they ask about, and that builds,
checks, fits and scores treat them as what they are.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizer
from conftest import CocoFolder, write_image
from PIL import Image
from test_composed import NAMES, OBJECTS, write_flat_data_set

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from icl_moe.tasks.task import lacks_class
from preprocessing import preview
from preprocessing.build import build_shards
from preprocessing.compare import compare_with_sources
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import ComposedImages, DataRecipe, SegmentationSource
from preprocessing.sources import Reading, read_pools
from preprocessing.stats import shard_stats
from preprocessing.verify import verify_shards


def _read(folder: Path, workers: int = 0, **settings: Any) -> Pool:
    recipe = DataRecipe(tokenizer="demo", segmentation=SegmentationSource(**settings))
    check = ImageCheck("stop", "stop", folder / "work", 0)
    (pool,) = read_pools(recipe, Reading(80, check, workers, folder / "out"))
    return pool


def _of_folder(folder: Path, **settings: Any) -> Pool:
    """Of eight photographs and their masks, the last three of which are black."""
    for number in range(8):
        write_image(folder / f"images/{number}.png", number)
        mask_HW = np.zeros((80, 100), dtype=bool)
        mask_HW[10:40, 20:60] = number < 5
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask_HW).save(folder / f"masks/{number}.png")
    return _read(folder, images=str(folder / "images"), masks=str(folder / "masks"), **settings)


def _of_coco(folder: CocoFolder, **settings: Any) -> Pool:
    files = {"images": str(folder.images), "annotations": str(folder.file)}
    return _read(folder.folder, **files, **settings)


def test_an_image_is_asked_for_a_class_that_is_nowhere_in_it(coco_folder: CocoFolder) -> None:
    """Only images 5 and 6 lack a cat: image 4 has a crowd of cats, which makes no region."""
    pool = _of_coco(coco_folder, absent=0.5)
    absent = [region for region in pool.regions if region.is_absent]
    assert {(region.image.name, region.category) for region in absent} == {
        ("5.jpg", "cat"),
        ("6.jpg", "cat"),
    }
    assert len(absent) == 2, "an image is asked for a class at most once"
    for region in absent:
        shown = next(r for r in pool.regions if r.image == region.image and not r.is_absent)
        counts = {"size": [80, 80], "counts": region.target.counts}
        assert not decode_rle(counts).any() and region.scale == 0 and region.annotations == ()
        assert region.target.objects == shown.target.objects != ()
        assert (region.crop, region.role) == (shown.crop, "query")


def test_a_share_of_each_classs_queries_lack_it(tmp_path: Path) -> None:
    """Red is in eight of ten images, so at most two lack it."""
    write_flat_data_set(tmp_path)
    files = {"images": str(tmp_path / "images"), "annotations": str(tmp_path / "instances.json")}
    pool = _read(tmp_path, **files, absent=0.5)
    shown = {f"{place}.png": {NAMES[n] for n in classes} for place, classes in enumerate(OBJECTS)}
    for region in pool.regions:
        assert (region.category in shown[region.image.name]) != region.is_absent
    queries = Counter((region.category, region.is_absent) for region in pool.regions)
    with_red = sum("red" in names for names in shown.values())
    assert queries["red", True] == 10 - with_red
    for name in ("green", "blue", "yellow"):
        assert queries[name, True] == queries[name, False] > 0


def test_images_without_a_region_are_asked_about(coco_folder: CocoFolder) -> None:
    """With cats alone, images 4 to 6 have no region; 4 has a crowd of cats, 5 and 6 a dog."""
    pool = _of_coco(coco_folder, absent=0.4, classes=("cat",))
    assert {region.category for region in pool.regions} == {"cat"}
    absent = [region for region in pool.regions if region.is_absent]
    assert sorted(region.image.name for region in absent) == ["5.jpg", "6.jpg"]
    for region in absent:
        (seen,) = region.target.objects
        assert seen[0] == "dog" and region.crop == (10, 0, 90, 80)


def test_black_masks_of_a_folder_are_images_that_lack_the_class(tmp_path: Path) -> None:
    pool = _of_folder(tmp_path, source="folder", absent=0.3)
    absent = {region.image.name for region in pool.regions if region.is_absent}
    assert len(absent) == 2 and absent < {"5.png", "6.png", "7.png"}
    pool.drop_small_classes(images=2)
    assert len(pool.regions) == 5 + 2


def test_the_regions_of_absent_classes_do_not_depend_on_the_workers(
    coco_folder: CocoFolder,
) -> None:
    one, other = (_of_coco(coco_folder, absent=0.4, workers=workers) for workers in (0, 3))
    assert list(one.regions) == list(other.regions)
    assert list(_of_coco(coco_folder).regions) == [r for r in one.regions if not r.is_absent]


def test_what_is_left_out_is_counted_as_without_absent_classes(coco_folder: CocoFolder) -> None:
    for settings in ({}, {"least_scale": 0.05}, {"classes": ("cat",)}):
        without, with_them = (
            _of_coco(coco_folder, absent=share, **settings).skipped for share in (0.0, 0.5)
        )
        assert +without == +with_them and min(with_them.values()) >= 0


def test_a_share_that_makes_no_query_is_refused(coco_folder: CocoFolder) -> None:
    with pytest.raises(InputError, match=r"absent=1e-06 makes no query"):
        _of_coco(coco_folder, absent=1e-6)


def test_compositions_of_one_class_have_absent_queries_from_photographs_without_it(
    tmp_path: Path,
) -> None:
    composed = ComposedImages(images=10)
    pool = _of_folder(tmp_path, source="composed", absent=0.4, composed=composed)
    absent = [region.image.name for region in pool.regions if region.is_absent]
    assert {"5.png", "6.png", "7.png"} >= set(absent) and pool.absent == len(absent) > 0
    assert not pool.skipped["masks_that_mark_nothing"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "lvis"}, r"absent must be 0 where segmentation\.source=lvis"),
        ({"source": "jsonl"}, r"absent must be 0 where segmentation\.source=jsonl"),
        ({"classes_per_mask": 2}, r"absent must be 0 where segmentation\.classes_per_mask"),
    ],
)
def test_sources_that_do_not_tell_what_is_absent_are_refused(
    coco_folder: CocoFolder, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _of_coco(coco_folder, absent=0.1, **settings)


def test_images_that_all_show_every_class_are_refused(coco_folder: CocoFolder) -> None:
    with pytest.raises(InputError, match="each image shows every class"):
        _of_coco(coco_folder, absent=0.3, classes=("dog",))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compositions, half of whose episodes are of one object where the query shows its class."""
    folder = tmp_path_factory.mktemp("absent")
    return _build(
        folder,
        "segmentation.source=composed",
        "segmentation.composed.images=40",
        "segmentation.composed.same_instance=0.5",
        "segmentation.absent=0.25",
        "samples=200",
    )


def _build(folder: Path, *settings: str) -> Path:
    """Shards of the flat data set, which is written into the folder, with one example."""
    write_flat_data_set(folder)
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    common = [
        *toy_tokenizer.recipe_settings(tokenizer),
        f"segmentation.images={folder}/images",
        f"segmentation.annotations={folder}/instances.json",
        "captioning=null",
        "image_size=64",
        "examples=1",
    ]
    recipe = load_recipe(DataRecipe, "demo", [*common, *settings], package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    return folder / "shards"


def test_built_queries_lack_what_their_examples_show(built: Path) -> None:
    shards = ShardSet(str(built))
    file = json.loads((built / "composed/instances.json").read_text())
    name_of = {record["id"]: record["file_name"] for record in file["images"]}
    shown: dict[str, set[str]] = {name: set() for name in name_of.values()}
    for annotation in file["annotations"]:
        shown[name_of[annotation["image_id"]]].add(NAMES[annotation["category_id"]])
    absent = 0
    for number in range(200):
        meta = shards.sample("segmentation", number).meta
        masks = [decode_rle(mask) for mask in meta["masks"]]
        assert masks[0].any(), "an example shows its class"
        if masks[-1].any():
            continue
        absent += 1
        query = meta["sources"][-1]
        assert meta["class"] not in {entry["class"] for entry in meta["objects"]}
        assert query["annotations"] == [] and meta["scale"][-1] == 0
        if "provenance" in query:
            assert query["provenance"], "it tells where the composition comes from"
            assert meta["class"] not in shown[query["image"]]
    assert 25 <= absent <= 65


def test_builds_with_absent_classes_are_verified_and_described(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_shards(built)
    (compared,) = compare_with_sources(built, 60, workers=0)
    assert "segmentation: 60 samples (120 pairs) made anew from the sources" in compared
    told = shard_stats(built)
    absent = sum(
        lacks_class(ShardSet(str(built)).sample("segmentation", number).meta)
        for number in range(200)
    )
    assert absent and f"{absent} of 200 queries of segmentation lack the class" in told
    monkeypatch.setattr(preview, "SAMPLES_PER_TASK", 40)
    preview.write_preview(built, built.parent / "page.html", "cpu")
    page = (built.parent / "page.html").read_text()
    assert "the class is absent" in page and "object 0.0% of the picture" not in page


def test_where_images_are_gone_redrawn_queries_count_as_without_images(tmp_path: Path) -> None:
    """Which images are asked for an absent class depends on which there are."""
    shards = _build(tmp_path, "segmentation.source=coco", "segmentation.absent=0.3", "samples=60")
    (every,) = compare_with_sources(shards, 60, workers=0)
    assert "60 samples" in every
    for name in ("8.png", "9.png"):
        (tmp_path / "images" / name).unlink()
        (line,) = compare_with_sources(shards, 60, workers=0)
        assert "others lack their images" in line
