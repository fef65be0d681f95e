"""A mask that does not depend on the query: a disc in the middle of the picture. Where crops are
centred on the object, it scores high, and a model must be compared with it.
"""

from collections.abc import Sequence

import numpy as np

from icl_moe.tasks.mask_scores import score_masks

RADII = tuple(step / 20 for step in range(1, 15))
"""Radii to choose from, in fractions of the picture's side; the last one nearly covers it."""

_FITTED_ON = 256
"""Masks, at most."""


def disc(size: int, radius: float) -> np.ndarray:
    """The boolean mask (size, size) of the pixels whose centres are within a radius of the middle,
    in fractions of the side.
    """
    middle = (np.arange(size) + 0.5) / size - 0.5
    return middle[:, None] ** 2 + middle[None, :] ** 2 <= radius**2


def fitted_disc(masks: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The disc whose mIoU with masks (S, S) of classes is the highest, of those with the radii
    `RADII`; of equal ones the smallest. It is fitted to at most 256 of the masks, evenly spaced.
    """
    masks = masks[:: -(-len(masks) // _FITTED_ON)]
    size = len(masks[0][1])
    discs = [disc(size, radius) for radius in RADII]
    mious = [score_masks((name, each, mask_HW) for name, mask_HW in masks).miou for each in discs]
    return discs[int(np.argmax(mious))]
