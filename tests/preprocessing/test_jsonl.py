"""Lines of JSON become regions of both tasks, and every error names its line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CocoFolder
from PIL import Image

from icl_moe.errors import InputError
from preprocessing.coco import read_segmentation as read_coco
from preprocessing.image_check import ImageCheck
from preprocessing.jsonl import read_captioning, read_segmentation
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource, SegmentationSource

SIZE = 80


def lines_of(folder: CocoFolder) -> list[dict[str, Any]]:
    """The annotations of a COCO file that are no crowds, each with a caption, as lines."""
    names = {category["id"]: category["name"] for category in folder.content["categories"]}
    return [
        {
            "image": f"{annotation['image_id']}.jpg",
            "class": names[annotation["category_id"]],
            "caption": f"A {names[annotation['category_id']]} of image {annotation['image_id']}.",
            "box": annotation["bbox"],
            "mask": annotation["segmentation"],
        }
        for annotation in folder.content["annotations"]
        if not annotation["iscrowd"]
    ]


def write(folder: CocoFolder, lines: list[Any]) -> Path:
    file = folder.folder / "lines.jsonl"
    text = "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(f"\ufeff{text}\n", encoding="utf-8")
    return file


def masks(folder: CocoFolder, lines: list[Any], **settings: Any) -> Pool:
    file = write(folder, lines)
    source = SegmentationSource(
        source="jsonl", images=str(folder.images), annotations=str(file), **settings
    )
    check = ImageCheck("skip", "stop", folder.folder / "notes")
    return read_segmentation(source, SIZE, check, workers=2)


def captions(folder: CocoFolder, lines: list[Any], **settings: Any) -> Pool:
    file = write(folder, lines)
    source = CaptioningSource(
        source="jsonl",
        images=str(folder.images),
        annotations=str(file),
        **{"min_descriptions": 0, **settings},
    )
    return read_captioning(source, ImageCheck("skip", "stop", folder.folder / "notes"))


def seen(pool: Pool) -> set[Any]:
    return {(r.image.name, r.category, r.crop, r.scale, r.target.counts) for r in pool.regions}


def expected(folder: CocoFolder) -> set[Any]:
    source = SegmentationSource(images=str(folder.images), annotations=str(folder.file))
    return seen(read_coco(source, SIZE, ImageCheck("stop", "stop", folder.folder / "n"), 0))


def as_files(folder: CocoFolder, lines: list[dict[str, Any]]) -> None:
    """The records with mask files instead of polygons."""
    for number, line in enumerate(lines):
        x, y, w, h = line["box"]
        levels = np.zeros((80, 100), dtype=np.uint8)
        levels[y : y + h, x : x + w] = 255
        Image.fromarray(levels).save(folder.folder / f"{number}.png")
        line["mask"] = f"{number}.png"


def test_all_lines_of_an_image_and_a_class_make_its_mask(coco_folder):
    assert seen(masks(coco_folder, lines_of(coco_folder))) == expected(coco_folder)


@pytest.mark.parametrize("form", ["file", "flat polygon", "runs", "category"])
def test_a_mask_may_have_several_forms(coco_folder, form):
    lines, settings = lines_of(coco_folder), {}
    if form == "file":
        as_files(coco_folder, lines)
        settings = {"masks": str(coco_folder.folder)}
    for line in lines:
        if form == "flat polygon":
            (line["mask"],) = line["mask"]
        elif form == "category":
            line["category"] = line.pop("class")
        elif form == "runs":
            x, y, w, h = line["box"]
            whole = np.zeros((80, 100), dtype=bool)
            whole[y : y + h, x : x + w] = True
            starts = np.flatnonzero(np.diff(np.concatenate([[0], whole.ravel(order="F"), [2]])))
            line["mask"] = {"size": [80, 100], "counts": np.diff([0, *starts]).tolist()}
    assert seen(masks(coco_folder, lines, **settings)) == expected(coco_folder)


def test_captions_have_the_box_of_their_line_or_of_its_mask(coco_folder):
    lines = lines_of(coco_folder)
    with_boxes = captions(coco_folder, lines)
    assert len(with_boxes.regions) == 12
    dog = with_boxes.regions[0]
    assert (dog.category, dog.target.caption) == ("dog", "A dog of image 1")
    assert dog.target.box == (0.1, 0.25, 0.5, 0.625)
    as_files(coco_folder, lines)
    for line in lines:
        del line["box"]
    without = captions(coco_folder, lines, masks=str(coco_folder.folder))
    assert [r.target for r in without.regions] == [r.target for r in with_boxes.regions]


def test_captions_of_one_box_are_its_references_and_styles_stay_apart(coco_folder):
    line = lines_of(coco_folder)[0]
    pool = captions(
        coco_folder,
        [
            line,
            {**line, "caption": "Woof", "style": None},
            {**line, "caption": "below", "style": "place"},
        ],
    )
    assert [region.style for region in pool.regions] == ["", "", "place"]
    assert pool.regions[0].target.references == ("A dog of image 1", "Woof")
    assert pool.regions[2].target.references == ("below",)


def test_what_a_line_lacks_for_a_task_is_counted(coco_folder):
    first, second, *rest = lines_of(coco_folder)
    del first["mask"], second["caption"]
    lines = [first, second, *rest]
    assert masks(coco_folder, lines).skipped["lines_without_a_mask"] == 1
    assert captions(coco_folder, lines).skipped["lines_without_a_caption"] == 1


def test_boxes_past_the_edge_are_clipped_and_counted(coco_folder):
    lines = lines_of(coco_folder)
    lines[0]["box"] = [90, 20, 40, 30]
    lines[1]["box"] = [90, 20, 0, 30]
    pool = captions(coco_folder, lines)
    assert pool.skipped["boxes_clipped_to_the_image"] == 1
    assert pool.skipped["empty_boxes"] == 1
    assert pool.regions[0].target.box == (0.9, 0.25, 1.0, 0.625)


def test_images_that_do_not_exist_are_missing(coco_folder):
    lines = lines_of(coco_folder)
    lines[0]["image"] = "elsewhere.jpg"
    assert masks(coco_folder, lines).skipped["missing_images"] == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"image": "../1.jpg"}, r"line 3 has the file name '../1.jpg'"),
        ({"image": None}, r"line 3 has the file name None"),
        ({"class": " "}, r"line 3 has the class ' '; it must be text"),
        ({"class": None}, r"line 3 has the class None"),
        ({"caption": 7}, r"line 3: caption and style must be text"),
        ({"mask": "../0.png"}, r"line 3 has the mask '../0.png'; it must be a path inside"),
        ({"mask": "none.png"}, r"line 3 has a mask that cannot be read: .*none.png does not exist"),
        ({"mask": "n" * 300}, r"line 3 has a mask that cannot be read: .* File name too long"),
        ({"mask": [1, 2, 3, 4, 5, "6"]}, r"annotation 3 has a segmentation that is not lists"),
        ({"mask": 5}, r"line 3 has the mask 5; it must be a file, polygons or run lengths"),
        ({"width": -1, "height": 80}, r"line 3 has the size -1 x 80"),
        ({"width": 10**400, "height": 80}, r"line 3 has the size"),
        ({"width": float("nan"), "height": 80}, r"line 3 has the size nan x 80"),
    ],
)
def test_a_wrong_line_is_named_in_a_sentence(coco_folder, edit, message):
    lines = lines_of(coco_folder)
    lines[1].update(image="7.jpg" if "width" in edit else lines[1]["image"])
    lines[1].update(edit)
    with pytest.raises(InputError, match=message):
        masks(coco_folder, lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"lines.jsonl, line 3 is not valid JSON: .*each line must hold one object"),
        ("[1]", r"lines.jsonl, line 3 is not an object"),
        ('{"image": "1.jpg", "image": "2.jpg"}', "line 3 contradicts itself: the key 'image'"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_ends_in_a_sentence(coco_folder, line, message):
    with pytest.raises(InputError, match=message):
        masks(coco_folder, [lines_of(coco_folder)[0], line])


@pytest.mark.parametrize(
    ("box", "message"),
    [(None, "neither a box nor a mask"), ([1, 2, 3], "has the box"), ([1, 2, 3, 1e99], "the box")],
)
def test_a_caption_needs_a_place(coco_folder, box, message):
    line = {**lines_of(coco_folder)[0], "box": box, "mask": None}
    with pytest.raises(InputError, match=f"line 1 .*{message}"):
        captions(coco_folder, [line])
