"""What the choice of examples is worth: the nearest ones by the model's own reading of images,
against random ones.

python benchmarks/nearest_examples.py COCO [--model photographs] [--queries 300] [--json FILE]

COCO holds train2017, val2017 and annotations with instances_train2017.json and
instances_val2017.json. A query is a photograph of val2017 and one of its classes, its examples are
photographs of train2017 with the same class; in both the class covers at least 1 % of the picture.
Random examples are drawn several times for each query, and count with their mean.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import Goal, report
from pycocotools.coco import COCO
from tqdm import tqdm

from icl_moe.bootstrap import mean_intervals
from icl_moe.images import crop_and_resize_mask
from icl_moe.inference.examples import in_batches
from icl_moe.inference.model import InContextModel
from icl_moe.inference.retrieval import Shelf
from icl_moe.inference.session import Query, in_own_size
from icl_moe.sequence import Episode
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.mask_scores import mask_iou
from icl_moe.tasks.segmentation import LEAST_SHOWN, SegmentationPair

DRAWS, BATCH = 3, 8


class Photograph(NamedTuple):
    """A picture's file and codes, and the masks (H, W) of the classes that cover enough of it."""

    file: Path
    codes_N: np.ndarray
    masks: dict[int, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("coco", type=Path)
    parser.add_argument("--model", default="photographs")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    model = InContextModel.from_pretrained(options.model)
    examples = by_class(model, photographs(model, options.coco, "train2017"))
    queries = [
        (photograph, number)
        for photograph in photographs(model, options.coco, "val2017")
        for number in photograph.masks
        if len(examples.get(number, ())) >= options.shots
    ]
    rng = np.random.default_rng(0)
    chosen = sorted(rng.permutation(len(queries))[: options.queries].tolist())
    queries = [queries[number] for number in chosen]
    shelves = {
        number: Shelf(model.tokenizers, pairs, options.shots) for number, pairs in examples.items()
    }
    nearest = ious(model, queries, [shelves[n].nearest(p.codes_N) for p, n in queries])
    drawn = [
        ious(model, queries, [draw(rng, examples[n], options.shots) for _, n in queries])
        for _ in range(DRAWS)
    ]
    at_random = np.mean(drawn, axis=0)
    gain = nearest - at_random
    spans = mean_intervals(nearest, at_random, gain)
    figures = {"queries": len(queries), "classes": len({number for _, number in queries})}
    for name, values, (low, high) in zip(
        ("nearest", "random", "nearest less random"), (nearest, at_random, gain), spans, strict=True
    ):
        figures[f"{name}: mean IoU"] = float(np.mean(values))
        figures[f"{name}: from"], figures[f"{name}: to"] = low, high
    gained = Goal("nearest less random: lower end of the mean IoU's interval", spans[2][0], 0.0)
    report(figures, [gained], options.json)


def photographs(model: InContextModel, folder: Path, split: str) -> Iterator[Photograph]:
    coco = COCO(folder / f"annotations/instances_{split}.json")
    for some in in_batches(tqdm(sorted(coco.imgs), split), BATCH):
        files = [folder / split / coco.imgs[number]["file_name"] for number in some]
        queries = [Query.load(file, model.image_size) for file in files]
        codes = model.encode([query.pixels_3HW for query in queries])
        for number, file, codes_N in zip(some, files, codes, strict=True):
            yield Photograph(file, codes_N, class_masks(coco, number))


def class_masks(coco: COCO, image: int, least: float = LEAST_SHOWN) -> dict[int, np.ndarray]:
    """The union of the instances of each class that covers at least a share of the picture, without
    crowds.
    """
    masks: dict[int, np.ndarray] = {}
    for annotation in coco.loadAnns(coco.getAnnIds(image, iscrowd=False)):
        mask_HW = coco.annToMask(annotation) > 0
        masks[annotation["category_id"]] = masks.get(annotation["category_id"], False) | mask_HW
    return {number: mask_HW for number, mask_HW in masks.items() if mask_HW.mean() >= least}


def by_class(
    model: InContextModel, photographs: Iterable[Photograph]
) -> dict[int, list[SegmentationPair]]:
    pairs: dict[int, list[SegmentationPair]] = {}
    for _, codes_N, masks in photographs:
        for number, mask_HW in masks.items():
            whole = (0, 0, mask_HW.shape[1], mask_HW.shape[0])
            square_HW = crop_and_resize_mask(mask_HW, whole, model.image_size)
            (mask_N,) = model.encode_masks([square_HW])
            pairs.setdefault(number, []).append(SegmentationPair(codes_N, mask_N))
    return pairs


def draw(
    rng: np.random.Generator, pairs: list[SegmentationPair], shots: int
) -> tuple[SegmentationPair, ...]:
    return tuple(pairs[number] for number in rng.choice(len(pairs), shots, replace=False))


def ious(
    model: InContextModel,
    queries: list[tuple[Photograph, int]],
    examples: list[tuple[SegmentationPair, ...]],
) -> np.ndarray:
    """The IoU of each query, at its own size, after its examples."""
    masks = drawn_masks(model, [photograph for photograph, _ in queries], examples)
    return np.array(
        [
            mask_iou(drawn.mask_HW, photograph.masks[number])
            for drawn, (photograph, number) in zip(masks, queries, strict=True)
        ]
    )


def drawn_masks(
    model: InContextModel,
    queries: list[Photograph],
    examples: list[tuple[SegmentationPair, ...]],
) -> Iterator[DrawnMask]:
    """What the model draws for each query, at its own size, after its examples."""
    questions = list(zip(queries, examples, strict=True))
    for some in in_batches(tqdm(questions, "segmenting"), BATCH):
        requests = [
            (Episode(SEGMENTATION, "", pairs), photograph.codes_N) for photograph, pairs in some
        ]
        drawn = SEGMENTATION.draw(model, model.complete(requests))
        for (photograph, _), mask in zip(some, drawn, strict=True):
            query = Query.load(photograph.file, model.image_size)
            yield in_own_size(mask, query, model.edges)


if __name__ == "__main__":
    main()
