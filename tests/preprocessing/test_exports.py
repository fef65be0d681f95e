"""COCO files as labelling tools export them, each written here with the tool's own habits, make the
regions that the plain file makes.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizer
from pycocotools import mask as rle_tools
from small_builds import regions_of_classes

from icl_moe.errors import InputError
from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.coco import read_segmentation
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import DataRecipe, SegmentationSource

Content = dict[str, Any]


def read(folder, **settings: object) -> Pool:
    source = SegmentationSource(images=str(folder.images), annotations=str(folder.file), **settings)
    check = ImageCheck("stop", "stop", folder.folder / "notes")
    return read_segmentation(source, 80, check, workers=0)


def seen(pool: Pool) -> dict[tuple[str, str], tuple[object, ...]]:
    """What a pool says of each photograph and class, whatever ids and names the tool chose."""
    return {
        (re.findall(r"(\d)[._]jpg", region.image.name)[0], region.category): (
            region.crop,
            region.scale,
            region.target,
        )
        for region in pool.regions
    }


def cvat(folder, content: Content) -> None:
    """CVAT 2: attributes, licences without content, brush masks as uncompressed run lengths with
    iscrowd=1, and numbers as floats.
    """
    content["licenses"], content["info"] = [{"name": "", "id": 0, "url": ""}], {"version": ""}
    for image in content["images"]:
        image.update(license=0, flickr_url="", coco_url="", date_captured=0)
    for category in content["categories"]:
        category["supercategory"] = ""
    for annotation in content["annotations"]:
        annotation["attributes"] = {"occluded": False, "rotation": 0.0}
        annotation["bbox"] = list(map(float, annotation["bbox"]))
        annotation["area"] = float(annotation["area"])
        brushed = annotation["id"] % 2 == 0
        if brushed:
            annotation["segmentation"] = runs(annotation["segmentation"])
        annotation["iscrowd"] = float(brushed)


def runs(segmentation: Any) -> Content:
    """Polygons as COCO's uncompressed run lengths."""
    if isinstance(segmentation, dict):
        return segmentation
    mask = rle_tools.decode(rle_tools.merge(rle_tools.frPyObjects(segmentation, 80, 100)))
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]])
    starts = np.flatnonzero(np.diff(pixels.astype(int)))
    return {"size": [80, 100], "counts": np.diff([0, *starts.tolist()]).tolist()}


def label_studio(place: str) -> Callable[[Any, Content], None]:
    """Label Studio: ids from 0, `ignore`, and file names in its own storage."""

    def export(folder, content: Content) -> None:
        numbers = {category["id"]: n for n, category in enumerate(content["categories"])}
        for category in content["categories"]:
            category["id"] = numbers[category["id"]]
        for image in content["images"]:
            name = f"cb0618f{image['id']}-{image['file_name']}"
            image["id"] -= 1
            (folder.images / image["file_name"]).rename(folder.images / name)
            image["file_name"] = place + name
        for annotation in content["annotations"]:
            annotation["id"] -= 1
            annotation["image_id"] -= 1
            annotation["category_id"] = numbers[annotation["category_id"]]
            annotation["ignore"] = 0

    return export


def uploaded_from_the_images(folder, content: Content) -> None:
    """Label Studio, but the images are those that were uploaded, without its digits."""
    for image in content["images"]:
        image["file_name"] = f"images\\1/90fbb0c{image['id']}-{image['file_name']}"


def roboflow(folder, content: Content) -> None:
    """Roboflow: a category 0 for the project, here of the name of a class, ids from 0, and names
    with digits.
    """
    content["categories"] = [
        {"id": 0, "name": "dog", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "dog"},
        {"id": 2, "name": "dog", "supercategory": "dog"},
    ]
    for image in content["images"]:
        name = f"p{image['id']}_jpg.rf.{'0123456789abcdef' * 2}.jpg"
        (folder.images / image["file_name"]).rename(folder.images / name)
        image.update(file_name=name, extra={"name": image["file_name"]}, license=1)
    for annotation in content["annotations"]:
        annotation["id"] -= 1
        annotation["category_id"] -= 16  # 17 is the cat, 18 the dog


def labelme(folder, content: Content) -> None:
    """The script of labelme: nulls, `type`, an empty supercategory, a background of id 0, and files
    in JPEGImages.
    """
    content["type"] = "instances"
    content["categories"].insert(0, {"supercategory": None, "id": 0, "name": "_background_"})
    (folder.images / "JPEGImages").mkdir()
    for image in content["images"]:
        plain = image["file_name"]
        (folder.images / plain).rename(folder.images / "JPEGImages" / plain)
        image.update(file_name=f"JPEGImages\\{plain}", license=0, url=None, date_captured=None)


def fiftyone(folder, content: Content) -> None:
    """FiftyOne: null supercategories, more attributes, no area, and iscrowd for crowds alone."""
    for category in content["categories"]:
        category["supercategory"] = None
    for annotation in content["annotations"]:
        annotation.update(score=0.9, tags=[], attributes={"IsOccluded": True})
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]


def compressed(folder, content: Content) -> None:
    """Detectron2 and SAM's tools: compressed run lengths as text; iscrowd null as in pylabel."""
    for annotation in content["annotations"]:
        if not isinstance(annotation["segmentation"], dict):
            rle = rle_tools.merge(rle_tools.frPyObjects(annotation["segmentation"], 80, 100))
            annotation["segmentation"] = {"size": [80, 100], "counts": rle["counts"].decode()}
            annotation["iscrowd"] = None


