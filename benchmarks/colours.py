"""Whether several classes in one mask get the colours that the example gives: each query is painted
after its example, and after the same example with its colours exchanged.

python benchmarks/colours.py MODEL SHARDS [--queries 300] [--picture FILE.png] [--json FILE]

SHARDS were built with segmentation.classes_per_mask of classes that the model has not seen; the
pictures that they were built of must be at hand. A query is right if, among all classes of its
example, what is painted in each colour has the greatest IoU with the class that has this colour in
the example. It flips if it is right after both.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import Goal, report
from PIL import Image
from tqdm import tqdm

from icl_moe.bootstrap import mean_intervals
from icl_moe.data.shards import ShardSet
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.photographs import Photographs
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.tasks import SEMANTIC_SEGMENTATION
from icl_moe.tasks.mask_scores import mask_iou
from icl_moe.tasks.semantic_segmentation import COLOURS, paint

ROWS, SIDE, GAP = 5, 128, 8


class Question(NamedTuple):
    """A query with its example; masks (H, W) by class, and the classes' colours."""

    example: Image.Image
    query: Image.Image
    shown: Mapping[str, np.ndarray]
    true: Mapping[str, np.ndarray]
    colours: Mapping[str, str]

    def exchanged(self) -> "Question":
        """Each class with the colour of the next one."""
        names = list(self.colours.values())
        others = dict(zip(self.colours, names[1:] + names[:1], strict=True))
        return self._replace(colours=others)

    def painted_example(self) -> np.ndarray:
        masks = {self.colours[name]: mask_HW for name, mask_HW in self.shown.items()}
        return paint(masks, (self.example.height, self.example.width))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--picture", type=Path, help="also draw the first queries")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    model = InContextModel.from_pretrained(options.model)
    right_Q2, iou_Q2, rows = [], [], []
    every = list(questions(model, ShardSet(options.shards), options.queries))
    for question in tqdm(every, unit="query"):
        row, rights, ious = [question.query], [], []
        for variant in (question, question.exchanged()):
            example_HW3 = variant.painted_example()
            found_HW3 = model.segment_colours([(variant.example, example_HW3)], variant.query)
            is_right, iou = judge(variant, found_HW3)
            rights.append(is_right)
            ious.append(iou)
            row += [
                painted_over(variant.example, example_HW3),
                painted_over(variant.query, found_HW3),
            ]
        right_Q2.append(rights)
        iou_Q2.append(ious)
        rows.append(row)
    own, exchanged = np.array(right_Q2, dtype=float).T
    values = {
        "right after the example": own,
        "right after exchanged colours": exchanged,
        "flips": own * exchanged,
        "mean IoU after the example": np.array(iou_Q2)[:, 0],
        "mean IoU after exchanged colours": np.array(iou_Q2)[:, 1],
    }
    figures: dict[str, float] = {"queries": len(every)}
    for (name, values_Q), (low, high) in zip(
        values.items(), mean_intervals(*values.values()), strict=True
    ):
        figures |= {name: float(values_Q.mean()), f"{name}, from": low, f"{name}, to": high}
    if options.picture:
        draw(rows[:ROWS]).save(options.picture, optimize=True)
    report(figures, [Goal("flips", figures["flips"], 0.7)], options.json)


def questions(model: InContextModel, shards: ShardSet, count: int) -> Iterator[Question]:
    task = SEMANTIC_SEGMENTATION.name
    photographs = Photographs(shards, task)
    episodes = EpisodeSet(shards, model.codec, task, count)
    for episode in (episodes[number] for number in range(len(episodes))):
        example_masks, query_masks = (
            {name: decode_rle(rle) for name, rle in episode.meta["class_masks"][pair].items()}
            for pair in (0, -1)
        )
        example, query = (photographs.at_model_size(episode, pair) for pair in (0, -1))
        yield Question(example, query, example_masks, query_masks, episode.meta["colours"])


def judge(question: Question, found_HW3: np.ndarray) -> tuple[bool, float]:
    """Whether every colour is on its class, and the mean IoU of the classes."""
    is_right, ious = True, []
    for name, colour in question.colours.items():
        mask_HW = (found_HW3 == COLOURS[colour]).all(axis=-1)
        of_classes = {other: mask_iou(mask_HW, true_HW) for other, true_HW in question.true.items()}
        ious.append(of_classes[name])
        is_right &= bool(mask_HW.any()) and max(of_classes, key=of_classes.__getitem__) == name
    return is_right, float(np.mean(ious))


def painted_over(picture: Image.Image, painted_HW3: np.ndarray) -> Image.Image:
    pixels_HW3 = np.asarray(picture, dtype=np.float32)
    is_painted_HW1 = painted_HW3.any(axis=-1, keepdims=True)
    mixed_HW3 = 0.35 * pixels_HW3 + 0.65 * painted_HW3
    shown_HW3 = np.where(is_painted_HW1, mixed_HW3, 0.8 * pixels_HW3)
    return Image.fromarray(shown_HW3.astype(np.uint8))


def draw(rows: list[list[Image.Image]]) -> Image.Image:
    """A row for each query: the query, the example and what is painted, and both with the colours
    exchanged.
    """
    size = (len(rows[0]) * (SIDE + GAP) + GAP, len(rows) * (SIDE + GAP) + GAP)
    picture = Image.new("RGB", size, "white")
    for number, row in enumerate(rows):
        for place, cell_picture in enumerate(row):
            cell = cell_picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            picture.paste(cell, (GAP + place * (SIDE + GAP), GAP + number * (SIDE + GAP)))
    return picture


if __name__ == "__main__":
    main()
