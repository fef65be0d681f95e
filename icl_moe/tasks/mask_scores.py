"""Scores the agreement of predicted masks with the true ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from icl_moe.bootstrap import Interval, Statistic, intervals
from icl_moe.tasks.task import GroupScore, Measure

NOTHING = "nothing to mark"

SIZES = {NOTHING: 0.0, "under 3 %": 0.03, "3 to 20 %": 0.2, "over 20 %": 1.0}
"""The sizes of objects, by the largest share of the picture's pixels that the true mask may mark.
COCO's border between medium and large, 96 x 96 pixels, is 3 % of a picture of 640 x 480. `NOTHING`:
the true mask is empty, as that of an absent object; its mean IoU is the share of such queries in
which nothing is marked.
"""


class Standard(NamedTuple):
    """The published benchmark that episodes are of, and the fold of each episode."""

    name: str
    folds: tuple[int, ...]


class MaskPair(NamedTuple):
    """The class of an episode, and its predicted and true mask, boolean (H, W). ignored: the pixels
    that do not count; None for none.
    """

    category: str
    predicted: np.ndarray
    true: np.ndarray
    ignored: np.ndarray | None = None


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of episodes, all in 0..1.

    miou: the mean over the classes that have something to mark of IoU_c = sum over episodes e of
        class c of |P_e and T_e| / the same sum of |P_e or T_e|, the foreground mIoU of few-shot
        segmentation (Shaban et al. 2017, "One-Shot Learning for Semantic Segmentation").
    mean_iou: the mean over episodes of |P_e and T_e| / |P_e or T_e|; 1 if both are empty.
    mae: the mean over episodes of the mean over pixels of |P_e - T_e|, the mean absolute error of
        salient object detection (Perazzi et al. 2012), here of binary masks.
    class_iou: IoU_c of each class, and class_episodes how many episodes it had.
    size_iou: mean_iou of the episodes of each of `SIZES` that occurs, and size_episodes how many
        there were.
    intervals, class_intervals, size_intervals: 95 % intervals over queries (see bootstrap.py), by
        score, by class and by size; empty where they were not asked for, and without classes of one
        query, of whose spread it tells nothing. In the mIoU of a draw a class counts in proportion
        to how often its queries were drawn, relative to their number (see `_mean_of_classes`). A
        class or a size that a draw lacks is left out of that draw.
    standard, standard_miou, fold_miou: if the episodes are those of a published benchmark, its name
        and its own mIoU. That of a fold is the mean of IoU_c over its classes, where a class that
        is neither there nor marked has 0; that of the benchmark is the mean over the folds.
        fold_episodes: how many episodes a fold had.
    standard_fb_iou: HSNet's FB-IoU. That of a fold is the mean of the foreground's and the
        background's IoU, each over the pixels of all its queries, whatever their class; that of the
        benchmark is the mean over the folds.
    """

    episodes: int
    miou: float
    mean_iou: float
    mae: float
    class_iou: dict[str, float]
    class_episodes: dict[str, int]
    intervals: dict[str, Interval] = field(default_factory=dict)
    class_intervals: dict[str, Interval] = field(default_factory=dict)
    size_iou: dict[str, float] = field(default_factory=dict)
    size_episodes: dict[str, int] = field(default_factory=dict)
    size_intervals: dict[str, Interval] = field(default_factory=dict)
    standard: str = ""
    standard_miou: float | None = None
    standard_fb_iou: float | None = None
    fold_miou: dict[str, float] = field(default_factory=dict)
    fold_episodes: dict[str, int] = field(default_factory=dict)

    def measures(self) -> dict[str, Measure]:
        def share(name: str, definition: str) -> Measure:
            return Measure(getattr(self, name), self.intervals.get(name), definition)

        own = {
            f"{self.standard} mIoU": share("standard_miou", _OF_STANDARD),
            f"{self.standard} FB-IoU": share("standard_fb_iou", _FB_IOU),
        }
        return {
            **(own if self.standard else {}),
            "mIoU": share("miou", _MIOU),
            "mean IoU": share("mean_iou", _MEAN_IOU),
            "MAE": Measure(self.mae, self.intervals.get("mae"), _MAE, False, False),
        }

    def figures(self) -> dict[str, float]:
        return {"miou": self.miou, "mean_iou": self.mean_iou, "mae": self.mae}

    def groups(self) -> dict[str, dict[str, GroupScore]]:
        of_folds = _as_groups(self.fold_episodes, self.fold_miou, {})
        return {
            **({"fold": of_folds} if self.standard else {}),
            "class": _as_groups(self.class_episodes, self.class_iou, self.class_intervals),
            "size of the object": _as_groups(
                self.size_episodes, self.size_iou, self.size_intervals
            ),
        }

    def notes(self) -> list[str]:
        return []


