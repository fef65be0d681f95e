"""Masks that do not depend on the query: the mean of many masks, and a disc in the middle of the
picture. Where crops are centred on the object they score high, and a model must be compared with
them.
"""

from collections.abc import Sequence

import numpy as np

from icl_moe.tasks.mask_scores import mask_iou, score_masks

RADII = tuple(step / 20 for step in range(1, 15))
"""Radii to choose from, in fractions of the picture's side; the last one nearly covers it."""


def disc(size: int, radius: float) -> np.ndarray:
    """The boolean mask (size, size) of the pixels whose centres are within a radius of the middle,
    in fractions of the side.
    """
    middle = (np.arange(size) + 0.5) / size - 0.5
    return middle[:, None] ** 2 + middle[None, :] ** 2 <= radius**2


def fitted_disc(masks: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The disc whose mIoU with masks (S, S) of classes is the highest, of those with the radii
    `RADII`; of equal ones the smallest.
    """
    size = len(masks[0][1])
    discs = [disc(size, radius) for radius in RADII]
    mious = [
        score_masks((name, disc_HW, mask_HW) for name, mask_HW in masks).miou for disc_HW in discs
    ]
    return discs[int(np.argmax(mious))]


def mean_mask(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Where the mean of the masks (H, W) is above the level at which it has the highest mean IoU
    with them; boolean (H, W).
    """
    mean_HW = np.mean(masks, axis=0)
    levels = np.linspace(0, mean_HW.max(), 11)[:-1]
    candidates = [mean_HW > level for level in levels]
    agreements = [
        np.mean([mask_iou(candidate_HW, mask_HW) for mask_HW in masks])
        for candidate_HW in candidates
    ]
    return candidates[int(np.argmax(agreements))]
