"""An image caption that names a class seen in the image describes that class's box."""

import json

import pytest
from small_builds import regions_of_classes

from icl_moe.errors import InputError
from preprocessing.classes import COCO_CLASSES, ClassFinder
from preprocessing.coco_captions import read_captioning
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource


def read(folder, **settings) -> Pool:
    settings = {"min_descriptions": 0} | settings
    paths = {"images": folder.images, "annotations": folder.captions_file, "instances": folder.file}
    return read_captioning(
        CaptioningSource(
            "coco_captions", **{key: str(path) for key, path in paths.items()}, **settings
        ),
        ImageCheck("stop", "stop", folder.folder / "notes"),
    )


def test_a_caption_belongs_to_each_seen_class_that_it_names(coco_folder):
    pool = read(coco_folder)
    first = [
        (region.category, region.target.caption)
        for region in pool.regions
        if region.image.name == "1.jpg"
    ]
    assert first == [
        ("dog", "A dog on grass"),
        ("cat", "Two cats and a dog"),
        ("dog", "Two cats and a dog"),
    ]
    assert pool.regions[0].target.references == ("A dog on grass", "Two cats and a dog")
    assert {region.category for region in pool.regions if region.image.name == "5.jpg"} == {"dog"}
    assert pool.skipped["captions_without_a_seen_class"] == 6


def test_a_singular_takes_the_largest_instances_box_and_a_plural_the_box_around_all(coco_folder):
    def boxes() -> dict[str, tuple[float, ...]]:
        return {
            region.category: region.target.box
            for region in read(coco_folder).regions
            if region.image.name == "1.jpg"
        }

    assert boxes()["cat"] == pytest.approx((0.6, 0.125, 0.9, 0.75))
    assert boxes()["dog"] == pytest.approx((0.1, 0.25, 0.5, 0.625))
    captions = json.loads(coco_folder.captions_file.read_text())
    captions["annotations"][1]["caption"] = "a cat"
    coco_folder.captions_file.write_text(json.dumps(captions))
    assert boxes()["cat"] == pytest.approx((0.6, 0.125, 0.8, 0.375))


def test_captions_of_an_image_without_instances_file_entry_are_refused(coco_folder):
    def drop_image_six(content):
        content["images"] = content["images"][:5]
        content["annotations"] = [
            annotation for annotation in content["annotations"] if annotation["image_id"] != 6
        ]

    coco_folder.write(drop_image_six)
    with pytest.raises(InputError, match="image 6 has captions but is not among the images of"):
        read(coco_folder)


def captions(folder, edit):
    content = json.loads(folder.captions_file.read_text())
    edit(content)
    folder.captions_file.write_text(json.dumps(content))


def test_files_that_were_exchanged_are_named(coco_folder):
    files = coco_folder.captions_file, coco_folder.file
    coco_folder.captions_file = coco_folder.file
    with pytest.raises(
        InputError, match=r"instances.json: annotation 1 has no text as its caption"
    ):
        read(coco_folder)
    coco_folder.captions_file, coco_folder.file = files[::-1]
    with pytest.raises(
        InputError, match=r"instances.json: annotation 1 has no text as its caption"
    ):
        read(coco_folder)
    coco_folder.captions_file = coco_folder.file = files[0]
    with pytest.raises(
        InputError, match=r"captions.json has no categories; it must be a COCO instances file"
    ):
        read(coco_folder)


@pytest.mark.parametrize("caption", [7, ["a dog"], True])
def test_a_caption_that_is_no_text_is_named(coco_folder, caption):
    captions(coco_folder, lambda content: content["annotations"][0].update(caption=caption))
    with pytest.raises(InputError, match="annotation 1 has no text as its caption"):
        read(coco_folder)


def test_a_caption_that_was_not_given_is_counted(coco_folder):
    captions(coco_folder, lambda content: content["annotations"][0].update(caption=None))
    pool = read(coco_folder)
    assert pool.skipped["captions_without_a_seen_class"] == 7
    assert len(pool.regions) == 15


