"""What windows are worth: what was found in a photograph, read again from closer up, against the
whole photograph alone.

python benchmarks/windows.py COCO [--model photographs] [--queries 40] [--json FILE]

COCO holds train2017, val2017 and annotations with instances_train2017.json and
instances_val2017.json. A query is a photograph of val2017 and one of its classes, which covers 0.5
to 3 % of it (small) or 3 to 20 % (medium). Its example is a photograph of train2017, one for each
class, in which the class covers at least 3 %.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import Goal, report
from nearest_examples import class_masks
from pycocotools.coco import COCO
from tqdm import tqdm

from icl_moe.bootstrap import mean_intervals
from icl_moe.inference.model import InContextModel
from icl_moe.inference.session import Session
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks.mask_scores import mask_iou

SIZES = {"small": (0.005, 0.03), "medium": (0.03, 0.2)}

Object = tuple[Path, int, np.ndarray]
"""A photograph, a class, and its mask (H, W)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("coco", type=Path)
    parser.add_argument("--model", default="photographs")
    parser.add_argument("--queries", type=int, default=40, help="of each size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    model = InContextModel.from_pretrained(options.model)
    rng = np.random.default_rng(0)
    examples: dict[int, list[tuple[Path, dict[str, Any]]]] = {}
    for image, number, mask_HW in objects(options.coco, "train2017", SIZES["medium"][0], 1.0):
        examples.setdefault(number, []).append((image, encode_rle(mask_HW)))
    sessions: dict[int, Session] = {}
    figures: dict[str, float] = {}
    goals = []
    for size, (least, most) in SIZES.items():
        queries = [q for q in objects(options.coco, "val2017", least, most) if q[1] in examples]
        chosen = rng.permutation(len(queries))[: options.queries]
        ious_Q2, windows = [], 0
        for file, number, true_HW in tqdm([queries[n] for n in chosen], size):
            if number not in sessions:
                image, rle = examples[number][rng.integers(len(examples[number]))]
                sessions[number] = model.session([(image, decode_rle(rle))])
            whole = sessions[number].draw(file)
            close = sessions[number].draw(file, windows=True)
            windows += close.windows
            ious_Q2.append([mask_iou(drawn.mask_HW, true_HW) for drawn in (whole, close)])
        without, with_windows = np.array(ious_Q2).T
        named = {"whole": without, "windows": with_windows, "gain": with_windows - without}
        figures[f"{size}: queries"] = len(without)
        figures[f"{size}: windows per query"] = windows / len(without)
        spans = mean_intervals(*named.values())
        for (name, values), (low, high) in zip(named.items(), spans, strict=True):
            figures[f"{size}, {name}: mean IoU"] = float(values.mean())
            figures[f"{size}, {name}: from"], figures[f"{size}, {name}: to"] = low, high
        goals.append(Goal(f"{size}: lower end of the gain's interval", spans[2][0], 0.0))
    report(figures, goals, options.json)


def objects(folder: Path, split: str, least: float, most: float) -> Iterator[Object]:
    """The classes of the photographs of a split that cover a share from `least` up to `most`."""
    coco = COCO(folder / f"annotations/instances_{split}.json")
    for number in sorted(coco.imgs):
        for category, mask_HW in class_masks(coco, number, least).items():
            if mask_HW.mean() < most:
                yield folder / split / coco.imgs[number]["file_name"], category, mask_HW


if __name__ == "__main__":
    main()
