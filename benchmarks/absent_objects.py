"""Whether the score of a mask tells that an object is absent: masks of classes that a photograph
shows, and of classes that it does not.

python benchmarks/absent_objects.py COCO [--model photographs]

COCO is a folder as for nearest_examples.py. Every class that covers at least 1 % of a photograph of
val2017 is asked for with one random example of train2017, and as many classes that are nowhere in
it. For each least score, as of `icl-moe label --least-score`: how many of either are marked, and
how many of the present ones with an IoU of at least 0.5.
"""

import argparse
from pathlib import Path

import numpy as np
from nearest_examples import Photograph, by_class, draw, drawn_masks, photographs
from pycocotools.coco import COCO

from icl_moe.inference.model import InContextModel
from icl_moe.labelling.run import LEAST_AREA
from icl_moe.tables import Table, as_text
from icl_moe.tasks.mask_scores import mask_iou

LEAST_SCORES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("coco", type=Path)
    parser.add_argument("--model", default="photographs")
    options = parser.parse_args()
    model = InContextModel.from_pretrained(options.model)
    examples = by_class(model, photographs(model, options.coco, "train2017"))
    annotated = _annotated(options.coco)
    rng = np.random.default_rng(0)
    present: list[tuple[Photograph, int]] = []
    absent: list[tuple[Photograph, int]] = []
    for photograph in photographs(model, options.coco, "val2017"):
        known = [number for number in photograph.masks if number in examples]
        others = sorted(examples.keys() - annotated[photograph.file.name])
        present += [(photograph, number) for number in known]
        absent += [(photograph, int(n)) for n in rng.choice(others, len(known), replace=False)]
    queries = present + absent
    masks = drawn_masks(
        model,
        [photograph for photograph, _ in queries],
        [draw(rng, examples[number], 1) for _, number in queries],
    )
    scores, ious = [], []
    for drawn, (photograph, number) in zip(masks, queries, strict=True):
        mask_HW = drawn.mask_HW
        is_marked = mask_HW.mean() >= LEAST_AREA
        scores.append(drawn.score() or 0.0 if is_marked else -1.0)
        true_HW = photograph.masks.get(number)
        ious.append(0.0 if true_HW is None else mask_iou(mask_HW, true_HW))
    score_P, score_A = np.split(np.array(scores), [len(present)])
    right_P = np.array(ious)[: len(present)] >= 0.5
    rows = []
    for least in LEAST_SCORES:
        shares = (score_P >= least, right_P & (score_P >= least), score_A >= least)
        rows.append([f"{least:.1f}", *(f"{100 * share.mean():.0f}" for share in shares)])
    head = ["least score", "% of present marked", "% with IoU >= 0.5", "% of absent marked"]
    print(as_text(Table(head, rows)))
    above = (score_P[:, None] > score_A).mean() + (score_P[:, None] == score_A).mean() / 2
    print(f"{len(present)} present and {len(absent)} absent; area under the ROC curve {above:.2f}")


def _annotated(folder: Path) -> dict[str, set[int]]:
    """The classes of all annotations of each photograph of val2017."""
    coco = COCO(folder / "annotations/instances_val2017.json")
    return {
        image["file_name"]: {each["category_id"] for each in coco.imgToAnns[number]}
        for number, image in coco.imgs.items()
    }


if __name__ == "__main__":
    main()
