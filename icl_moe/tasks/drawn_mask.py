"""A mask as decoded from a model's codes: the brightness of each pixel, and the threshold above
which a pixel belongs to the mask.
"""

from dataclasses import dataclass, replace

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
    """

    brightness_HW: np.ndarray
    threshold: float = EVEN
    at_once: bool = False

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
        if not self.at_once:
            return None
        levels_HW, t = np.clip((self.brightness_HW + 1) / 2, 0, 1), self.threshold
        inside_HW = (levels_HW - t) / max(1 - t, 1e-6)
        outside_HW = (t - levels_HW) / max(t, 1e-6)
        return (0.5 + 0.5 * np.maximum(inside_HW, outside_HW)).astype(np.float32)

    def resized(self, height: int, width: int) -> "DrawnMask":
        """The mask at another size, by bilinear interpolation."""
        brightness_11HW = torch.from_numpy(self.brightness_HW)[None, None]
        resized = F.interpolate(
            brightness_11HW, (height, width), mode="bilinear", align_corners=False
        )
        return replace(self, brightness_HW=resized[0, 0].numpy())
