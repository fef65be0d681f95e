"""COCO instances become one region for each image and class, and every error in the file is
reported.
"""

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_tools
from small_builds import regions_of_classes

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
    assert regions_of_classes(pool) == {"cat": 3, "dog": 6}
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
    # Cats have 20 x 20 and 10 x 10 pixels, dogs 40 x 30.
    pool = read(coco_folder, small_objects=False)
    assert list(regions_of_classes(pool)) == ["dog"]
    assert pool.skipped["small_objects"] == 3


def test_a_mask_may_mark_the_largest_instance_alone(coco_folder):
    """In an episode all masks then mark one object each, and the crop is chosen by it."""
    pool = read(coco_folder, marks="largest_instance")
    cat = next(region for region in pool.regions if region.category == "cat")
    assert cat.annotations == (2,)
    assert cat.crop == (20, 0, 100, 80)
    expected = np.zeros((SIZE, SIZE), dtype=bool)
    expected[10:30, 40:60] = True
    np.testing.assert_array_equal(mask_of(cat), expected)
    assert len(pool.regions) == len(read(coco_folder).regions)


def test_classes_can_be_chosen(coco_folder):
    assert list(regions_of_classes(read(coco_folder, classes=("cat",)))) == ["cat"]
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
    assert regions_of_classes(pool)["dog"] == 5


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
    assert regions_of_classes(pool) == {"cat": 2, "dog": 4}


def annotation(**values):
    return lambda content: content["annotations"][0].update(values)


def image(**values):
    return lambda content: content["images"][0].update(values)


def category(**values):
    return lambda content: content["categories"][0].update(values)


def replaced(kind, first):
    return lambda content: content.update({kind: [first, *content[kind][1:]]})


HUGE = 10**400


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
        (
            annotation(image_id="1"),
            r"is of image '1', .* \(it is text, and the ids there are numbers",
        ),
        (annotation(image_id=None), "annotation 1 is of image None"),
        (annotation(image_id=[1]), r"annotation 1 is of image \[1\]"),
        (annotation(category_id="18"), r"of category '18', .* \(it is text, and the ids"),
        (annotation(category_id={}), "annotation 1 is of category {}"),
        (annotation(id=2), "two of the annotations have the id 2"),
        (image(id=2), "two of the images have the id 2"),
        (category(id=18), "two of the categories have the id 18"),
        (image(id=None), "entry 0 of 'images' has the id None; it must be a record whose id"),
        (image(id=True), "entry 0 of 'images' has the id True"),
        (image(id=1.5), "entry 0 of 'images' has the id 1.5"),
        (image(id=float("nan")), "entry 0 of 'images' has the id nan"),
        (image(id=[1]), r"entry 0 of 'images' has the id \[1\]"),
        (annotation(id={}), "entry 0 of 'annotations' has the id {}"),
        (category(id=None), "entry 0 of 'categories' has the id None"),
        (replaced("images", "1.jpg"), "entry 0 of 'images' is not a record"),
        (replaced("annotations", None), "entry 0 of 'annotations' is not a record"),
        (replaced("categories", "cat"), "entry 0 of 'categories' is not a record"),
        (image(file_name="./2.jpg"), "images 1 and 2 have the same file name '2.jpg'"),
        (category(name=None), "entry 0 of 'categories' has the name None; it must be text"),
        (category(name=" "), "entry 0 of 'categories' has the name ' '"),
        (category(name=7), "entry 0 of 'categories' has the name 7"),
        (
            lambda content: content["categories"][0].pop("name"),
            "entry 0 of 'categories' has the na",
        ),
        (
            lambda content: content.update(categories=[]),
            "has no categories; it must be a COCO instances file",
        ),
        (
            lambda content: content.pop("categories"),
            "has no categories; it must be a COCO instances file",
        ),
        (lambda content: content.update(categories={"1": "dog"}), "'categories' must be a list"),
        (annotation(iscrowd="0"), "annotation 1 has the iscrowd '0'; it must be 0 or 1"),
        (annotation(iscrowd=2), "annotation 1 has the iscrowd 2"),
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
            "annotation 1 has a polygon of 7 numbers; it must be pairs of x and y",
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
        (
            annotation(segmentation=[[1, 2, 3, 4, 5, HUGE]]),
            "annotation 1 has a polygon far outside",
        ),
        (annotation(segmentation=[1, 2, 3, 4, 5, 6]), "segmentation that is not lists of numbers"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, True]]), "segmentation that is not lists"),
        (annotation(segmentation=[[[1, 2], [3, 4], [5, 6]]]), "segmentation that is not lists"),
        (
            annotation(segmentation=[[0, 0, 200, 160] * 12000]),
            "a polygon whose outline is 4800000 pixels long",
        ),
        (annotation(segmentation=None), "annotation 1 has no segmentation"),
        (annotation(segmentation={"size": [80, 100]}), "annotation 1 has no segmentation"),
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
        (annotation(segmentation={"size": [80, 100], "counts": None}), "run lengths do not cover"),
        (annotation(segmentation={"size": [80, 100], "counts": 8000}), "run lengths do not cover"),
        (annotation(segmentation={"size": [80, 100], "counts": {"a": 1}}), "run lengths do not"),
        (
            annotation(segmentation={"size": [80, 100], "counts": [-1, 8001]}),
            "run lengths do not cover",
        ),
        (
            annotation(segmentation={"size": [80, 100], "counts": "o" * 1_000_000}),
            "run lengths do not cover",
        ),
        (annotation(segmentation={"counts": [8000]}), "has an RLE of size None"),
        (image(file_name="../1.jpg"), "image 1 has the file name '../1.jpg'"),
        (image(file_name="a/../../1.jpg"), "image 1 has the file name"),
        (image(file_name="/1.jpg"), "image 1 has the file name '/1.jpg'"),
        (image(file_name=None), "image 1 has the file name None"),
        (image(file_name=""), "image 1 has the file name ''"),
        (image(file_name="1\0.jpg"), "image 1 has the file name"),
        (image(file_name="a" * 400 + ".jpg"), "a.jpg cannot be read: File name too long"),
        (image(width="wide"), "image 1 has the size 'wide' x 80"),
        (image(width="100"), "image 1 has the size '100' x 80"),
        (image(width=None), "image 1 has the size None x 80"),
        (image(width=True), "image 1 has the size True x 80"),
        (image(width=99.5), "image 1 has the size 99.5 x 80"),
        (image(width=-100), "image 1 has the size -100 x 80"),
        (image(width=HUGE), r"image 1 has the size 1000+\.\.\.0+ x 80"),
        (image(width=float("inf")), "image 1 has the size inf x 80"),
        (lambda content: content["images"][0].pop("id"), "entry 0 of 'images' has the id None"),
        (lambda content: content.pop("images"), "not in COCO's format"),
        (lambda content: content.update(annotations={}), "not in COCO's format"),
        (lambda content: content.update(annotations=[]), "instances.json has no annotations"),
    ],
)
def test_a_wrong_record_is_named_in_a_sentence(coco_folder, edit, message):
    coco_folder.write(edit)
    with pytest.raises(InputError, match=message):
        read(coco_folder)


