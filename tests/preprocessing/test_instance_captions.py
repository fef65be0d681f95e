"""Captions of single instances become regions of a class and a style."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icl_moe.errors import InputError
from preprocessing.episodes import plan_episodes
from preprocessing.image_check import ImageCheck
from preprocessing.instance_captions import read_captioning
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource


def read(folder, captions: list[dict[str, Any]], **settings: Any) -> Pool:
    folder.captions_file.write_text(
        json.dumps({"images": folder.content["images"], "annotations": captions})
    )
    paths = {"images": folder.images, "annotations": folder.captions_file, "instances": folder.file}
    source = CaptioningSource(
        "instance_captions",
        **{key: str(path) for key, path in paths.items()},
        **{"min_descriptions": 0, **settings},
    )
    return read_captioning(source, ImageCheck("stop", "stop", Path(folder.folder) / "notes"))


@pytest.fixture
def captions(coco_folder) -> list[dict[str, Any]]:
    """Two captions of style place and one of style colour for each dog; one of style place for the
    first cat of image 1.
    """
    records: list[dict[str, Any]] = []
    for annotation in coco_folder.content["annotations"]:
        texts = [("left.", "place"), ("on the left", "place"), ("brown", "colour")]
        if annotation["category_id"] == 17:
            texts = [("right", "place")] if annotation["bbox"] == [60, 10, 20, 20] else []
        about = {"image_id": annotation["image_id"], "instance_id": annotation["id"]}
        for text, style in texts:
            records.append({"id": len(records) + 1, "caption": text, "style": style, **about})
    return records


def test_a_region_has_its_instances_class_and_box_and_the_references_of_its_style(
    coco_folder, captions
):
    pool = read(coco_folder, captions)
    first = pool.regions[0]
    assert (first.kind, first.annotations) == (("dog", "place"), (1,))
    assert first.target.caption == "left"
    assert first.target.references == ("left", "on the left")
    assert first.target.box == pytest.approx((0.1, 0.25, 0.5, 0.625))
    described = {(name, style, text) for name, style, text, _ in first.target.objects}
    dogs = {("dog", "place", "left"), ("dog", "place", "on the left"), ("dog", "colour", "brown")}
    assert described == dogs | {("cat", "place", "right")}
    assert {box for name, _, _, box in first.target.objects if name == "dog"} == {first.target.box}
    kinds = {kind: len(numbers) for kind, numbers in pool.by_kind().items()}
    assert kinds == {("dog", "place"): 12, ("dog", "colour"): 6, ("cat", "place"): 3}
    assert set(read(coco_folder, captions, styles=("colour",)).by_kind()) == {("dog", "colour")}
    assert set(read(coco_folder, captions, classes=("cat",)).by_kind()) == {("cat", "place")}


def test_captions_without_a_text_are_left_out_and_counted(coco_folder, captions):
    captions[0]["caption"], captions[1]["caption"] = None, " . "
    pool = read(coco_folder, captions)
    assert pool.skipped["captions_without_a_text"] == 2
    assert [region.annotations for region in pool.regions][:2] == [(3,), (4,)]
    assert all(region.target.caption for region in pool.regions)


def test_an_episode_is_of_one_style(coco_folder, captions):
    pool = read(coco_folder, captions)
    pool.drop_small_classes(images=5)
    assert set(pool.by_kind()) == {("dog", "place"), ("dog", "colour")}
    assert pool.skipped["classes_with_too_few_images"] == 1
    for row in plan_episodes(pool, examples=3, samples=40, seed=1):
        regions = [pool.regions[number] for number in row]
        assert len({region.kind for region in regions}) == 1
        assert len({region.image.name for region in regions}) == 4
    again = plan_episodes(pool, examples=3, samples=40, seed=1)
    np.testing.assert_array_equal(again, plan_episodes(pool, examples=3, samples=40, seed=1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"style": ""}, "annotation 1 has the style ''; it must be text"),
        ({"style": 3}, "annotation 1 has the style 3; it must be text"),
        ({"instance_id": 99}, "has the instance_id 99, which is not an annotation of image 1 in"),
        ({"instance_id": [1]}, r"has the instance_id \[1\], which is not an annotation"),
        ({"image_id": 2}, "has the instance_id 1, which is not an annotation of image 2"),
        ({"caption": 7}, "annotation 1 has no text as its caption"),
    ],
)
def test_records_without_a_style_or_an_instance_are_refused(coco_folder, captions, edit, message):
    captions[0].update(edit)
    with pytest.raises(InputError, match=message):
        read(coco_folder, captions)
