"""Boxes as bins: coordinates normalised by the size of the image, to three decimals."""

from collections.abc import Sequence

import numpy as np

from icl_moe.errors import InputError

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2) as fractions of the image's width and height, 0 <= x1 <= x2 <= 1 and 0 <= y1 <=
y2 <= 1.
"""

_STEPS = 1000


def box_to_bins(box: Sequence[float]) -> tuple[int, ...]:
    """The four bin numbers (0..1000) of a normalised box, rounded to the nearest. Raises InputError
    outside 0..1.
    """
    if len(box) != 4 or not all(0.0 <= value <= 1.0 for value in box):
        raise InputError(
            f"A box must be four fractions (x1, y1, x2, y2) in 0..1, not {tuple(box)}."
        )
    return tuple(round(value * _STEPS) for value in box)


def bins_to_box(bins: Sequence[int]) -> Box:
    """The normalised box of four bin numbers."""
    x1, y1, x2, y2 = (value / _STEPS for value in bins)
    return x1, y1, x2, y2


def normalise_box(
    x: float, y: float, width: float, height: float, image_width: int, image_height: int
) -> Box:
    """A box of x, y, width, height in pixels as fractions of its image, clipped to the image."""

    def fraction(value: float, size: int) -> float:
        return min(max(value / size, 0.0), 1.0)

    return (
        fraction(x, image_width),
        fraction(y, image_height),
        fraction(x + width, image_width),
        fraction(y + height, image_height),
    )


def brightest_box(levels_HW: np.ndarray) -> Box:
    """The box with the largest sum of levels, of all boxes of whole pixels; where levels are
    negative outside of an object and positive in it, the box of the object.

    For every pair of rows Kadane's algorithm finds the best columns (Bentley 1984).
    """
    height, width = levels_HW.shape
    above_hW = np.concatenate([np.zeros((1, width)), levels_HW.cumsum(axis=0, dtype=np.float64)])
    tops_R, bottoms_R = np.triu_indices(height + 1, k=1)
    sum_R = np.full(len(tops_R), -np.inf)
    best_R, found_R2 = sum_R.copy(), np.zeros((len(tops_R), 2), dtype=np.int64)
    start_R = np.zeros(len(tops_R), dtype=np.int64)
    for column in range(width):
        start_R = np.where(sum_R > 0, start_R, column)
        sum_R = np.maximum(sum_R, 0) + above_hW[bottoms_R, column] - above_hW[tops_R, column]
        is_better_R = sum_R > best_R
        best_R = np.where(is_better_R, sum_R, best_R)
        found_R2[is_better_R] = np.stack([start_R, np.full_like(start_R, column + 1)], 1)[
            is_better_R
        ]
    row = int(best_R.argmax())
    left, right = found_R2[row].tolist()
    return left / width, int(tops_R[row]) / height, right / width, int(bottoms_R[row]) / height


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two normalised boxes; 0 if both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0
