"""An image caption that names a class seen in the image describes that class's box."""

import json

import pytest

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


def test_a_bbox_that_is_no_box_is_named(coco_folder):
    coco_folder.write(lambda content: content["annotations"][0].update(bbox=[1, 2, 3]))
    with pytest.raises(
        InputError,
        match=r"annotation 1 has the box \[1, 2, 3\]; x, y, width and height in pixels belong",
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
