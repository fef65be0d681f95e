"""COCO-20i: the classes, the draws, and the rule by which images show a class, by HSNet's lists and
on real annotations.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from preprocessing.classes import COCO_CLASSES
from preprocessing.standard_masks import AnnotatedImages
from preprocessing.standards import LEAST_PIXELS, draw_by_class


@pytest.fixture(scope="module")
def lists(real_data: Path) -> dict[int, dict[int, list[str]]]:
    return {
        fold: {
            int(number): names
            for number, names in json.loads(
                (real_data / f"fewshot_splits/coco20i_val_fold{fold}.json").read_text()
            ).items()
        }
        for fold in range(4)
    }


def test_the_classes_of_a_fold_are_those_of_the_lists(lists):
    for fold, of_fold in lists.items():
        assert sorted(of_fold) == list(range(fold, 80, 4))


def test_a_thousand_queries_of_real_lists_are_drawn_as_hsnet_draws_them(lists):
    fold = 3
    np.random.seed(0)  # noqa: NPY002
    class_ids, expected = [fold + 4 * v for v in range(20)], []
    for _ in range(1000):
        sample = np.random.choice(class_ids, 1, replace=False)[0]  # noqa: NPY002
        query = np.random.choice(lists[fold][sample], 1, replace=False)[0]  # noqa: NPY002
        while True:
            support = np.random.choice(lists[fold][sample], 1, replace=False)[0]  # noqa: NPY002
            if query != support:
                break
        expected.append((sample, str(support), str(query)))
    of_class = {number: lists[fold][number] for number in class_ids}
    assert list(draw_by_class(of_class, shots=1, queries=1000)) == expected


def test_the_rule_for_images_that_show_a_class_agrees_with_the_lists(real_data, lists):
    """This is compared on the images of the sample that belong to COCO 2014's validation set."""
    listed = {
        COCO_CLASSES[number]: {int(name[-16:-4]) for name in names}
        for of_fold in lists.values()
        for number, names in of_fold.items()
    }
    known = set().union(*listed.values())
    files = [f"annotations/instances_{part}2017.json" for part in ("train", "val")]
    images = AnnotatedImages(real_data / "coco2017_sample", files, "painted")
    assert tuple(images.classes) == COCO_CLASSES
    paths_of_all = {path for paths in images.with_class().values() for path in paths}
    agrees = []
    for path in paths_of_all:
        if (number := int(Path(path).stem)) in known:
            masks = images.class_masks(path)
            agrees += [
                (name in masks and masks[name].sum() >= LEAST_PIXELS) == (number in listed[name])
                for name in images.annotations(path)
            ]
    assert (sum(agrees), len(agrees)) == (1327, 1338)
