"""COCO instances become one region for each image and class, and nothing wrong in the file
passes.
"""

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from icl_moe.errors import InputError
from icl_moe.rle import decode_rle, encode_rle
from preprocessing.coco import read_segmentation
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import SegmentationSource

SIZE = 80


def read(folder, missing_images="stop", workers=0, **settings) -> Pool:
    source = SegmentationSource(
        "coco", images=str(folder.images), annotations=str(folder.file), **settings
    )
    check = ImageCheck(missing_images, "stop", folder.folder / "notes", workers)
    return read_segmentation(source, SIZE, check, workers)


def mask_of(region) -> np.ndarray:
    return decode_rle({"size": [SIZE, SIZE], "counts": region.target.counts})


def test_a_region_is_an_image_and_a_class_with_the_union_of_its_instances(coco_folder):
    pool = read(coco_folder)
    assert {name: len(numbers) for name, numbers in pool.by_class().items()} == {"cat": 3, "dog": 6}
    cat = next(region for region in pool.regions if region.category == "cat")
    assert cat.annotations == (2, 3)
    # The crop is the largest square, 80 x 80, centred on x = 75 and moved into the image: x from 20
    # to 100.
    assert cat.crop == (20, 0, 100, 80)
    expected = np.zeros((SIZE, SIZE), dtype=bool)
    expected[10:30, 40:60] = True
    expected[50:60, 60:70] = True
    np.testing.assert_array_equal(mask_of(cat), expected)
    assert cat.scale == pytest.approx(expected.mean())


def test_the_readers_result_does_not_depend_on_the_number_of_workers(coco_folder):
    assert read(coco_folder, workers=0).regions == read(coco_folder, workers=3).regions


def test_a_crowd_makes_no_region_alone_but_joins_the_mask_of_its_class(coco_folder):
    assert read(coco_folder).skipped["crowds_alone"] == 1

    def add_cat_beside_the_crowd(content):
        content["annotations"].append(
            {
                "id": 99,
                "image_id": 4,
                "category_id": 17,
                "iscrowd": 0,
                "segmentation": [[20, 20, 30, 20, 30, 30, 20, 30]],
            }
        )

    coco_folder.write(add_cat_beside_the_crowd)
    pool = read(coco_folder)
    region = next(region for region in pool.regions if 99 in region.annotations)
    assert pool.skipped["crowds_alone"] == 0
    mask_HW = mask_of(region)
    assert mask_HW[:10, 0].all()
    assert mask_HW.sum() == 110


def test_uncompressed_and_compressed_rle_give_the_mask_of_the_polygon(coco_folder):
    expected = read(coco_folder).regions
    rle = rle_tools.merge(
        rle_tools.frPyObjects(coco_folder.content["annotations"][0]["segmentation"], 80, 100)
    )
    mask = rle_tools.decode(rle)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F").astype(int), [-1]])))
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    for counts in (runs, rle["counts"].decode()):
        coco_folder.write(
            lambda content, counts=counts: content["annotations"][0].update(
                segmentation={"size": [80, 100], "counts": counts}
            )
        )
        assert read(coco_folder).regions == expected


def test_small_objects_are_left_out_on_demand(coco_folder):
    pool = read(
        coco_folder, small_objects=False
    )  # cats have 20 x 20 and 10 x 10 pixels, dogs 40 x 30
    assert list(pool.by_class()) == ["dog"]
    assert pool.skipped["small_objects"] == 3


def test_classes_can_be_chosen(coco_folder):
    assert list(read(coco_folder, classes=("cat",)).by_class()) == ["cat"]
    with pytest.raises(InputError, match=r"segmentation.classes names 'horse'"):
        read(coco_folder, classes=("horse",))


def test_a_mask_that_vanishes_at_the_image_size_makes_no_region(coco_folder):
    coco_folder.write(
        lambda content: content["annotations"][0].update(
            segmentation=[[10, 10, 10.2, 10, 10.2, 10.2]]
        )
    )
    pool = read(coco_folder)
    assert pool.skipped["empty_masks"] == 1
    assert len(pool.by_class()["dog"]) == 5


def test_missing_images_stop_with_their_count_or_are_skipped_and_counted(coco_folder):
    for number in (1, 5):
        (coco_folder.images / f"{number}.jpg").unlink()
    with pytest.raises(
        InputError,
        match=r"2 of 6 annotated images are missing .* first is 1.jpg; .*missing_images=skip",
    ):
        read(coco_folder)
    pool = read(coco_folder, missing_images="skip")
    assert pool.skipped["missing_images"] == 2
    assert {name: len(numbers) for name, numbers in pool.by_class().items()} == {"cat": 2, "dog": 4}


def annotation(**values):
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            annotation(image_id=77),
            "annotation 1 is of image 77, which is not among the file's images",
        ),
        (
            annotation(category_id=5),
            "annotation 1 is of category 5, which is not among the file's categories",
        ),
        (annotation(id=2), "two of the annotations have the id 2"),
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
            "annotation 1 has a polygon of 7 numbers; pairs of x and y belong there",
        ),
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, "6"]]),
            "annotation 1 has a segmentation that is not lists of numbers",
        ),
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, 1e9]]),
            "annotation 1 has a polygon far outside its image of 100 x 80",
        ),
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
            "annotation 1 has a polygon far outside",
        ),
        (annotation(segmentation=None), "annotation 1 has no segmentation"),
        (
            annotation(segmentation={"size": [100, 80], "counts": [8000]}),
            r"has an RLE of size \[100, 80\]; its image has height 80",
        ),
        (
            annotation(segmentation={"size": [80, 100], "counts": [10, 20]}),
            "run lengths do not cover",
        ),
        (annotation(segmentation={"size": [80, 100], "counts": "04"}), "run lengths do not cover"),
        (annotation(segmentation={"size": [80, 100], "counts": "~~~"}), "run lengths do not cover"),
        (
            lambda content: content["images"][0].update(file_name="../1.jpg"),
            "image 1 has the file name '../1.jpg'",
        ),
        (
            lambda content: content["images"][0].update(width="wide"),
            "image 1 has the size 'wide' x 80",
        ),
        (lambda content: content["images"][0].pop("id"), "entry 0 of 'images' has the id None"),
        (lambda content: content.pop("images"), "not in COCO's format"),
    ],
)
def test_a_wrong_record_is_named_in_a_sentence(coco_folder, edit, message):
    coco_folder.write(edit)
    with pytest.raises(InputError, match=message):
        read(coco_folder)


def test_a_file_that_is_missing_or_no_json_is_named_in_a_sentence(coco_folder):
    text = coco_folder.file.read_text()
    coco_folder.file.write_text(text[:-20] + "]]")
    with pytest.raises(InputError, match=r"instances.json, line 1, column \d+ is not valid JSON"):
        read(coco_folder)
    coco_folder.file.unlink()
    with pytest.raises(InputError, match=r"instances.json does not exist"):
        read(coco_folder)


def test_masks_survive_their_run_lengths_and_wrong_run_lengths_do_not_pass():
    mask = np.random.default_rng(0).random((13, 7)) < 0.3
    rle = encode_rle(mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    with pytest.raises(InputError, match="do not cover the 13 x 8 pixels"):
        decode_rle({**rle, "size": [13, 8]})
