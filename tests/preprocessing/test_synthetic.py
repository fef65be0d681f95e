"""Drawn data sets follow COCO's and Visual Genome's formats, agree with their pictures, and are a
function of the seed.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from icl_moe.errors import InputError
from preprocessing.synthetic import CLASS_NAMES, Scene, draw_scene, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_dataset(folder, images=60, seed=3)
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([0, i])) for i in range(150)]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_equal_seeds_give_equal_bytes_and_other_seeds_or_splits_do_not(tmp_path: Path) -> None:
    for name, seed, split in (
        ("a", 1, "train"),
        ("b", 1, "train"),
        ("c", 2, "train"),
        ("d", 1, "val"),
    ):
        write_dataset(tmp_path / name, images=4, seed=seed, split=split)
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    )
    assert len(files) == 4 + 5
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    first = Path("images/1.jpg")
    assert len({(tmp_path / name / first).read_bytes() for name in "acd"}) == 3


def test_the_first_images_do_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", images=2, seed=1)
    write_dataset(tmp_path / "many", images=5, seed=1)
    assert (tmp_path / "few/images/2.jpg").read_bytes() == (
        tmp_path / "many/images/2.jpg"
    ).read_bytes()


def test_coco_reads_the_instances_and_boxes_and_areas_agree_with_the_masks(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances_train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASS_NAMES)
    kinds = set()
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask_HW = coco.annToMask(annotation)
        record = coco.loadImgs(annotation["image_id"])[0]
        with Image.open(folder / "images" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"]) == mask_HW.shape[::-1]
        kinds.add((type(annotation["segmentation"]).__name__, annotation["iscrowd"]))
        # pycocotools draws a polygon in its own way, so pixels on the edge may differ; RLE is
        # exact.
        slack = (
            0 if isinstance(annotation["segmentation"], dict) else 1.5 * sum(annotation["bbox"][2:])
        )
        assert abs(mask_HW.sum() - annotation["area"]) <= slack
        x, y, w, h = (int(v) for v in annotation["bbox"])
        outside = mask_HW.copy()
        outside[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1] = 0
        assert not outside.any()
    assert kinds == {("list", 0), ("dict", 0), ("dict", 1)}


def test_masks_of_a_scene_share_no_pixel_and_lie_in_their_boxes(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 1 <= len(scene.objects) <= 4
        assert np.sum([o.mask_HW for o in scene.objects], axis=0).max() == 1
        for o in scene.objects:
            left, top, right, bottom = o.box
            assert o.mask_HW[top:bottom, left:right].sum() == o.mask_HW.sum() > 0
    assert {o.name for scene in scenes for o in scene.objects} == set(CLASS_NAMES)


def test_front_objects_hide_parts_of_others(scenes: list[Scene]) -> None:
    hidden = [
        o
        for scene in scenes
        for o in scene.objects
        if o.outlines is None and o.name != "ring" and not o.crowd
    ]
    assert len(hidden) > 10


def test_colour_words_are_true_of_the_pixels(scenes: list[Scene]) -> None:
    dominant = {"red": 0, "green": 1, "blue": 2}
    seen = 0
    for scene in scenes:
        pixels_HW3 = np.asarray(scene.image, dtype=float)
        for o in scene.objects:
            if o.texture != "plain":
                continue
            colour_3 = pixels_HW3[o.mask_HW].mean(axis=0)
            if o.colour in dominant:
                seen += 1
                assert colour_3.argmax() == dominant[o.colour], (o.colour, colour_3)
            if o.colour in ("white", "black"):
                assert colour_3.min() > 170 if o.colour == "white" else colour_3.max() < 90
    assert seen > 20


def test_place_and_relation_words_are_true_of_the_boxes(scenes: list[Scene]) -> None:
    """Parse the phrases and compare them with the boxes."""
    checked = 0
    for scene in scenes:
        height = scene.image.height
        for o in scene.objects:
            x, y = (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2
            for phrase in o.phrases:
                assert f"{o.colour} {o.name}" in phrase
                assert ("striped" in phrase.split(o.name)[0]) == (o.texture == "striped")
                if "corner" in phrase or "near the" in phrase:
                    assert ("top" in phrase) == (y < height / 3) and ("bottom" in phrase) == (
                        y > 2 * height / 3
                    )
                    checked += 1
                for words, axis, sign in (
                    ("left of", 0, -1),
                    ("right of", 0, 1),
                    ("above", 1, -1),
                    ("below", 1, 1),
                ):
                    if words in phrase:
                        other = phrase.split(words + " ")[1].split()
                        centres = [
                            ((p.box[0] + p.box[2]) / 2, (p.box[1] + p.box[3]) / 2)
                            for p in scene.objects
                            if [p.colour, p.name] == other[1:]
                        ]
                        assert any(((x, y)[axis] - centre[axis]) * sign > 0 for centre in centres)
                        checked += 1
    assert checked > 100


def test_visual_genome_files_hold_the_keys_and_join_to_the_same_images(folder: Path) -> None:
    regions, objects, images = (
        _json(folder / f"{name}.json") for name in ("region_descriptions", "objects", "image_data")
    )
    assert (
        [r["id"] for r in regions]
        == [o["image_id"] for o in objects]
        == [i["image_id"] for i in images]
        == list(range(1, 61))
    )
    assert set(images[0]) == {"width", "height", "url", "image_id", "coco_id", "flickr_id"}
    ids = [region["region_id"] for image in regions for region in image["regions"]]
    assert len(ids) == len(set(ids)) > 60
    for image, there in zip(regions, objects, strict=True):
        assert (folder / "images" / f"{image['id']}.jpg").is_file()
        boxes = {(o["names"][0], o["x"], o["y"], o["w"], o["h"]) for o in there["objects"]}
        for o in there["objects"]:
            assert set(o) == {
                "synsets",
                "object_id",
                "merged_object_ids",
                "names",
                "x",
                "y",
                "w",
                "h",
            }
        for region in image["regions"]:
            assert set(region) == {"region_id", "width", "height", "image_id", "phrase", "x", "y"}
            assert any(
                name in region["phrase"]
                and box == [region[key] for key in ("x", "y", "width", "height")]
                for name, *box in boxes
            )


def test_captions_name_only_what_is_in_the_picture(folder: Path) -> None:
    names = {c["id"]: c["name"] for c in _json(folder / "instances_train.json")["categories"]}
    present: dict[int, set[str]] = {}
    for annotation in _json(folder / "instances_train.json")["annotations"]:
        present.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    captions = _json(folder / "captions_train.json")["annotations"]
    assert len(captions) == 2 * 60
    for caption in captions:
        words = set(caption["caption"].lower().replace(".", "").replace(",", "").split())
        assert words & set(CLASS_NAMES) == present[caption["image_id"]]


def test_other_sizes_are_drawn_and_impossible_requests_refused(tmp_path: Path) -> None:
    assert draw_scene(np.random.default_rng(0), 64).image.size == (64, 64)
    with pytest.raises(InputError, match="at least 1 image"):
        write_dataset(tmp_path / "none", images=0, seed=0)
    with pytest.raises(InputError, match="at least 32 pixels"):
        draw_scene(np.random.default_rng(0), (160, 16))
