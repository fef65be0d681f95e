"""Scores the agreement of predicted masks with the true ones."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from icl_moe.bootstrap import Interval, intervals
from icl_moe.tables import percent, percent_range
from icl_moe.tasks.task import GroupScore

SIZES = {"under 3 %": 0.03, "3 to 20 %": 0.2, "over 20 %": 1.0}
"""The sizes of objects, by the largest share of the picture's pixels that the true mask may mark.
COCO's border between medium and large, 96 x 96 pixels, is 3 % of a picture of 640 x 480.
"""


class Standard(NamedTuple):
    """The published benchmark that episodes are of, and the fold of each episode."""

    name: str
    folds: tuple[int, ...]


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of episodes, all in 0..1.

    miou: the mean over classes of IoU_c = sum over episodes e of class c of |P_e and T_e| / the
        same sum of |P_e or T_e|, the foreground mIoU of few-shot segmentation (Shaban et al. 2017,
        "One-Shot Learning for Semantic Segmentation").
    mean_iou: the mean over episodes of |P_e and T_e| / |P_e or T_e|; 1 if both are empty.
    mae: the mean over episodes of the mean over pixels of |P_e - T_e|, the mean absolute error of
        salient object detection (Perazzi et al. 2012), here of binary masks.
    class_iou: IoU_c of each class, and class_episodes how many episodes it had.
    size_iou: mean_iou of the episodes of each of `SIZES` that occurs, and size_episodes how many
        there were.
    intervals, class_intervals, size_intervals: 95 % intervals over episodes (see bootstrap.py), by
        score, by class and by size; empty where they were not asked for. A class or a size that a
        draw lacks is left out of that draw.
    standard, standard_miou, fold_miou: of episodes of a published benchmark, its name and its own
        mIoU: of each fold the mean over its classes of IoU_c, where a class that is neither there
        nor marked has 0; then the mean over the folds. fold_episodes: how many a fold had.
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
    fold_miou: dict[str, float] = field(default_factory=dict)
    fold_episodes: dict[str, int] = field(default_factory=dict)

    def cells(self) -> dict[str, str]:
        own = {f"{self.standard} mIoU": percent(self.standard_miou)} if self.standard else {}
        return {
            **own,
            "mIoU": percent(self.miou),
            "mean IoU": percent(self.mean_iou),
            "MAE": f"{self.mae:.3f}",
        }

    def figures(self) -> dict[str, float]:
        return {"miou": self.miou, "mean_iou": self.mean_iou, "mae": self.mae}

    def ranges(self) -> dict[str, str]:
        if not self.intervals:
            return {}
        low, high = self.intervals["mae"]
        of_standard = percent_range(self.intervals.get("standard_miou"))
        return {
            **({f"{self.standard} mIoU": of_standard} if self.standard else {}),
            "mIoU": percent_range(self.intervals["miou"]),
            "mean IoU": percent_range(self.intervals["mean_iou"]),
            "MAE": f"{low:.3f} – {high:.3f}",
        }

    def groups(self) -> dict[str, dict[str, GroupScore]]:
        of_folds = _group_scores(self.fold_episodes, self.fold_miou, {})
        return {
            **({"fold": of_folds} if self.standard else {}),
            "class": _group_scores(self.class_episodes, self.class_iou, self.class_intervals),
            "size of the object": _group_scores(
                self.size_episodes, self.size_iou, self.size_intervals
            ),
        }

    def notes(self) -> list[str]:
        return ["MAE is not multiplied by 100."]


def _group_scores(
    episodes: dict[str, int], scores: dict[str, float], ranges: dict[str, Interval]
) -> dict[str, GroupScore]:
    return {
        name: GroupScore(episodes[name], score, ranges.get(name)) for name, score in scores.items()
    }


def score_masks(
    triples: Iterable[tuple[str, np.ndarray, np.ndarray]],
    with_intervals: bool = False,
    standard: Standard | None = None,
) -> SegmentationScores:
    """The scores of (class, predicted mask (H, W), true mask (H, W)), boolean, one per episode, for
    at least one episode. standard: the benchmark that the episodes are of.
    """
    names, pixels, errors, sizes = [], [], [], []
    for name, predicted, true in triples:
        names.append(name)
        pixels.append((int(np.sum(predicted & true)), int(np.sum(predicted | true))))
        errors.append(float(np.mean(predicted != true)))
        sizes.append(_size(true))
    classes, of_E = np.unique(names, return_inverse=True)
    both_E, either_E = np.array(pixels, dtype=np.float64).T
    ious_E, counts_C = _ratios(both_E, either_E), np.bincount(of_E)
    size_names = [name for name in SIZES if name in sizes]
    is_size_ES = np.array(sizes)[:, None] == np.array(size_names)

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        """mIoU, mean IoU, MAE, each class's IoU and each size's mean IoU, (B, 3 + C + S)."""
        one_EC = np.eye(len(classes))[of_E]
        drawn_BS = weights_BE @ is_size_ES
        of_sizes_BS = weights_BE @ (ious_E[:, None] * is_size_ES) / np.where(drawn_BS, drawn_BS, 1)
        ious_BC = _ratios(weights_BE * both_E @ one_EC, weights_BE * either_E @ one_EC)
        ious_BC[weights_BE @ one_EC == 0] = np.nan
        means_B2 = weights_BE @ np.stack([ious_E, errors], axis=1) / len(names)
        of_sizes_BS[drawn_BS == 0] = np.nan
        return np.column_stack([np.nanmean(ious_BC, axis=1), means_B2, ious_BC, of_sizes_BS])

    miou, mean_iou, mae, *of_groups = scores(np.ones((1, len(names))))[0].tolist()
    of_classes, of_sizes = of_groups[: len(classes)], of_groups[len(classes) :]
    found = intervals(scores, len(names)) if with_intervals else []
    of_standard = (
        _standard_scores(standard, of_E, both_E, either_E, with_intervals) if standard else {}
    )
    ranges = dict(zip(("miou", "mean_iou", "mae"), found, strict=False))
    by_name = list(map(str, classes))
    return SegmentationScores(
        len(names),
        miou,
        mean_iou,
        mae,
        dict(zip(by_name, of_classes, strict=True)),
        dict(zip(by_name, counts_C.tolist(), strict=True)),
        ranges | of_standard.pop("intervals", {}),
        dict(zip(by_name, found[3:], strict=False)),
        dict(zip(size_names, of_sizes, strict=True)),
        {name: sizes.count(name) for name in size_names},
        dict(zip(size_names, found[3 + len(classes) :], strict=False)),
        **of_standard,
    )


def _standard_scores(
    standard: Standard,
    of_E: np.ndarray,
    both_E: np.ndarray,
    either_E: np.ndarray,
    with_intervals: bool,
) -> dict[str, Any]:
    """The fields of `SegmentationScores` about a benchmark, and the interval of its mIoU. of_E: the
    number of each episode's class. both_E, either_E: pixels of its intersection and union.
    """
    fold_of_E = np.array(standard.folds)
    (fold_G, _), group_of_E = np.unique(np.stack([fold_of_E, of_E]), axis=1, return_inverse=True)
    one_EG, folds = np.eye(len(fold_G))[group_of_E.reshape(-1)], np.unique(fold_of_E)

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        """The mIoU, and that of each fold, (B, 1 + F)."""
        unions_BG = weights_BE * either_E @ one_EG
        ious_BG = weights_BE * both_E @ one_EG / np.maximum(unions_BG, 1)
        ious_BG[weights_BE @ one_EG == 0] = np.nan
        of_folds = [_mean_of_known(ious_BG[:, fold_G == fold]) for fold in folds]
        return np.column_stack([_mean_of_known(np.stack(of_folds, axis=1)), *of_folds])

    miou, *of_folds = scores(np.ones((1, len(of_E))))[0].tolist()
    return {
        "standard": standard.name,
        "standard_miou": miou,
        "fold_miou": dict(zip(map(str, folds.tolist()), of_folds, strict=True)),
        "fold_episodes": {str(fold): int((fold_of_E == fold).sum()) for fold in folds.tolist()},
        "intervals": {"standard_miou": intervals(scores, len(of_E))[0]} if with_intervals else {},
    }


def _mean_of_known(values_BN: np.ndarray) -> np.ndarray:
    """The mean of each row without its NaN; NaN for a row of nothing else."""
    is_known_BN = ~np.isnan(values_BN)
    known_B = is_known_BN.sum(axis=1)
    sums_B = np.where(is_known_BN, values_BN, 0.0).sum(axis=1)
    return np.where(known_B, sums_B / np.maximum(known_B, 1), np.nan)


def _size(mask_HW: np.ndarray) -> str:
    share = float(mask_HW.mean())
    return next(name for name, most in SIZES.items() if share < most or most == 1.0)


def mask_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty."""
    return _ratio(int(np.sum(predicted & true)), int(np.sum(predicted | true)))


def _ratio(intersection: int, union: int) -> float:
    return intersection / union if union else 1.0


def _ratios(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """`_ratio`, elementwise."""
    return np.divide(intersections, unions, out=np.ones_like(intersections), where=unions > 0)
