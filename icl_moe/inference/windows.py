"""Windows over a query: what the whole image shows is read again from closer up.

A model reads every image at one size, in which small objects lose their form. The whole image is
read first, then overlapping windows of half its width and height wherever something was found, with
the same examples.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from icl_moe.images import PixelBox
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask

_LEAST_FOUND = 0.01
"""The share of a window that must be marked for it to be read."""

_LEAST_SIDE = 8
"""Images with a shorter side, in pixels, have no windows."""


def windows_of(found_HW: np.ndarray) -> list[PixelBox]:
    """The windows in which something was found. The windows form a grid of 3 x 3; each has half the
    image's width and height, so that neighbours overlap by half.
    """
    height, width = found_HW.shape
    if min(height, width) < _LEAST_SIDE:
        return []
    corners = [(x * width // 4, y * height // 4) for y in range(3) for x in range(3)]
    boxes = [(x, y, x + width // 2, y + height // 2) for x, y in corners]
    return [
        (left, top, right, bottom)
        for left, top, right, bottom in boxes
        if found_HW[top:bottom, left:right].mean() >= _LEAST_FOUND
    ]


def found_in(drawn: DrawnMask | DrawnClasses) -> np.ndarray:
    """Where anything is marked, boolean (H, W)."""
    return drawn.mask_HW if isinstance(drawn, DrawnMask) else drawn.labels_HW > 0


def fuse(
    whole: DrawnMask | DrawnClasses,
    boxes: Sequence[PixelBox],
    parts: Sequence[DrawnMask | DrawnClasses],
) -> DrawnMask | DrawnClasses:
    """The masks of an image and of its windows, as one mask; of several classes, one for each.

    The brightness of a pixel is the mean over all masks that contain it. So each of them counts by
    its confidence there: where the model is unsure, the brightness is close to the threshold.
    """
    if isinstance(whole, DrawnClasses):
        return DrawnClasses(
            {
                name: _fused(of_class, boxes, [part.masks[name] for part in parts])  # type: ignore
                for name, of_class in whole.masks.items()
            }
        )
    return _fused(whole, boxes, parts)  # type: ignore[arg-type]


def _fused(whole: DrawnMask, boxes: Sequence[PixelBox], parts: Sequence[DrawnMask]) -> DrawnMask:
    total_HW = whole.brightness_HW.copy()
    count_HW = np.ones_like(total_HW)
    for (left, top, right, bottom), part in zip(boxes, parts, strict=True):
        total_HW[top:bottom, left:right] += part.brightness_HW
        count_HW[top:bottom, left:right] += 1
    return replace(whole, brightness_HW=total_HW / count_HW, windows=len(boxes))
