"""Scores the agreement of predicted masks with the true ones."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from icl_moe.bootstrap import Interval, intervals
from icl_moe.tables import percent, percent_range
from icl_moe.tasks.task import ClassScore


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of episodes, all in 0..1.

    miou: the mean over classes of IoU_c = sum over episodes e of class c of |P_e and T_e| / the
        same sum of |P_e or T_e|, the foreground mIoU of few-shot segmentation (Shaban et al. 2017,
        "One-Shot Learning for Semantic Segmentation").
    mean_iou: the mean over episodes of |P_e and T_e| / |P_e or T_e|; 1 if both are empty.
    mae: the mean over episodes of the mean over pixels of |P_e - T_e|, the mean absolute error of
        salient object detection (Perazzi et al. 2012), here of binary masks.
    class_iou: IoU_c of each class; class_episodes: its number of episodes.
    intervals, class_intervals: 95 % intervals over episodes (see bootstrap.py), by score and by
        class; empty if not requested. A class that a draw lacks is left out of that
        draw's miou.
    """

    episodes: int
    miou: float
    mean_iou: float
    mae: float
    class_iou: dict[str, float]
    class_episodes: dict[str, int]
    intervals: dict[str, Interval] = field(default_factory=dict)
    class_intervals: dict[str, Interval] = field(default_factory=dict)

    def cells(self) -> dict[str, str]:
        return {
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
        return {
            "mIoU": percent_range(self.intervals["miou"]),
            "mean IoU": percent_range(self.intervals["mean_iou"]),
            "MAE": f"{low:.3f} – {high:.3f}",
        }

    def by_class(self) -> dict[str, ClassScore]:
        return {
            name: ClassScore(self.class_episodes[name], iou, self.class_intervals.get(name))
            for name, iou in self.class_iou.items()
        }

    def notes(self) -> list[str]:
        return ["MAE is not multiplied by 100."]


def score_masks(
    triples: Iterable[tuple[str, np.ndarray, np.ndarray]], with_intervals: bool = False
) -> SegmentationScores:
    """The scores of (class, predicted mask (H, W), true mask (H, W)), boolean, one per episode, for
    at least one episode.
    """
    names, pixels, errors = [], [], []
    for name, predicted, true in triples:
        names.append(name)
        pixels.append((int(np.sum(predicted & true)), int(np.sum(predicted | true))))
        errors.append(float(np.mean(predicted != true)))
    classes, of_E = np.unique(names, return_inverse=True)
    both_E, either_E = np.array(pixels, dtype=np.float64).T
    ious_E, counts_C = _ratios(both_E, either_E), np.bincount(of_E)

    def scores(weights_BE: np.ndarray) -> np.ndarray:
        """mIoU, mean IoU, MAE and each class's IoU, (B, 3 + C)."""
        one_EC = np.eye(len(classes))[of_E]
        ious_BC = _ratios(weights_BE * both_E @ one_EC, weights_BE * either_E @ one_EC)
        ious_BC[weights_BE @ one_EC == 0] = np.nan
        means_B2 = weights_BE @ np.stack([ious_E, errors], axis=1) / len(names)
        return np.column_stack([np.nanmean(ious_BC, axis=1), means_B2, ious_BC])

    miou, mean_iou, mae, *of_classes = scores(np.ones((1, len(names))))[0].tolist()
    found = intervals(scores, len(names)) if with_intervals else []
    by_name = list(map(str, classes))
    return SegmentationScores(
        len(names),
        miou,
        mean_iou,
        mae,
        dict(zip(by_name, of_classes, strict=True)),
        dict(zip(by_name, counts_C.tolist(), strict=True)),
        dict(zip(("miou", "mean_iou", "mae"), found, strict=False)),
        dict(zip(by_name, found[3:], strict=False)),
    )


def mask_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty."""
    return _ratio(int(np.sum(predicted & true)), int(np.sum(predicted | true)))


def _ratio(intersection: int, union: int) -> float:
    return intersection / union if union else 1.0


def _ratios(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """`_ratio`, elementwise."""
    return np.divide(intersections, unions, out=np.ones_like(intersections), where=unions > 0)
