"""A mask as decoded from a model's codes: the brightness of each pixel, and the threshold above
which a pixel belongs to the mask. And the masks of several classes in one picture.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

EVEN = 0.5
"""The threshold of masks that were decoded code by code, and of models without a fitted one."""


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """brightness_HW: float32, about -1 (black: outside) to 1 (inside).

    threshold: a level in 0..1 from black to white; brighter pixels belong to the mask.
    at_once: whether the mask was decoded in one pass, so that its brightness reflects the model's
    confidence.
    log_probability: of a mask that was decoded code by code, the mean over its codes.
    windows: how many windows were read beside the whole image.
    """

    brightness_HW: np.ndarray
    threshold: float = EVEN
    at_once: bool = False
    log_probability: float | None = None
    windows: int = 0

    @property
    def mask_HW(self) -> np.ndarray:
        """The boolean mask."""
        return self.brightness_HW > 2 * self.threshold - 1

    @property
    def confidence_HW(self) -> np.ndarray | None:
        """The confidence in each pixel of the mask, float32: 0.5 at the threshold, 1 for white or
        black. None for a mask that was decoded code by code, whose brightness does not reflect
        confidence.
        """
        return self._confidence(self.brightness_HW) if self.at_once else None

    def score(self, part_HW: np.ndarray | None = None) -> float | None:
        """How sure the model is of the mask, or of the pixels `part_HW` of it.

        Decoded in one pass: the mean confidence of the pixels, 0.5 to 1; if there are none, the
        confidence of the pixel that comes closest to being marked. Decoded code by code: the
        geometric mean of the codes' probabilities, for any part; None if it is not known.
        """
        if not self.at_once:
            return None if self.log_probability is None else math.exp(self.log_probability)
        marked = self.brightness_HW[self.mask_HW if part_HW is None else part_HW]
        return float(self._confidence(marked if marked.size else self.brightness_HW.max()).mean())

    def _confidence(self, brightness: np.ndarray) -> np.ndarray:
        levels, t = np.clip((brightness + 1) / 2, 0, 1), self.threshold
        inside, outside = (levels - t) / max(1 - t, 1e-6), (t - levels) / max(t, 1e-6)
        return (0.5 + 0.5 * np.maximum(inside, outside)).astype(np.float32)

    def resized(self, height: int, width: int) -> "DrawnMask":
        """The mask at another size, by bilinear interpolation."""
        brightness_11HW = torch.from_numpy(self.brightness_HW)[None, None]
        resized = F.interpolate(
            brightness_11HW, (height, width), mode="bilinear", align_corners=False
        )
        return replace(self, brightness_HW=resized[0, 0].numpy())


@dataclass(frozen=True, eq=False)
class DrawnClasses:
    """The masks of several classes in one picture, by the classes' names. They may overlap."""

    masks: Mapping[str, DrawnMask]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.masks)

    def disjoint(self) -> Iterator[tuple[DrawnMask, np.ndarray]]:
        """Each class's mask as it was drawn, and boolean (H, W) without the pixels that the label
        map gives to another class.
        """
        for number, drawn in enumerate(self.masks.values(), 1):
            yield drawn, drawn.mask_HW if len(self.masks) == 1 else self.labels_HW == number

    @cached_property
    def labels_HW(self) -> np.ndarray:
        """The label map: n in the pixels of the n-th class, counted from 1, and 0 elsewhere; uint8,
        or uint16 for more than 255 classes.

        A pixel of several masks gets the class of the greatest confidence, and of the greatest
        `score` where masks were decoded code by code; the first one in a tie.
        """
        shape = next(iter(self.masks.values())).brightness_HW.shape
        labels_HW = np.zeros(shape, np.uint8 if len(self.masks) < 256 else np.uint16)
        best_HW = np.full(shape, -np.inf, np.float32)
        for number, drawn in enumerate(self.masks.values(), 1):
            sure_HW = drawn.confidence_HW
            if sure_HW is None:
                sure_HW = np.full(shape, drawn.score() or 0.0, np.float32)
            wins_HW = drawn.mask_HW & (sure_HW > best_HW)
            labels_HW[wins_HW] = number
            best_HW[wins_HW] = sure_HW[wins_HW]
        return labels_HW
