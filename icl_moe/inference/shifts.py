"""Shifted readings of a query: it is read four times, moved by half a cell, and the masks are
averaged.

A model decides cell by cell. In a shifted image the borders of the cells lie elsewhere, and errors
of single readings weigh less in the mean.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.tasks.segmentation import SegmentationPair

if TYPE_CHECKING:
    from icl_moe.inference.model import Decoding

READINGS = 4
"""How often a query is read."""


def check_shifts(decoding: "Decoding") -> None:
    """Raise InputError unless masks are decoded in one pass: the brightness of others does not
    reflect how sure the model is.
    """
    if decoding == "autoregressive":
        raise InputError(
            "Shifted readings need masks in one pass, which this model does not support or the "
            "decoding or sampling excludes."
        )


def shifted_views(pixels_3HW: Tensor, cells: int) -> list[Tensor]:
    """An image of `cells` cells, and the same moved by half a cell to the left, upwards, and both.
    What moves in at the other side is mirrored at the edge.
    """
    height, width = pixels_3HW.shape[1:]
    half = _half(width, cells)
    wider_3HW = F.pad(pixels_3HW[None], (0, half, 0, half), mode="reflect")[0]
    return [wider_3HW[:, y : y + height, x : x + width] for x, y in _corners(half)]


def fused_views(pairs: Sequence[SegmentationPair]) -> SegmentationPair:
    """The first pair with the mean of the masks of all pairs, which are of `shifted_views`: each
    pixel's mean is over the readings that contain it. They were decoded in one pass.
    """
    drawn = [pair.drawn for pair in pairs if pair.drawn is not None]
    (height, width), cells = drawn[0].brightness_HW.shape, len(pairs[0].image)
    total_HW = np.zeros((height, width), dtype=np.float32)
    count_HW = np.zeros_like(total_HW)
    for (x, y), mask in zip(_corners(_half(width, cells)), drawn, strict=True):
        total_HW[y:, x:] += mask.brightness_HW[: height - y, : width - x]
        count_HW[y:, x:] += 1
    return replace(pairs[0], drawn=replace(drawn[0], brightness_HW=total_HW / count_HW))


def _half(side: int, cells: int) -> int:
    """Half the side of a cell in pixels, in an image of `cells` cells."""
    return side // math.isqrt(cells) // 2


def _corners(half: int) -> Iterator[tuple[int, int]]:
    """How far the readings are moved, (x, y) in pixels."""
    return ((x, y) for x in (0, half) for y in (0, half))
