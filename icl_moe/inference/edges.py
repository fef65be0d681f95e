"""Masks whose outlines follow the edges of the image: the guided filter (He, Sun and Tang 2013,
"Guided Image Filtering"), computed at a small size and applied at the image's own size, as in the
"Fast Guided Filter" (He and Sun 2015).

A model decides cell by cell, so the outlines that it draws are as coarse as its cells. The filter
assumes that the brightness of the mask is a linear function of the image's colours in each window:

    brightness = a . colour + b

with the a and b of the least squared error over the window, plus epsilon |a|^2. Where colours vary
by much less than sqrt(epsilon), a is 0 and the brightness is the mean of the window; at an edge
between two colours the brightness changes where they do. A pixel takes the mean a and b of all
windows that contain it.

The filter blurs, so that the brightness no longer is the probability that a pixel belongs to the
object, which a mask and its score are computed from. A logistic curve makes it one again (Platt
1999, "Probabilistic Outputs for Support Vector Machines").
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from icl_moe.images import to_pixels, to_square_pixels
from icl_moe.tasks.drawn_mask import DrawnMask

_SIDE = 128
"""The most pixels of a side at which the lines of windows are computed."""

_MOST = 0.9998
"""The brightness of a pixel that counts as sure; 1 would have infinite log odds."""


@dataclass(frozen=True)
class EdgeFilter:
    """The settings of the filter. radius: the radius of the square windows, as a share of the
    image's side. epsilon: the variance of a colour, from 0 to 1, below which a window counts as
    flat. slope, offset: the slope and offset of the logistic curve.
    """

    radius: float
    epsilon: float
    slope: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, fitted: Mapping[str, Any] | None) -> "EdgeFilter | None":
        """That of a configuration's `mask_edges`."""
        return None if fitted is None else cls(*(fitted[field.name] for field in fields(cls)))

    def calibrated(self, filtered: DrawnMask) -> DrawnMask:
        """A filtered mask, on the logistic curve."""
        log_odds_HW = log_odds(torch.from_numpy(filtered.brightness_HW))
        calibrated_HW = (self.slope * log_odds_HW + self.offset) / 2
        return replace(filtered, brightness_HW=calibrated_HW.tanh().numpy())


def log_odds(brightness: torch.Tensor) -> torch.Tensor:
    """The log odds of p = (brightness + 1) / 2."""
    return 2 * brightness.clamp(-_MOST, _MOST).atanh()


def follow_edges(drawn: DrawnMask, guide: Image.Image, edges: EdgeFilter) -> DrawnMask:
    """A mask in the size of `guide`, the image that it marks (RGB, of any size), with outlines that
    follow the edges of the image.

    Only masks that were decoded in one pass are filtered, and whether anything is marked at all is
    decided before it; all others are resized.
    """
    if not drawn.at_once or drawn.level == 1:
        return drawn.resized(guide.height, guide.width)
    side = min(drawn.brightness_HW.shape[0], _SIDE)
    brightness_HW = torch.from_numpy(drawn.brightness_HW).clamp(-1, 1)
    brightness_HW = F.adaptive_avg_pool2d(brightness_HW[None], side)[0]
    line_4HW = _fitted_lines(brightness_HW, _colours(to_square_pixels(guide, side)), edges)
    size = (guide.height, guide.width)
    line_4HW = F.interpolate(line_4HW[None], size, mode="bilinear", align_corners=False)[0]
    filtered_HW = _on_line(line_4HW, _colours(to_pixels(guide))).clamp(-1, 1).numpy()
    if min(guide.size) > side:
        # The lines are of a smaller image, in which noise is weaker than in this one.
        median = Image.fromarray(filtered_HW).filter(ImageFilter.MedianFilter(3))
        filtered_HW = np.array(median)
    return edges.calibrated(replace(drawn, brightness_HW=filtered_HW, threshold=0.0))


def _colours(pixels_3HW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as colours from 0 to 1."""
    return (pixels_3HW + 1) / 2


def _on_line(line_4HW: torch.Tensor, colours_3HW: torch.Tensor) -> torch.Tensor:
    """a . colour + b, of which a_3HW and b_HW are stacked."""
    return (line_4HW[:3] * colours_3HW).sum(dim=0) + line_4HW[3]


def _fitted_lines(
    brightness_HW: torch.Tensor, colours_3HW: torch.Tensor, edges: EdgeFilter
) -> torch.Tensor:
    """The mean a and b of the windows around each pixel, stacked (4, H, W), float32."""
    radius = max(1, round(edges.radius * brightness_HW.shape[0]))
    p_1HW, i_3HW = brightness_HW[None].double(), colours_3HW.double()
    rows, columns = torch.triu_indices(3, 3)
    means = _window_means(
        torch.cat([p_1HW, i_3HW, i_3HW * p_1HW, i_3HW[rows] * i_3HW[columns]]), radius
    )
    mean_p_HW, mean_3HW, mean_ip_3HW, mean_ii_6HW = means.split([1, 3, 3, 6])
    covariance_3HW = mean_ip_3HW - mean_3HW * mean_p_HW
    rr, rg, rb, gg, gb, bb = mean_ii_6HW - mean_3HW[rows] * mean_3HW[columns]
    e = edges.epsilon
    red, green, blue = map(torch.stack, ((rr + e, rg, rb), (rg, gg + e, gb), (rb, gb, bb + e)))
    # Cramer's rule; the matrix of variances and covariances is symmetric.
    by_red = torch.linalg.cross(green, blue, dim=0)
    by_green = torch.linalg.cross(blue, red, dim=0)
    by_blue = torch.linalg.cross(red, green, dim=0)
    determinant_HW = (red * by_red).sum(dim=0)
    c_red, c_green, c_blue = covariance_3HW
    a_3HW = (c_red * by_red + c_green * by_green + c_blue * by_blue) / determinant_HW
    b_1HW = mean_p_HW - (a_3HW * mean_3HW).sum(dim=0)
    return _window_means(torch.cat([a_3HW, b_1HW]), radius).float()


def _window_means(x_CHW: torch.Tensor, radius: int) -> torch.Tensor:
    """The mean over the window of (2 radius + 1)^2 pixels around each pixel, without what lies
    beyond the border.
    """
    for axis in (1, 2):
        length = x_CHW.shape[axis]
        sums = F.pad(x_CHW.cumsum(dim=axis), (0, 0, 1, 0) if axis == 1 else (1, 0))
        places = torch.arange(length)
        ends, starts = (places + radius + 1).clamp(max=length), (places - radius).clamp(min=0)
        counts = (ends - starts).view(-1, 1) if axis == 1 else ends - starts
        x_CHW = (sums.index_select(axis, ends) - sums.index_select(axis, starts)) / counts
    return x_CHW
