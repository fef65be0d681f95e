"""The model for photographs that ships, on real photographs that its training never showed."""

from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from icl_moe import InContextModel

CLASSES = ("zebra", "person")


def largest(folder: Path, split: str, name: str) -> tuple[Path, np.ndarray]:
    """The photograph in which a class covers the most, and its mask (H, W)."""
    coco = COCO(folder / f"annotations/instances_{split}.json")
    (number,) = coco.getCatIds(catNms=[name])
    found = []
    for image in coco.getImgIds(catIds=[number]):
        annotations = coco.loadAnns(coco.getAnnIds(image, [number], iscrowd=False))
        if annotations:
            mask_HW = np.any([coco.annToMask(each) > 0 for each in annotations], axis=0)
            found.append((mask_HW.mean(), image, mask_HW))
    _, image, mask_HW = max(found, key=lambda entry: entry[:2])
    return folder / split / coco.loadImgs(image)[0]["file_name"], mask_HW


def test_a_query_is_segmented_as_the_example_shows(real_data):
    """The query shows a zebra: its mask is found after an example of zebras, and is not the answer
    after an example of persons.
    """
    coco = real_data / "coco2017_sample"
    model = InContextModel.from_pretrained("photographs", device="cpu")
    query, true_HW = largest(coco, "val2017", "zebra")
    ious = {}
    for name in CLASSES:
        found_HW = model.segment([largest(coco, "train2017", name)], query=query)
        assert found_HW.shape == true_HW.shape
        ious[name] = (found_HW & true_HW).sum() / (found_HW | true_HW).sum()
    assert ious["zebra"] > 0.5 > ious["person"], ious
