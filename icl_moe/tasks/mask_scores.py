"""How well predicted masks agree with the true ones."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from icl_moe.tables import percent


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of episodes, all in 0..1.

    miou: the mean over classes of IoU_c = sum over episodes e of class c of |P_e and T_e| / the
        same sum of |P_e or T_e|, the foreground mIoU of few-shot segmentation (Shaban et al. 2017,
        "One-Shot Learning for Semantic Segmentation").
    mean_iou: the mean over episodes of |P_e and T_e| / |P_e or T_e|; 1 where both are empty.
    mae: the mean over episodes of the mean over pixels of |P_e - T_e|, the mean absolute error of
        salient object detection (Perazzi et al. 2012), here of binary masks.
    class_iou: IoU_c of each class, and class_episodes how many episodes it had.
    """

    episodes: int
    miou: float
    mean_iou: float
    mae: float
    class_iou: dict[str, float]
    class_episodes: dict[str, int]

    def cells(self) -> dict[str, str]:
        return {
            "mIoU": percent(self.miou),
            "mean IoU": percent(self.mean_iou),
            "MAE": f"{self.mae:.3f}",
        }

    def figures(self) -> dict[str, float]:
        return {"miou": self.miou, "mean_iou": self.mean_iou, "mae": self.mae}

    def by_class(self) -> dict[str, tuple[int, float]]:
        return {name: (self.class_episodes[name], iou) for name, iou in self.class_iou.items()}

    def notes(self) -> list[str]:
        return ["MAE is not times 100."]


def score_masks(triples: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> SegmentationScores:
    """Scores of (class, predicted mask (H, W), true mask (H, W)), boolean, one an episode; at least
    one.
    """
    intersections: dict[str, int] = {}
    unions: dict[str, int] = {}
    counts: dict[str, int] = {}
    ious, errors = [], []
    for name, predicted, true in triples:
        intersection, union = int(np.sum(predicted & true)), int(np.sum(predicted | true))
        intersections[name] = intersections.get(name, 0) + intersection
        unions[name] = unions.get(name, 0) + union
        counts[name] = counts.get(name, 0) + 1
        ious.append(_ratio(intersection, union))
        errors.append(float(np.mean(predicted != true)))
    class_iou = {name: _ratio(intersections[name], unions[name]) for name in sorted(counts)}
    miou = float(np.mean(list(class_iou.values())))
    return SegmentationScores(
        len(ious),
        miou,
        float(np.mean(ious)),
        float(np.mean(errors)),
        class_iou,
        dict(sorted(counts.items())),
    )


def mask_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 where both are empty."""
    return _ratio(int(np.sum(predicted & true)), int(np.sum(predicted | true)))


def _ratio(intersection: int, union: int) -> float:
    return intersection / union if union else 1.0
