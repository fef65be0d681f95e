"""How often the 95 % intervals of the mIoU hold the true value:

    python benchmarks/interval_coverage.py [--repeats 300]

Queries of classes are drawn from a known distribution: the mean IoU of a class from Beta(3, 3), the
IoU of a query from a normal distribution around it with a deviation of 0.25, cut to 0..1. Each set
of queries is scored as the evaluation scores masks. `these` counts the sets whose interval holds
the mean over the classes of the set, `all` those whose interval holds the mean over all classes.
"""

import argparse

import numpy as np

from icl_moe.bootstrap import intervals
from icl_moe.tables import Table, as_text
from icl_moe.tasks.mask_scores import MaskCounts, mask_statistic

DEVIATION, UNION = 0.25, 10_000.0
SETS = ((40, 1), (40, 3), (75, 7), (20, 50))
"""Classes, and queries of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    expected = draw_ious(rng, rng.beta(3, 3, 200_000)).mean()
    rows = []
    for classes, queries in SETS:
        held = np.zeros(2)
        for _ in range(repeats):
            mean_C = rng.beta(3, 3, classes)
            of_these = draw_ious(rng, mean_C.repeat(1000)).mean()
            iou_E = draw_ious(rng, mean_C.repeat(queries))
            low, high = interval_of_miou(iou_E, np.arange(classes).repeat(queries))
            held += [low <= truth <= high for truth in (of_these, expected)]
        these, every = (f"{100 * share:.0f}" for share in held / repeats)
        rows.append([str(classes), str(queries), these, every])
    head = ["classes", "queries of each", "% of intervals that hold: these", "all"]
    print(as_text(Table(head, rows)))


def draw_ious(rng: np.random.Generator, mean_E: np.ndarray) -> np.ndarray:
    return np.clip(rng.normal(mean_E, DEVIATION), 0, 1)


def interval_of_miou(iou_E: np.ndarray, class_E: np.ndarray) -> tuple[float, float]:
    """The interval of queries with these IoUs, all of whose masks have unions of equal size."""
    union_E = np.full(len(iou_E), UNION)
    names = tuple(str(number) for number in range(int(class_E.max()) + 1))
    sizes = ("over 20 %",) * len(iou_E)
    counts = MaskCounts(names, class_E, iou_E * UNION, union_E, union_E, (1 - iou_E) * UNION, sizes)
    statistic = mask_statistic(counts)
    return intervals(statistic.of, len(iou_E))[statistic.names.index("mIoU")]


if __name__ == "__main__":
    main()