_MIOU = (
    "the mean over classes of the intersection over union of prediction and truth, whose pixels "
    "are summed over the queries of a class"
)
_MEAN_IOU = "the mean over queries of the intersection over union of prediction and truth"
_MAE = "the mean over queries of the share of pixels where prediction and truth differ"
_OF_STANDARD = "the mean over folds of the mean over a fold's classes, as the benchmark defines it"
_FB_IOU = (
    "the mean over folds of the mean of the foreground's and the background's intersection over "
    "union, whose pixels are summed over all queries of a fold"
)


def _as_groups(
    episodes: dict[str, int], scores: dict[str, float], ranges: dict[str, Interval]
) -> dict[str, GroupScore]:
    return {
        name: GroupScore(episodes[name], score, ranges.get(name)) for name, score in scores.items()
    }


@dataclass(frozen=True)
class MaskCounts:
    """The counts from which the scores of E masks are computed. classes: the names of the C
    classes. class_E: the number of each mask's class. both_E, either_E: how many pixels are in both
    the predicted and the true mask, and in at least one of them. counted_E: how many pixels count.
    wrong_E: how many of these differ. size_E: the size of each mask, a name in `SIZES`.
    """

    classes: tuple[str, ...]
    class_E: np.ndarray
    both_E: np.ndarray
    either_E: np.ndarray
    counted_E: np.ndarray
    wrong_E: np.ndarray
    size_E: tuple[str, ...]

    @property
    def ious_E(self) -> np.ndarray:
        return _ratios(self.both_E, self.either_E)

    @property
    def has_object_C(self) -> np.ndarray:
        """Whether a class is in the mean over classes: all of whose queries some has something to
        mark, or every class if none has.
        """
        has_object_E = np.array([size != NOTHING for size in self.size_E])
        found_C = np.zeros(len(self.classes), dtype=bool)
        np.logical_or.at(found_C, self.class_E, has_object_E)
        return found_C if found_C.any() else ~found_C

    @property
    def sizes(self) -> list[str]:
        """The names in `SIZES` that occur among the masks."""
        return [name for name in SIZES if name in self.size_E]


_Pair = MaskPair | tuple[str, np.ndarray, np.ndarray]


def count_masks(pairs: Iterable[_Pair]) -> MaskCounts:
    """The counts of at least one pair of masks."""
    names, pixels, sizes = [], [], []
    for pair in pairs:
        name, predicted, true, ignored = MaskPair(*pair)
        if ignored is not None:
            predicted, true = predicted & ~ignored, true & ~ignored
        counted = true.size - (0 if ignored is None else int(np.sum(ignored)))
        both, either = int(np.sum(predicted & true)), int(np.sum(predicted | true))
        names.append(name)
        pixels.append((both, either, counted, either - both))
        sizes.append(_size(true))
    classes, class_E = np.unique(names, return_inverse=True)
    both_E, either_E, counted_E, wrong_E = np.array(pixels, dtype=np.float64).T
    names_C = tuple(map(str, classes))
    return MaskCounts(names_C, class_E, both_E, either_E, counted_E, wrong_E, tuple(sizes))


def mask_statistic(counts: MaskCounts, standard: Standard | None = None) -> Statistic:
    """The measures of `SegmentationScores.measures`, by the same names. standard: the benchmark
    that the masks are of.
    """
    class_ious, ious_E = _class_ious(counts), counts.ious_E
    classes, counted_C = _Groups(counts.class_E), counts.has_object_C
    errors_E = counts.wrong_E / np.maximum(counts.counted_E, 1)
    of_standard = _standard_scores(counts, standard) if standard else None

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        means_B2 = weights_BE @ np.stack([ious_E, errors_E], axis=1)
        means_B2 /= weights_BE.sum(axis=1, keepdims=True)
        miou_B = _mean_of_classes(class_ious(weights_BE), classes.shares(weights_BE) * counted_C)
        own = [of_standard(weights_BE)[:, :2]] if of_standard else []
        return np.column_stack([*own, miou_B, means_B2])

    names = (f"{standard.name} mIoU", f"{standard.name} FB-IoU") if standard else ()
    return Statistic((*names, "mIoU", "mean IoU", "MAE"), scores, plain=("MAE",))