def ids_as_text(folder, content: Content) -> None:
    for kind in ("images", "annotations", "categories"):
        for record in content[kind]:
            for key in ("id", "image_id", "category_id"):
                if key in record:
                    record[key] = f"{record[key]}"


def paths_from_the_file(folder, content: Content) -> None:
    for image in content["images"]:
        image["file_name"] = f"{folder.images.name}/{image['file_name']}"


EXPORTS = {
    "cvat": cvat,
    "label studio": label_studio("images/"),
    "label studio on Windows": label_studio("images\\"),
    "label studio 1.16": label_studio("..\\..\\label-studio\\label-studio\\media\\upload\\4\\"),
    "label studio, its storage": label_studio("/data/upload/1/"),
    "label studio, local files": label_studio("/data/local-files/?d=photos/"),
    "label studio, URL": label_studio("https://label.example.org/data/upload/7/"),
    "label studio, own images": uploaded_from_the_images,
    "roboflow": roboflow,
    "labelme": labelme,
    "fiftyone": fiftyone,
    "run lengths": compressed,
    "ids as text": ids_as_text,
    "paths from the file": paths_from_the_file,
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_the_export_of_a_tool_makes_the_regions_of_the_plain_file(coco_folder, tool):
    crowds = {"crowds": "instances"} if tool == "cvat" else {}
    expected = seen(read(coco_folder, **crowds))
    coco_folder.write(lambda content: EXPORTS[tool](coco_folder, content))
    assert seen(read(coco_folder, **crowds)) == expected
    assert len(expected) >= 9


def test_masks_that_cvat_marks_as_crowds_are_named(coco_folder):
    def brush(content: Content) -> None:
        for annotation in content["annotations"]:
            annotation.update(iscrowd=1, segmentation=runs(annotation["segmentation"]))

    coco_folder.write(brush)
    with pytest.raises(InputError, match=r"all instances are crowds.*segmentation.crowds=inst"):
        read(coco_folder)


def test_augmented_copies_of_an_image_are_one_photograph(coco_folder):
    """Roboflow exports several copies of an image; one would be an example for the other."""

    def augment(content: Content) -> None:
        for image in content["images"]:
            name = f"{(image['id'] + 1) // 2}_jpg.rf.{image['id']:032x}.jpg"
            (coco_folder.images / image["file_name"]).rename(coco_folder.images / name)
            image["file_name"] = name

    coco_folder.write(augment)
    pool = read(coco_folder)
    assert {region.photograph for region in pool.regions} == {"1_jpg", "2_jpg", "3_jpg"}
    pool.drop_small_classes(images=3)
    assert list(regions_of_classes(pool)) == ["dog"]  # cats are in two photographs


def test_names_that_mean_one_file_are_refused(coco_folder):
    def both(content: Content) -> None:
        content["images"][1]["file_name"] = "images/1.jpg"

    coco_folder.write(both)
    with pytest.raises(InputError, match=r"the images 1 and 2 have the same file name '1.jpg'"):
        read(coco_folder)


OUTSIDE = {
    "above": "../secret.jpg",
    "above, with backslashes": "..\\secret.jpg",
    "storage of Label Studio": "../upload/1/../../../secret.jpg",
    "quoted": "https://host/upload/1/..%2F..%2Fsecret.jpg",
    "absolute": "/secret.jpg",
    "link": "link.jpg",
    "folder that is a link": "links/secret.jpg",
    "NUL": "1.jpg\0",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_name_never_leads_out_of_the_folder(coco_folder, name):
    secret = coco_folder.folder / "secret.jpg"
    secret.write_bytes((coco_folder.images / "1.jpg").read_bytes())
    (coco_folder.images / "link.jpg").symlink_to(secret)
    (coco_folder.images / "links").symlink_to(coco_folder.folder)
    coco_folder.write(lambda content: content["images"][0].update(file_name=OUTSIDE[name]))
    with pytest.raises(InputError, match=r"path inside|missing from|leads out of"):
        read(coco_folder)


def test_links_within_the_folder_are_followed(coco_folder):
    (coco_folder.images / "link.jpg").symlink_to("1.jpg")
    coco_folder.write(lambda content: content["images"][0].update(file_name="link.jpg"))
    assert "link.jpg" in {region.image.name for region in read(coco_folder).regions}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return toy_tokenizer.save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("tool", ["cvat", "label studio 1.16", "roboflow", "labelme", "fiftyone"])
def test_an_export_builds_into_shards(coco_folder, tokenizer, tmp_path, tool):
    export = copy.deepcopy(coco_folder.content)
    EXPORTS[tool](coco_folder, export)
    coco_folder.file.write_text(json.dumps(export))
    recipe = load_recipe(
        DataRecipe,
        "demo",
        [
            *toy_tokenizer.recipe_settings(tokenizer),
            "captioning=null",
            "segmentation.source=coco",
            "segmentation.crowds=instances",
            f"segmentation.images={coco_folder.images}",
            f"segmentation.annotations={coco_folder.file}",
        ],
        package="preprocessing",
    )
    manifest = build_shards(recipe, tmp_path / "shards", workers=0)
    assert manifest.samples == {"segmentation": 10}
    assert manifest.classes == {"segmentation": {"cat": 4, "dog": 6}}