def test_numbers_that_were_written_with_a_point_are_whole_numbers(coco_folder):
    expected = read(coco_folder).regions

    def write_points(content):
        for record in (*content["images"], *content["annotations"]):
            record.update({key: float(v) for key, v in record.items() if isinstance(v, int)})

    coco_folder.write(write_points)
    assert read(coco_folder).regions == expected


@pytest.mark.parametrize("outline", [[], [[]], [[60, 10, 90, 40]]])
def test_a_mask_of_which_an_instance_has_no_outline_is_left_out_and_counted(coco_folder, outline):
    """Its pixels would count as background of its class."""
    cat = next(a for a in coco_folder.content["annotations"] if a["category_id"] == 17)
    coco_folder.write(lambda content: cat.update(segmentation=outline))
    pool = read(coco_folder)
    assert regions_of_classes(pool)["cat"] == 2
    assert {reason: count for reason, count in pool.skipped.items() if count} == {
        "masks_lacking_an_instance": 1,
        "crowds_alone": 1,
    }


def test_an_outline_without_an_area_is_counted_and_the_instances_others_count(coco_folder):
    expected = read(coco_folder).regions
    coco_folder.write(
        lambda content: content["annotations"][0]["segmentation"].append([60, 10, 90, 40])
    )
    pool = read(coco_folder)
    assert pool.regions == expected
    assert pool.skipped["polygons_without_an_area"] == 1


def test_an_instance_without_a_pixel_is_counted(coco_folder):
    expected = read(coco_folder)

    def add_speck(content):
        speck = [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]
        content["annotations"].append(
            {**content["annotations"][0], "id": 99, "segmentation": speck}
        )

    coco_folder.write(add_speck)
    pool = read(coco_folder)
    assert pool.regions == expected.regions
    assert pool.skipped["instances_without_a_pixel"] == 1