_FIELDS = ("miou", "mean_iou", "mae")
_STANDARD_FIELDS = ("standard_miou", "standard_fb_iou")
"""The fields of `SegmentationScores` in the order of `mask_statistic`."""


def score_masks(
    pairs: Iterable[_Pair],
    with_intervals: bool = False,
    standard: Standard | None = None,
    queries: Sequence[int] | None = None,
) -> SegmentationScores:
    """The scores of pairs of masks, one for each episode, of at least one episode. standard: the
    benchmark that the episodes are of. queries: where a query has several masks, the number of each
    mask's query, from 0 on without gaps; intervals are over queries, whose masks are drawn
    together.
    """
    counts = count_masks(pairs)
    query_E = np.arange(len(counts.class_E)) if queries is None else np.array(queries)
    once = np.ones((1, len(counts.class_E)))
    fields = (*(_STANDARD_FIELDS if standard else ()), *_FIELDS)
    statistic, of_groups = mask_statistic(counts, standard), _group_scores(counts)
    values = dict(zip(fields, statistic.of(once)[0].tolist(), strict=True))
    of_classes, of_sizes = _by_group(counts, of_groups(once)[0].tolist())
    ranges: dict[str, Interval] = {}
    class_ranges, size_ranges = dict(ranges), dict(ranges)
    of_class = dict(zip(counts.classes, np.bincount(counts.class_E).tolist(), strict=True))
    if with_intervals:
        ranges = dict(zip(fields, _over_queries(statistic.of, query_E), strict=True))
        class_ranges, size_ranges = _by_group(counts, _over_queries(of_groups, query_E))
        class_ranges = {name: each for name, each in class_ranges.items() if of_class[name] > 1}
    return SegmentationScores(
        once.size,
        **values,
        class_iou=of_classes,
        class_episodes=of_class,
        intervals=ranges,
        class_intervals=class_ranges,
        size_iou=of_sizes,
        size_episodes={name: counts.size_E.count(name) for name in counts.sizes},
        size_intervals=size_ranges,
        **(_fold_fields(counts, standard) if standard else {}),
    )


def _over_queries(scores: "_Scores", query_E: np.ndarray) -> list[Interval]:
    """The intervals of scores of masks, from draws of the masks' queries."""
    return intervals(lambda weights_BQ: scores(weights_BQ[:, query_E]), int(query_E.max()) + 1)


