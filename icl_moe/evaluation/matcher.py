"""The training-free matcher: a cell belongs to the object as far as its features are more like the
examples' object than like the rest of the examples.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = np.round(np.arange(-1.0, 1.0, 0.01), 2)
"""Scores above which a pixel may be taken for the object's."""


def match(query_ND: Tensor, examples_END: Tensor, shares_EN: Tensor) -> Tensor:
    """Scores (N,) of a query's cells: cosine to the mean of the examples' object cells, less cosine
    to the mean of their other cells.

    query_ND, examples_END: features of N cells. shares_EN: how much of each of the E examples'
    cells is object, 0..1; a cell counts on either side by its share.
    """
    inside_D = torch.einsum("en,end->d", shares_EN, examples_END)
    outside_D = torch.einsum("en,end->d", 1 - shares_EN, examples_END)
    direction_D = F.normalize(inside_D, dim=0) - F.normalize(outside_D, dim=0)
    return F.normalize(query_ND, dim=-1) @ direction_D


def cell_shares(masks_RHW: Tensor, grid: int) -> Tensor:
    """The share of each cell that boolean masks cover, (R, grid * grid)."""
    return F.adaptive_avg_pool2d(masks_RHW.float()[:, None], (grid, grid)).flatten(1)


def score_pixels(scores_RN: Tensor, size: int) -> Tensor:
    """Scores of cells as scores of pixels (R, size, size), interpolated bilinearly."""
    grid = round(scores_RN.shape[1] ** 0.5)
    cells_R1gg = scores_RN.view(-1, 1, grid, grid)
    return F.interpolate(cells_R1gg, (size, size), mode="bilinear", align_corners=False)[:, 0]


def iou_above(scores_RP: Tensor, masks_RP: Tensor, edges_T: Tensor) -> np.ndarray:
    """IoU (R, T) of {score > edge} and the masks, for pixels' scores (R, P) and boolean masks, by
    histograms between the edges.
    """
    rows, bins = len(scores_RP), len(edges_T) + 1
    # The number of edges below a score; edge t is exceeded by all of more than t.
    below_RP = torch.bucketize(scores_RP.contiguous(), edges_T)
    flat = (below_RP + torch.arange(rows)[:, None] * bins).flatten()
    all_RB = torch.bincount(flat, minlength=rows * bins).view(rows, bins)
    inside_RB = torch.bincount(flat[masks_RP.flatten()], minlength=rows * bins).view(rows, bins)
    all_RT, inside_RT = (x.flip(1).cumsum(1).flip(1)[:, 1:].double() for x in (all_RB, inside_RB))
    union_RT = all_RT + masks_RP.sum(dim=1, keepdim=True) - inside_RT
    return (inside_RT / union_RT.clamp_min(1)).numpy()
