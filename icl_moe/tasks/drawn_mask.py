"""A mask as decoded from a model's codes: the brightness of each pixel, and the level above which a
pixel belongs to the mask. And the masks of several classes in one picture.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

_SAMPLE = 256
"""The pixels of a side from which a mask's level is chosen; larger masks are sampled."""


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """brightness_HW: float32, about -1 (black: outside) to 1 (inside).

    at_once: whether the mask was decoded in one pass, so that its brightness reflects the model's
    confidence.
    threshold: the least expected IoU (see `expected_iou`) at which anything is marked.
    log_probability: the mean log-probability of the codes, if the mask was decoded code by code.
    windows: how many windows were read in addition to the whole image.
    """

    brightness_HW: np.ndarray
    at_once: bool = False
    threshold: float = 0.0
    log_probability: float | None = None
    windows: int = 0

    @property
    def mask_HW(self) -> np.ndarray:
        """The boolean mask."""
        return _levels(self.brightness_HW) > self.level

    @property
    def level(self) -> float:
        """The level, from black (0) to white (1), above which a pixel belongs to the mask: the
        middle for a mask that was decoded code by code. For a mask that was decoded in one pass, it
        is the level of the greatest expected IoU; or 1, so that nothing is marked, if that IoU is
        less than `threshold`.
        """
        if not self.at_once:
            return 0.5
        level, iou = self._best
        return level if 0 < iou >= self.threshold else 1.0

    @property
    def expected_iou(self) -> float:
        """The greatest expected IoU of a mask of all pixels above one level, if a pixel belongs to
        the object with a probability p equal to its own level (Nowozin 2014, "Optimal Decisions
        from Probabilistic Models: The Intersection-over-Union Case"):

            sum of p inside / (pixels inside + sum of p outside)

        This is the expected intersection over the expected union. The level of that mask is high
        where a model is sure of an object's outline, and low where it only suspects the object.
        """
        return self._best[1]

    @cached_property
    def _best(self) -> tuple[float, float]:
        """The level of the greatest expected IoU, and that IoU."""
        step = max(1, -(-min(self.brightness_HW.shape) // _SAMPLE))
        p_N = np.sort(_levels(self.brightness_HW[::step, ::step]), axis=None)[::-1]
        inside_N = np.cumsum(p_N, dtype=np.float64)
        iou_N = inside_N / (np.arange(1, p_N.size + 1) + inside_N[-1] - inside_N)
        last = int(iou_N.argmax())
        outside = p_N[last + 1] if last + 1 < p_N.size else 0.0
        return float(p_N[last] + outside) / 2, float(iou_N[last])

    @property
    def confidence_HW(self) -> np.ndarray | None:
        """The confidence in each pixel of the mask, float32: 0.5 at the level, 1 for white or
        black. None for a mask that was decoded code by code, whose brightness does not reflect
        confidence.
        """
        return self._confidence(self.brightness_HW) if self.at_once else None

    def score(self, marked_HW: np.ndarray | None = None) -> float | None:
        """How sure the model is of the mask, or of the mask `marked_HW` in its place, 0 to 1.

        Decoded in one pass: the expected IoU of the marked pixels and the object (see
        `expected_iou`). If nothing is marked: the confidence, 0.5 to 1, of the pixel that comes
        closest to being marked; and where `marked_HW` leaves nothing of a mask, 1 less the score of
        that mask. Decoded code by code: the geometric mean of the codes' probabilities, whatever is
        marked; None if it is not known.
        """
        if not self.at_once:
            return None if self.log_probability is None else math.exp(self.log_probability)
        marked_HW = self.mask_HW if marked_HW is None else marked_HW
        if marked_HW.any():
            levels_HW = _levels(self.brightness_HW)
            inside = levels_HW[marked_HW].sum(dtype=np.float64)
            outside = levels_HW[~marked_HW].sum(dtype=np.float64)
            return float(inside / (np.count_nonzero(marked_HW) + outside))
        own_HW = self.mask_HW
        if own_HW.any():
            return 1 - (self.score(own_HW) or 0.0)
        return float(self._confidence(self.brightness_HW.max()))

    def score_of_part(self, part_HW: np.ndarray, marked_HW: np.ndarray) -> float | None:
        """The score of the pixels `part_HW` of the mask `marked_HW`: the mask's score, in
        proportion to the part's mean level.
        """
        whole = self.score(marked_HW)
        if whole is None or not self.at_once:
            return whole
        means = (
            _levels(self.brightness_HW[each_HW]).mean(dtype=np.float64)
            for each_HW in (part_HW, marked_HW)
        )
        return float(whole * next(means) / max(next(means), 1e-12))

    def _confidence(self, brightness: np.ndarray) -> np.ndarray:
        levels, t = _levels(brightness), self.level
        inside, outside = (levels - t) / max(1 - t, 1e-6), (t - levels) / max(t, 1e-6)
        return (0.5 + 0.5 * np.maximum(inside, outside)).astype(np.float32)

    def each(self, change: "Callable[[DrawnMask], DrawnMask]") -> "DrawnMask":
        """The changed mask; see `DrawnClasses.each`."""
        return change(self)

    def resized(self, height: int, width: int) -> "DrawnMask":
        """The mask at another size, by bilinear interpolation."""
        brightness_11HW = torch.from_numpy(self.brightness_HW)[None, None]
        resized = F.interpolate(
            brightness_11HW, (height, width), mode="bilinear", align_corners=False
        )
        return replace(self, brightness_HW=resized[0, 0].numpy())


def _levels(brightness: np.ndarray) -> np.ndarray:
    """Brightness as levels from black, 0, to white, 1."""
    return np.clip((brightness + 1) / 2, 0, 1)


@dataclass(frozen=True, eq=False)
class DrawnClasses:
    """The masks of several classes in one picture, by the classes' names. They may overlap."""

    masks: Mapping[str, DrawnMask]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.masks)

    def each(self, change: Callable[[DrawnMask], DrawnMask]) -> "DrawnClasses":
        """The same classes, with the changed mask of each."""
        return DrawnClasses({name: change(drawn) for name, drawn in self.masks.items()})

    def disjoint_masks(self) -> dict[str, np.ndarray]:
        """The mask, boolean (H, W), of each class that the label map gives any pixel."""
        parts = zip(self.masks, self.disjoint(), strict=True)
        return {name: mask_HW for name, (_, mask_HW) in parts if mask_HW.any()}

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