def _by_group(counts: MaskCounts, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of each class, and of each size."""
    of_classes, of_sizes = values[: len(counts.classes)], values[len(counts.classes) :]
    return (
        dict(zip(counts.classes, of_classes, strict=True)),
        dict(zip(counts.sizes, of_sizes, strict=True)),
    )


class _Groups:
    """Sums over groups of episodes. group_E: the number of each episode's group, 0 to G - 1, none
    of which is empty.
    """

    def __init__(self, group_E: np.ndarray) -> None:
        self._order_E = np.argsort(group_E, kind="stable")
        self._begins_G = np.flatnonzero(np.diff(group_E[self._order_E], prepend=-1))

    def sums(self, values_BE: np.ndarray) -> np.ndarray:
        """(B, E) -> (B, G)"""
        sums_BG: np.ndarray = np.add.reduceat(values_BE[:, self._order_E], self._begins_G, axis=1)
        return sums_BG

    def shares(self, weights_BE: np.ndarray) -> np.ndarray:
        """The mean weight of each group's episodes, (B, G)."""
        return self.sums(weights_BE) / self.sums(np.ones((1, weights_BE.shape[1])))


_Scores = Callable[[np.ndarray], np.ndarray]
"""A function from weights (B, E) to scores (B, S)."""


def _class_ious(counts: MaskCounts) -> _Scores:
    """IoU_c of each class; NaN where no query of it is drawn, or only queries without any true or
    marked pixel, which tell nothing of it: the IoU of those would be 1. If a class has no others,
    its IoU is 1.
    """
    groups = _Groups(counts.class_E)
    is_empty_1C = groups.sums(counts.either_E[None]) == 0

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        both_BC, either_BC = (
            groups.sums(weights_BE * of_E) for of_E in (counts.both_E, counts.either_E)
        )
        is_known_BC = (either_BC > 0) | (is_empty_1C & (groups.sums(weights_BE) > 0))
        return np.where(is_known_BC, _ratios(both_BC, either_BC), np.nan)

    return scores


def _group_scores(counts: MaskCounts) -> _Scores:
    """IoU_c of each class, and the mean IoU of each size; NaN where nothing of it is drawn."""
    sizes, class_ious, ious_E = counts.sizes, _class_ious(counts), counts.ious_E
    groups = _Groups(np.array([sizes.index(name) for name in counts.size_E]))

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        drawn_BS, sums_BS = (groups.sums(weights) for weights in (weights_BE, weights_BE * ious_E))
        means_BS = np.where(drawn_BS > 0, sums_BS / np.maximum(drawn_BS, 1), np.nan)
        return np.column_stack([class_ious(weights_BE), means_BS])

    return scores


def _standard_scores(counts: MaskCounts, standard: Standard) -> _Scores:
    """A benchmark's mIoU and FB-IoU, and the mIoU of each fold, (B, 2 + F)."""
    fold_of_E = np.array(standard.folds)
    both_E, either_E, counted_E = counts.both_E, counts.either_E, counts.counted_E
    (fold_G, _), group_of_E = np.unique(
        np.stack([fold_of_E, counts.class_E]), axis=1, return_inverse=True
    )
    of_groups, folds = _Groups(group_of_E.reshape(-1)), np.unique(fold_of_E)
    of_folds = _Groups(np.searchsorted(folds, fold_of_E))

    def ratio(
        groups: _Groups, weights_BE: np.ndarray, inter_E: np.ndarray, union_E: np.ndarray
    ) -> np.ndarray:
        unions = np.maximum(groups.sums(weights_BE * union_E), 1)
        found = groups.sums(weights_BE * inter_E) / unions
        return np.where(groups.sums(weights_BE) > 0, found, np.nan)

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        ious_BG = ratio(of_groups, weights_BE, both_E, either_E)
        shares_BG = of_groups.shares(weights_BE)
        fold_mious_BF = np.stack(
            [
                _mean_of_classes(ious_BG[:, fold_G == fold], shares_BG[:, fold_G == fold])
                for fold in folds
            ],
            axis=1,
        )
        front_BF = ratio(of_folds, weights_BE, both_E, either_E)
        back_BF = ratio(of_folds, weights_BE, counted_E - either_E, counted_E - both_E)
        miou_B, fb_iou_B = map(_mean_of_known, (fold_mious_BF, (front_BF + back_BF) / 2))
        return np.column_stack([miou_B, fb_iou_B, fold_mious_BF])

    return scores


def _fold_fields(counts: MaskCounts, standard: Standard) -> dict[str, Any]:
    """The fields of `SegmentationScores` about a benchmark's folds."""
    folds, episodes = np.unique(standard.folds, return_counts=True)
    once = np.ones((1, len(standard.folds)))
    of_folds = _standard_scores(counts, standard)(once)[0, 2:].tolist()
    names = list(map(str, folds.tolist()))
    return {
        "standard": standard.name,
        "fold_miou": dict(zip(names, of_folds, strict=True)),
        "fold_episodes": dict(zip(names, episodes.tolist(), strict=True)),
    }


def _mean_of_classes(ious_BC: np.ndarray, shares_BC: np.ndarray) -> np.ndarray:
    """The mean (B,) over the classes whose IoU is known, each of which weighs as much as the share
    of its queries that was drawn; NaN where nothing was.

    Of all queries once this is the plain mean. In bootstrap draws it keeps the spread of classes
    with few queries: a class of one query is drawn 0, 1, 2 ... times. If it counted once in every
    draw that has it, draws would be like ones without replacement, and intervals too narrow, by a
    quarter where every class has one query.
    """
    shares_BC = np.where(np.isnan(ious_BC), 0.0, shares_BC)
    weighed_B = np.where(shares_BC > 0, shares_BC * ious_BC, 0.0).sum(axis=1)
    drawn_B = shares_BC.sum(axis=1)
    return np.where(drawn_B > 0, weighed_B / np.where(drawn_B > 0, drawn_B, 1), np.nan)


def _mean_of_known(values_BN: np.ndarray) -> np.ndarray:
    """The mean of each row without its NaN; NaN for a row of nothing else."""
    is_known_BN = ~np.isnan(values_BN)
    return _mean_of_classes(values_BN, is_known_BN.astype(np.float64))


def _size(mask_HW: np.ndarray) -> str:
    share = float(mask_HW.mean())
    if share == 0:
        return NOTHING
    return next(name for name, most in SIZES.items() if share < most or most == 1.0)


def mask_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty."""
    return _ratio(int(np.sum(predicted & true)), int(np.sum(predicted | true)))


def _ratio(intersection: int, union: int) -> float:
    return intersection / union if union else 1.0


def _ratios(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """`_ratio`, elementwise."""
    return np.divide(intersections, unions, out=np.ones_like(intersections), where=unions > 0)