def test_captions_of_images_with_ids_as_text_are_told_apart(coco_folder):
    def write_text(content):
        for record in content["images"]:
            record["id"] = str(record["id"])
        for record in content["annotations"]:
            record["image_id"] = str(record["image_id"])

    captions(coco_folder, write_text)
    with pytest.raises(
        InputError, match=r"image '1' has captions but .* \(it is text, and the ids"
    ):
        read(coco_folder)


def test_half_an_emoji_is_replaced(coco_folder):
    captions(
        coco_folder, lambda content: content["annotations"][0].update(caption="a dog \ud83d, seen")
    )
    assert read(coco_folder).regions[0].target.caption == "a dog \ufffd, seen"


@pytest.mark.parametrize("bbox", [[50, 50, -40, -30], [50, 20, -40, 30], [10, 50, 40, -30]])
def test_a_box_of_negative_size_is_left_out_and_counted(coco_folder, bbox):
    coco_folder.write(lambda content: content["annotations"][0].update(bbox=bbox))
    pool = read(coco_folder)
    assert pool.skipped["boxes_of_negative_size"] == 1
    assert [region.category for region in pool.regions if region.image.name == "1.jpg"] == ["cat"]
    assert all(r.target.box[0] < r.target.box[2] for r in pool.regions)
    assert all(r.target.box[1] < r.target.box[3] for r in pool.regions)


@pytest.mark.parametrize("bbox", [[500, 20, 40, 30], [10, 20, 0, 30], [-90, 20, 40, 30]])
def test_a_box_without_an_area_in_the_image_makes_no_region(coco_folder, bbox):
    coco_folder.write(lambda content: content["annotations"][0].update(bbox=bbox))
    pool = read(coco_folder)
    assert pool.skipped["empty_boxes"] == 2
    assert [region.category for region in pool.regions if region.image.name == "1.jpg"] == ["cat"]


def test_classes_are_those_of_the_instances_file(coco_folder):
    assert set(regions_of_classes(read(coco_folder, classes=("cat",)))) == {"cat"}
    with pytest.raises(InputError, match=r"captioning.classes names 'cta', which is not among the"):
        read(coco_folder, classes=("cat", "cta"))


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        {},
        "1 2 3 4",
        [1, 2, 3, None],
        [1, 2, 3, "4"],
        [1, 2, 3, True],
        [1, 2, float("nan"), 4],
        [1, 2, float("inf"), 4],
        [1, 2, 10**400, 4],
        [1, 2, 3, 4, 5],
    ],
)
def test_a_bbox_that_is_not_four_numbers_is_named(coco_folder, bbox):
    coco_folder.write(lambda content: content["annotations"][0].update(bbox=bbox))
    with pytest.raises(
        InputError, match=r"annotation 1 has the box .*; it must be x, y, width and height in p"
    ):
        read(coco_folder)


def test_a_bbox_that_is_no_box_is_named(coco_folder):
    coco_folder.write(lambda content: content["annotations"][0].update(bbox=[1, 2, 3]))
    with pytest.raises(
        InputError,
        match=r"annotation 1 has the box \[1, 2, 3\]; it must be x, y, width and height in pixels",
    ):
        read(coco_folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Three women and a boy", {"person": True}),
        ("a hot dog", {"hot dog": False}),
        ("a dog beside a hot dog", {"dog": False, "hot dog": False}),
        ("A TEDDY BEAR", {"teddy bear": False}),
        ("two buses, knives and mice", {"bus": True, "knife": True, "mouse": True}),
        ("a pair of scissors", {"scissors": False}),
        ("catalogue of carpets", {}),
        ("a man on skis", {"person": False, "skis": True}),
    ],
)
def test_class_names_are_found_as_whole_words_longest_first(text, expected):
    assert ClassFinder(COCO_CLASSES).find(text) == expected


def test_there_are_cocos_eighty_classes():
    assert len(set(COCO_CLASSES)) == 80
    assert "hair drier" in COCO_CLASSES
