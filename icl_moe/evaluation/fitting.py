"""What is fitted on training episodes when a model is exported, for masks in one pass: the least
expected IoU at which anything is marked, and how outlines follow the edges of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, check_same_kind
from icl_moe.evaluation.photographs import Photographs
from icl_moe.inference.edges import EdgeFilter, follow_edges, log_odds
from icl_moe.inference.model import InContextModel
from icl_moe.messages import note
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode
from icl_moe.tasks import SEGMENTATION, SEMANTIC_SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.mask_scores import mask_iou
from icl_moe.tasks.task import lacks_class

EPISODES = 256
"""How many training episodes are used; more hardly change the fit."""

_MISSED = 0.02
"""The share of training queries of whose mask the model may be less sure than the threshold."""

_RADII = (1 / 16, 1 / 8, 3 / 16, 1 / 4)
_EPSILONS = (1e-4, 1e-3, 1e-2)
"""What the edge filter is chosen from, see `EdgeFilter`."""

_PIXELS = 1 << 20
"""About how many pixels, evenly spaced, its logistic curve is fitted to."""

_BATCH = 8


class _Asked(NamedTuple):
    """A mask of a query: as the model draws it, as it truly is, and the pixels that count, boolean
    (H, W).
    """

    episode: EvaluationEpisode
    drawn: DrawnMask
    mask_HW: np.ndarray
    counted_HW: np.ndarray

    def iou(self, drawn: DrawnMask) -> float:
        """The IoU of the true mask with `drawn`, which is the drawn mask in any form."""
        return mask_iou(drawn.mask_HW & self.counted_HW, self.mask_HW & self.counted_HW)


def _masks_of(episode: EvaluationEpisode, pair: Any) -> Iterator[_Asked]:
    """The mask of a query, or of each of its classes whose colour the examples show."""
    if episode.task is SEMANTIC_SEGMENTATION:
        for name, colour in episode.meta["colours"].items():
            if colour in pair.drawn.masks:
                mask_HW = decode_rle(episode.meta["class_masks"][-1][name]).astype(bool)
                drawn = pair.drawn.masks[colour]
                yield _Asked(episode, drawn, mask_HW, np.ones_like(mask_HW))
        return
    true = SEGMENTATION.true_output(episode)
    mask_HW = decode_rle(true["mask"]).astype(bool)
    counted_HW = np.ones_like(mask_HW)
    if "ignored" in true:
        counted_HW = ~decode_rle(true["ignored"]).astype(bool)
    yield _Asked(episode, pair.drawn, mask_HW, counted_HW)


class MaskFit(NamedTuple):
    """The configuration's `mask_threshold` and `mask_edges`."""

    threshold: dict[str, Any]
    edges: dict[str, Any] | None


def fit_masks(
    model: InContextModel,
    shards: ShardSet,
    episodes: int = EPISODES,
    images: Path | None = None,
) -> MaskFit:
    """Fit both on the queries of `episodes` evenly spaced training episodes, each with all its
    examples. In the place of a query that lacks the class, the next one that shows it is taken.

    threshold: its `value` is the quantile `missed` of the expected IoU (see `DrawnMask`). edges:
    the fields of the `EdgeFilter` with the greatest mean IoU, each with the logistic curve of the
    greatest likelihood, and this `mean_iou` beside the `mean_iou_as_drawn`; None if no filter
    raises it, or the images are not at hand: in the folder `images`, by default the one that the
    shards were built from. Both name the number of episodes and the fingerprint of the shards.

    Raises InputError if the shards hold no segmentation or do not match the model, or the model was
    not trained to decode masks in one pass.
    """
    held = [task for task in (SEGMENTATION, SEMANTIC_SEGMENTATION) if shards.count(task.name)]
    if not held:
        raise InputError(f"{shards.location} holds no segmentation to fit the masks on.")
    task = held[0]
    check_same_kind(model, shards)
    model.decoding("parallel")
    numbered = EpisodeSet(shards, model.codec, task.name)
    numbers = _showing(shards, task.name, evenly_spaced(len(numbered), episodes))
    masks: list[_Asked] = []
    for start in tqdm(range(0, len(numbers), _BATCH), desc="fitting the threshold", unit="batch"):
        batch = [numbered[number] for number in numbers[start : start + _BATCH]]
        pairs = model.complete(
            [
                (Episode(task, episode.category, episode.pairs[:-1]), episode.query.image)
                for episode in batch
            ]
        )
        for episode, pair in zip(batch, pairs, strict=True):
            masks += _masks_of(episode, pair)
    fitted_on = {"episodes": len(numbers), "shards": shards.short_fingerprint}
    value = float(np.quantile([mask.drawn.expected_iou for mask in masks], _MISSED))
    threshold = {"value": round(value, 4), "missed": _MISSED, **fitted_on}
    edges = _fit_edges(masks, Photographs(shards, task.name, images))
    return MaskFit(threshold, edges and {**edges, **fitted_on})


