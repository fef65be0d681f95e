"""The examples that are nearest to a query, by the model's own reading of images.

Zhang, Zhou and Liu 2023, "What Makes Good Examples for Visual In-Context Learning?", choose
examples by the cosine of image features, and find that it matters more than anything else in the
prompt.
"""

from collections.abc import Sequence

import numpy as np
import torch

from icl_moe.tokenizers.image_tokenizers import ImageTokenizers

_TOGETHER = 16
"""How many images are described at a time."""


class Shelf:
    """Examples, as pairs of codes, of which each query gets the `count` nearest ones."""

    def __init__(self, tokenizers: ImageTokenizers, pairs: Sequence, count: int) -> None:
        self._tokenizers, self._pairs, self._count = tokenizers, pairs, count
        self._points_ED = describe(tokenizers, np.stack([pair.image for pair in pairs]))

    def nearest(self, image_N: np.ndarray) -> tuple:
        """The examples whose images have the greatest cosine similarity to a query's codes. The
        nearest one comes last, next to the query. Of equally near examples the first is taken.
        """
        (point_D,) = describe(self._tokenizers, image_N[None])
        order = np.argsort(-(self._points_ED @ point_D), kind="stable")
        return tuple(self._pairs[number] for number in order[: self._count][::-1])


@torch.inference_mode()
def describe(tokenizers: ImageTokenizers, codes_BN: np.ndarray) -> np.ndarray:
    """A point of length 1 for each image, float32 (B, D), from its codes.

    With a features tokenizer: the mean of the features that its cells' codes represent. Otherwise
    the square roots of the shares of its codes, whose cosine is Bhattacharyya's coefficient of two
    histograms.
    """
    codes = torch.as_tensor(codes_BN)
    if (features := tokenizers.features) is not None:
        # A few images at a time: the vectors of their cells take much more memory than their means.
        parts = codes.to(features.device).split(_TOGETHER)
        points_BD = torch.cat([features.vectors(some).float().mean(dim=1) for some in parts]).cpu()
    else:
        size = tokenizers.picture_codes
        counts = [each.bincount(minlength=size) for each in codes.cpu()]
        points_BD = torch.stack(counts).float().sqrt()
    return torch.nn.functional.normalize(points_BD, dim=1).numpy()