def test_a_file_whose_instances_are_all_crowds_names_the_setting_that_takes_them(coco_folder):
    expected = read(coco_folder).regions

    def mark_all(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    coco_folder.write(mark_all)
    with pytest.raises(InputError, match=r"all instances are crowds .*segmentation.crowds=instan"):
        read(coco_folder)
    pool = read(coco_folder, crowds="instances")
    assert [region for region in pool.regions if region.annotations != (11,)] == expected
    assert regions_of_classes(pool)["cat"] == 4, "the crowd of image 4 now counts as an instance"
    assert pool.skipped["crowds_alone"] == 0


def test_names_that_stand_twice_are_one_class_and_unused_categories_do_no_harm(coco_folder):
    """Some tools write the data set's name as a supercategory with the same name as a class."""
    expected = read(coco_folder).regions
    coco_folder.write(
        lambda content: content["categories"].extend(
            [{"id": 1, "name": "dog"}, {"id": 2, "name": "horse"}]
        )
    )
    assert read(coco_folder).regions == expected
    coco_folder.write(lambda content: content["annotations"][0].update(category_id=1))
    assert read(coco_folder).regions == expected


def test_classes_that_are_asked_for_and_never_seen_are_counted(coco_folder):
    coco_folder.write(lambda content: content["categories"].append({"id": 1, "name": "horse"}))
    assert read(coco_folder, classes=("dog", "horse")).skipped["classes_without_a_region"] == 1


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("1.JPG", "1.jpg"),
        ("photos/1.jpg", "1.jpg"),
        ("photos\\1.jpg", "1.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("a%20dog.jpg", "a dog.jpg"),
        ("part/1.JPG", "part/1.jpg"),
    ],
)
def test_a_missing_image_that_is_there_under_another_spelling_is_pointed_out(
    coco_folder, name, there
):
    (coco_folder.images / "part").mkdir()
    (coco_folder.images / "1.jpg").rename(coco_folder.images / there)
    coco_folder.write(image(file_name=name))
    with pytest.raises(InputError, match=r"1 of 6 annotated images are missing") as error:
        read(coco_folder)
    assert f"(there is a file {coco_folder.images / there})" in str(error.value)


def test_what_is_no_file_is_missing(coco_folder):
    image = coco_folder.images / "1.jpg"
    image.unlink()
    for make in (lambda: image.mkdir(), lambda: image.symlink_to("nowhere.jpg")):
        make()
        with pytest.raises(InputError, match=r"first is 1.jpg; add them"):
            read(coco_folder)
        image.rmdir() if image.is_dir() else image.unlink()


def test_a_folder_of_images_that_is_none_is_named_even_where_missing_images_are_skipped(
    coco_folder, tmp_path
):
    images = coco_folder.images
    coco_folder.images = tmp_path / "typo"
    with pytest.raises(InputError, match=r"The folder of images .*typo does not exist"):
        read(coco_folder, missing_images="skip")
    coco_folder.images = Path("https://example.org/images")
    with pytest.raises(
        InputError, match=r"images does not exist; images are read from this machine"
    ):
        read(coco_folder, missing_images="skip")
    coco_folder.images = coco_folder.file
    with pytest.raises(InputError, match=r"instances.json is not a folder"):
        read(coco_folder, missing_images="skip")
    coco_folder.images = images
    coco_folder.file = images
    with pytest.raises(InputError, match="images is not a file; it must be one"):
        read(coco_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"images": [', r"line 1, column \d+ is not valid JSON"),
        (b"{}{}", "is not valid JSON: Extra data"),
        (b"[]", "is not in COCO's format"),
        (b"null", "is not in COCO's format"),
        (
            b'{"images": [], "annotations": [1], "annotations": [2]}',
            "the key 'annotations' occurs twice in one record",
        ),
        (b"\xff compressed", "it is not text in UTF-8"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "a number with too many digits"),
        (b"[" * 100_000, "its JSON is nested too deep"),
    ],
)
def test_a_file_that_is_no_coco_file_is_named(coco_folder, content, message):
    coco_folder.file.write_bytes(content)
    with pytest.raises(InputError, match=rf"instances.json.* {message}"):
        read(coco_folder)


def test_half_a_character_in_a_name_is_replaced(coco_folder):
    coco_folder.write(category(name="c\ud83dat"))
    assert "c\ufffdat" in regions_of_classes(read(coco_folder))


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
