"""LVIS v1: files by COCO's addresses, classes of which not all instances are annotated, and
frequencies.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from icl_moe.errors import InputError
from preprocessing.image_check import ImageCheck
from preprocessing.lvis import read_segmentation
from preprocessing.pool import Pool
from preprocessing.recipe import SegmentationSource


@pytest.fixture
def lvis(coco_folder) -> Any:
    """The six images as those of LVIS, half of them in train2017 and half in val2017."""
    content = coco_folder.content
    for record in content["images"]:
        split = "train2017" if record["id"] % 2 else "val2017"
        name = f"{record['id']:012d}.jpg"
        (coco_folder.images / split).mkdir(exist_ok=True)
        (coco_folder.images / record.pop("file_name")).rename(coco_folder.images / split / name)
        record.update(
            coco_url=f"http://images.cocodataset.org/{split}/{name}",
            flickr_url="http://farm4.staticflickr.com/1.jpg",
            license=1,
            date_captured="2013-11-14 17:02:52",
            neg_category_ids=[],
            not_exhaustive_category_ids=[],
        )
    for category, frequency in zip(content["categories"], "rf", strict=True):
        name = category["name"]
        category.update(
            synset=f"{name}.n.01",
            synonyms=[name],
            frequency=frequency,
            image_count=3,
            instance_count=6,
            **{"def": f"a {name}"},
        )
    for annotation in content["annotations"]:
        del annotation["iscrowd"]
    coco_folder.write()
    return coco_folder


def read(folder: Any, images: Path | None = None) -> Pool:
    source = SegmentationSource(
        source="lvis", images=str(images or folder.images), annotations=str(folder.file)
    )
    return read_segmentation(source, 80, ImageCheck("skip", "stop", folder.folder / "notes"), 0)


def test_files_are_found_by_their_addresses(lvis):
    names = {region.image.name for region in read(lvis).regions}
    assert names == {f"{'train2017' if n % 2 else 'val2017'}/{n:012d}.jpg" for n in range(1, 7)}
    pool = read(lvis, lvis.images / "train2017")
    assert {region.image.name for region in pool.regions} == {f"{n:012d}.jpg" for n in (1, 3, 5)}
    assert pool.skipped["missing_images"] == 3


def test_an_image_says_nothing_of_a_class_that_it_does_not_annotate_exhaustively(lvis):
    before = read(lvis)
    lvis.write(lambda content: content["images"][0].update(not_exhaustive_category_ids=[17]))
    pool = read(lvis)
    gone = {(r.image.name, r.category) for r in before.regions} - {
        (r.image.name, r.category) for r in pool.regions
    }
    assert gone == {("train2017/000000000001.jpg", "cat")}
    assert pool.skipped["masks_not_exhaustive"] == 1
    (dog,) = (r for r in pool.regions if r.image.name == "train2017/000000000001.jpg")
    assert [name for name, _ in dog.target.objects] == ["dog"]  # and so is no negative either


def test_a_region_has_the_frequency_of_its_class(lvis):
    assert {(r.category, r.group) for r in read(lvis).regions} == {
        ("cat", "rare"),
        ("dog", "frequent"),
    }


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("images", {"coco_url": None}, "image 1 has the coco_url None"),
        ("images", {"coco_url": "http://host/train2017/.."}, "image 1 has the file name '..'"),
        ("images", {"not_exhaustive_category_ids": [99]}, "lists the category 99"),
        ("images", {"not_exhaustive_category_ids": [[]]}, r"lists the category \[\]"),
        ("images", {"not_exhaustive_category_ids": None}, "has no list of not_exhaustive"),
        ("categories", {"frequency": "often"}, "category 17 has the frequency 'often'"),
        ("categories", {"frequency": ["r"]}, "category 17 has the frequency"),
    ],
)
def test_a_wrong_record_is_named_in_a_sentence(lvis, kind, values, message):
    lvis.write(lambda content: content[kind][0].update(values))
    assert json.loads(lvis.file.read_bytes())
    with pytest.raises(InputError, match=message):
        read(lvis)