def _showing(shards: ShardSet, task: str, numbers: Sequence[int]) -> list[int]:
    """The episodes with these numbers; instead of one whose query lacks the class, the next one
    that is not taken yet. Raises InputError if no query shows its class.
    """
    count, found = shards.count(task), dict[int, None]()
    for number in numbers:
        for other in (step % count for step in range(number, number + count)):
            if other not in found and not lacks_class(shards.sample(task, other).meta):
                found[other] = None
                break
    if not found:
        raise InputError(f"{shards.location} has no query that shows what its examples show.")
    return list(found)


def _fit_edges(masks: Sequence[_Asked], photographs: Photographs) -> dict[str, float] | None:
    try:
        episodes = {mask.episode.key: mask.episode for mask in masks}
        guide_of = {
            key: photographs.at_model_size(episode, -1) for key, episode in episodes.items()
        }
    except InputError as error:
        note(f"The outlines of masks will not follow the edges of images: {error}")
        return None
    guides = [guide_of[mask.episode.key] for mask in masks]
    as_drawn = float(np.mean([mask.iou(mask.drawn) for mask in masks]))
    ious = {}
    for radius, epsilon in tqdm(
        list(product(_RADII, _EPSILONS)), desc="fitting the edges", unit="filter"
    ):
        plain = EdgeFilter(radius, epsilon)
        pairs = zip(masks, guides, strict=True)
        filtered = [follow_edges(mask.drawn, guide, plain) for mask, guide in pairs]
        edges = replace(plain, **_fit_curve(filtered, masks))
        if edges.slope > 0:
            calibrated = zip(masks, map(edges.calibrated, filtered), strict=True)
            ious[edges] = float(np.mean([mask.iou(drawn) for mask, drawn in calibrated]))
    best = max(ious, key=ious.__getitem__, default=None)
    if best is None or ious[best] <= as_drawn:
        return None
    return {
        **asdict(best),
        "mean_iou": round(ious[best], 4),
        "mean_iou_as_drawn": round(as_drawn, 4),
    }


def _fit_curve(filtered: Sequence[DrawnMask], masks: Sequence[_Asked]) -> dict[str, float]:
    """The slope and offset of the logistic curve with which the true masks are most probable."""
    brightness_P = np.concatenate(
        [drawn.brightness_HW[mask.counted_HW] for drawn, mask in zip(filtered, masks, strict=True)]
    )
    is_inside_P = np.concatenate([mask.mask_HW[mask.counted_HW] for mask in masks])
    every = max(1, len(brightness_P) // _PIXELS)
    log_odds_P = log_odds(torch.from_numpy(brightness_P[::every].astype(np.float64)))
    wanted_P = torch.from_numpy(is_inside_P[::every].astype(np.float64))
    curve_2 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([curve_2], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(curve_2[0] * log_odds_P + curve_2[1], wanted_P)
        value.backward()
        return value

    optimizer.step(loss)
    slope, offset = (round(float(value), 4) for value in curve_2.detach())
    return {"slope": slope, "offset": offset}
