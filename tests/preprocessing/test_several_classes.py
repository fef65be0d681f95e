"""Which classes of an image make a picture of several classes, on a data set whose masks are
known.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CocoFolder, rectangle

from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks.segmentation import MaskTarget
from preprocessing import several_classes
from preprocessing.image_check import ImageCheck
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import DataRecipe, SegmentationSource
from preprocessing.sources import Reading, read_pools


def _add_birds(content: dict[str, Any]) -> None:
    """In images 1 to 3 a bird of 10 x 10 pixels on the dog."""
    content["categories"].append({"id": 19, "name": "bird"})
    for image in (1, 2, 3):
        number = len(content["annotations"]) + 1
        content["annotations"].append(
            {
                "id": number,
                "image_id": image,
                "category_id": 19,
                "iscrowd": 0,
                "bbox": [20, 25, 10, 10],
                "segmentation": [rectangle(20, 25, 10, 10)],
                "area": 100,
            }
        )


def _read(coco_folder: CocoFolder, workers: int = 0, **settings: Any) -> Pool:
    source = SegmentationSource(
        images=str(coco_folder.images), annotations=str(coco_folder.file), **settings
    )
    recipe = DataRecipe(tokenizer="demo", segmentation=source)
    check = ImageCheck("stop", "stop", coco_folder.folder / "work", 0)
    (pool,) = read_pools(recipe, Reading(80, check, workers, coco_folder.folder))
    return pool


def test_a_region_shows_the_classes_of_an_image_that_have_a_region(
    coco_folder: CocoFolder,
) -> None:
    """Image 4 shows dogs, and a crowd of cats, which makes no region. A bird hides a part of its
    dog.
    """
    coco_folder.write(_add_birds)
    pool = _read(coco_folder, classes_per_mask=3)
    pairs = [(region.image.name, region.category) for region in pool.regions]
    combinations = {"bird + cat", "bird + cat + dog", "bird + dog", "cat + dog"}
    assert len(pairs) == len(set(pairs)) == 12
    assert {name for name, _ in pairs} == {"1.jpg", "2.jpg", "3.jpg"}
    assert {category for _, category in pairs} == combinations
    for region in pool.regions:
        left, _, right, _ = region.crop
        assert right - left == 80
        sizes = {
            name: int(decode_rle({"size": [80, 80], "counts": counts}).sum())
            for name, counts in region.target.masks
        }
        names = region.category.split(" + ")
        assert list(sizes) == names
        assert sizes.get("bird", 100) == 100
        if "dog" in names:
            assert sizes["dog"] == (1100 if "bird" in names else 1200)
        assert region.scale == pytest.approx(sum(sizes.values()) / 80**2)
        of_names = {"bird": 1, "cat": 2, "dog": 1}
        assert len(region.annotations) == sum(of_names[name] for name in names)


def test_processes_combine_as_one_does(
    coco_folder: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_folder.write(_add_birds)
    monkeypatch.setattr(several_classes, "MOST_COMBINATIONS", 2)
    expected = _read(coco_folder, classes_per_mask=3)
    assert len(expected.regions) == 6
    assert expected.skipped["images_with_more_combinations"] == 3
    monkeypatch.setattr(several_classes, "_CHUNK", 1)
    for workers in (0, 2):
        found = _read(coco_folder, workers, classes_per_mask=3)
        assert found.regions == expected.regions
        assert found.skipped == expected.skipped


def test_two_classes_at_most_and_large_ones_alone(coco_folder: CocoFolder) -> None:
    coco_folder.write(_add_birds)
    pool = _read(coco_folder, classes_per_mask=2, least_scale=0.02)
    assert {region.category for region in pool.regions} == {"cat + dog"}


def test_combinations_of_a_crowded_image_are_limited_and_counted(
    coco_folder: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest classes come first."""
    coco_folder.write(_add_birds)
    monkeypatch.setattr(several_classes, "MOST_COMBINATIONS", 1)
    pool = _read(coco_folder, classes_per_mask=2)
    assert [region.category for region in pool.regions] == ["cat + dog"] * 3
    assert pool.skipped["images_with_more_combinations"] == 3


def test_a_combination_that_one_crop_hides_is_taken_from_another() -> None:
    """In the first crop, which is the dog's, the cat is a single pixel."""

    def region(name: str, cat_columns: int) -> PoolRegion:
        dog_HW, cat_HW = np.zeros((2, 80, 80), dtype=bool)
        dog_HW[:, :40], cat_HW[0, 40 : 40 + cat_columns] = True, True
        counts = {
            category: encode_rle(mask_HW)["counts"].encode()
            for category, mask_HW in (("dog", dog_HW), ("cat", cat_HW))
        }
        target = MaskTarget(counts[name], tuple(counts.items()))
        image = ImageFile(Path("1.jpg"), "1.jpg", 80, 80)
        return PoolRegion(image, name, (1,), (0, 0, 80, 80), 0.5, target)

    pool = Pool("segmentation", [region("dog", 1), region("cat", 40)], Counter())
    found = several_classes.combine_classes(pool, most=2, least_scale=0.005, image_size=80)
    assert [region.category for region in found.regions] == ["cat + dog"]
    assert found.skipped["combinations_of_small_scale"] == 0


def test_a_picture_of_many_classes_takes_no_time_for_what_it_leaves_out() -> None:
    """Forty classes have twenty million combinations of up to six."""
    masks = np.eye(40, dtype=bool).repeat(40, axis=0).reshape(40, 40, 40)
    counts = tuple(
        (f"class {number}", encode_rle(mask_HW)["counts"].encode())
        for number, mask_HW in enumerate(masks)
    )
    image = ImageFile(Path("1.jpg"), "1.jpg", 40, 40)
    regions = [
        PoolRegion(image, name, (1,), (0, 0, 40, 40), 0.5, MaskTarget(of_name, counts))
        for name, of_name in counts
    ]
    pool = Pool("segmentation", regions, Counter())
    found = several_classes.combine_classes(pool, most=6, least_scale=0.0, image_size=40)
    assert len(found.regions) == several_classes.MOST_COMBINATIONS
    assert found.skipped["images_with_more_combinations"] == 1
