"""The training-free matcher: the score of a cell is how much more similar its features are to the
examples' object than to the rest of the examples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icl_moe.data.shards import evenly_spaced
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks.task import Output
from icl_moe.tokenizers.features import FeaturesTokenizer

THRESHOLDS = np.round(np.arange(-1.0, 1.0, 0.01), 2)
"""The candidate thresholds on the score of a pixel of the object."""

_EPISODES_FITTED = 256


def match(query_ND: Tensor, examples_END: Tensor, shares_EN: Tensor) -> Tensor:
    """Scores (N,) of a query's cells: cosine similarity to the mean of the examples' object cells
    minus cosine similarity to the mean of their other cells.

    query_ND, examples_END: features of N cells. shares_EN: the share of the object in each cell of
    the E examples, 0..1, by which the cell is weighted in the two means.
    """
    inside_D = torch.einsum("en,end->d", shares_EN, examples_END)
    outside_D = torch.einsum("en,end->d", 1 - shares_EN, examples_END)
    direction_D = F.normalize(inside_D, dim=0) - F.normalize(outside_D, dim=0)
    return F.normalize(query_ND, dim=-1) @ direction_D


def cell_shares(masks_RHW: Tensor, grid: int) -> Tensor:
    """The share of each cell that boolean masks cover, (R, grid * grid)."""
    return F.adaptive_avg_pool2d(masks_RHW.float()[:, None], (grid, grid)).flatten(1)


def score_pixels(scores_RN: Tensor, size: int) -> Tensor:
    """Scores of pixels (R, size, size), interpolated bilinearly from those of cells."""
    grid = round(scores_RN.shape[1] ** 0.5)
    cells_R1gg = scores_RN.view(-1, 1, grid, grid)
    return F.interpolate(cells_R1gg, (size, size), mode="bilinear", align_corners=False)[:, 0]


def iou_above(scores_RP: Tensor, masks_RP: Tensor, edges_T: Tensor) -> np.ndarray:
    """IoU (R, T) of {score > edge} and the masks, for scores of pixels (R, P) and boolean masks,
    computed from histograms between the edges.
    """
    rows, bins = len(scores_RP), len(edges_T) + 1
    # The number of edges below each score; scores with more than t edges below them exceed edge t.
    below_RP = torch.bucketize(scores_RP.contiguous(), edges_T)
    flat = (below_RP + torch.arange(rows)[:, None] * bins).flatten()
    all_RB = torch.bincount(flat, minlength=rows * bins).view(rows, bins)
    inside_RB = torch.bincount(flat[masks_RP.flatten()], minlength=rows * bins).view(rows, bins)
    all_RT, inside_RT = (x.flip(1).cumsum(1).flip(1)[:, 1:].double() for x in (all_RB, inside_RB))
    union_RT = all_RT + masks_RP.sum(dim=1, keepdim=True) - inside_RT
    return (inside_RT / union_RT.clamp_min(1)).numpy()


class Matcher:
    """Predicts the masks of segmentation queries from their first `shots` examples. features: the
    tokenizer of their input images.

    The threshold is the one with the highest mean IoU when examples act as queries: the first
    example of up to 256 episodes, each with the examples of another episode of its class. So no
    query's mask is used, except in shards whose queries are also examples of other episodes.
    """

    def __init__(self, features: FeaturesTokenizer, episodes: EpisodeSet, shots: int) -> None:
        self.shots = shots
        self._features = features
        self._threshold = self._fit(episodes)

    def said(
        self, truths: Sequence[EvaluationEpisode], sources: Sequence[EvaluationEpisode]
    ) -> list[Output]:
        """The masks of queries, given the examples of `sources`."""
        return [
            {"mask": encode_rle((self._scores(truth, -1, source) > self._threshold).numpy())}
            for truth, source in zip(truths, sources, strict=True)
        ]

    def _scores(self, truth: EvaluationEpisode, pair: int, source: EvaluationEpisode) -> Tensor:
        """The scores (H, W) of the pixels of a pair's image, given the examples of `source`."""
        masks_EHW = torch.stack([_mask(source, example) for example in range(self.shots)])
        codes_EN = np.stack([shown_pair.image for shown_pair in source.pairs[: self.shots]])
        query_ND = self._vectors(truth.pairs[pair].image)
        grid = round(len(query_ND) ** 0.5)
        shares_EN = cell_shares(masks_EHW, grid)
        scores_N = match(query_ND, self._vectors(codes_EN), shares_EN)
        return score_pixels(scores_N[None], masks_EHW.shape[-1])[0]

    def _vectors(self, codes: np.ndarray) -> Tensor:
        codes_N = torch.from_numpy(np.asarray(codes, dtype=np.int64))
        return self._features.vectors(codes_N.to(self._features.device)).float().cpu()

    def _fit(self, episodes: EpisodeSet) -> float:
        edges_T = torch.from_numpy(THRESHOLDS).float()
        curves = [
            iou_above(
                self._scores(episode, 0, source).flatten()[None],
                _mask(episode, 0).flatten()[None],
                edges_T,
            )
            for episode, source in self._pairs_to_fit(episodes)
        ]
        # If no class appears in two images: pixels that are more similar to the object than to the
        # rest.
        return float(THRESHOLDS[np.mean(curves, axis=(0, 1)).argmax()]) if curves else 0.0

    def _pairs_to_fit(
        self, episodes: EpisodeSet
    ) -> Iterator[tuple[EvaluationEpisode, EvaluationEpisode]]:
        """Evenly spaced episodes, each with another episode of its class whose examples are from
        other images than its first example.
        """
        for number in evenly_spaced(len(episodes), _EPISODES_FITTED):
            episode = episodes[number]
            image = episode.meta["sources"][0]["image"]
            numbers = episodes.by_kind[episode.kind]
            start = numbers.index(number)
            for other in numbers[start + 1 :] + numbers[:start]:
                source = episodes.read(other)
                if all(origin["image"] != image for origin in source.meta["sources"][: self.shots]):
                    yield episode, source
                    break


def _mask(episode: EvaluationEpisode, pair: int) -> Tensor:
    """A pair's true mask (H, W), boolean."""
    return torch.from_numpy(decode_rle(episode.meta["masks"][pair]))
