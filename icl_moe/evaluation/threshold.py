"""Fits the brightness that some pixel must have for there to be a mask, where masks are decoded in
one pass: on training episodes, as the one threshold for all masks that is the best.

If the model is unsure about a cell, its expected code vector is grey, so the middle between black
and white is not a good threshold. The threshold must not be fitted on the evaluated queries.
`DrawnMask.level` says which pixels belong to a mask.
"""

from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, check_same_kind
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode
from icl_moe.tasks import SEGMENTATION

EPISODES = 256
_CANDIDATES = np.linspace(0.05, 0.95, 37)
_BATCH = 8


def fit_threshold(
    model: InContextModel, shards: ShardSet, episodes: int = EPISODES
) -> dict[str, Any]:
    """The configuration's `mask_threshold`: the `value` with the highest mIoU on the queries of
    `episodes` evenly spaced training episodes, each with all its examples; that mIoU; the number of
    episodes; and the fingerprint of the shards.

    Raises InputError if the shards hold no segmentation or do not match the model, or the model was
    not trained to decode masks in one pass.
    """
    task = SEGMENTATION
    if not shards.count(task.name):
        raise InputError(f"{shards.location} holds no {task.name} to fit the mask threshold on.")
    check_same_kind(model, shards)
    numbered = EpisodeSet(shards, model.codec, task.name)
    numbers = np.unique(np.linspace(0, len(numbered) - 1, episodes).round().astype(int))
    overlaps: dict[str, np.ndarray] = {}
    for start in tqdm(range(0, len(numbers), _BATCH), desc="fitting the threshold", unit="batch"):
        batch = [numbered[number] for number in numbers[start : start + _BATCH].tolist()]
        pairs = model.complete(
            [(Episode(task, e.category, e.pairs[:-1]), e.query.image) for e in batch],
            decoding="parallel",
        )
        for episode, drawn in zip(batch, task.draw(model, pairs), strict=True):
            true_HW = decode_rle(task.true_output(episode)["mask"])
            found = _overlaps(drawn.brightness_HW, true_HW)
            overlaps[episode.category] = overlaps.get(episode.category, 0) + found
    iou_CK = [of_class[0] / np.maximum(of_class[1], 1) for of_class in overlaps.values()]
    miou_K = np.mean(iou_CK, axis=0)
    return {
        "value": round(float(_CANDIDATES[miou_K.argmax()]), 4),
        "miou": round(float(miou_K.max()), 4),
        "episodes": len(numbers),
        "shards": shards.fingerprint[:16],
    }


def _overlaps(brightness_HW: np.ndarray, true_HW: np.ndarray) -> np.ndarray:
    """Pixels of the intersection and of the union for each candidate, (2, K)."""
    levels_HW = (brightness_HW + 1) / 2
    predicted_KHW = levels_HW > _CANDIDATES[:, None, None]
    true_HW = true_HW.astype(bool)
    return np.stack(
        [np.sum(predicted_KHW & true_HW, (1, 2)), np.sum(predicted_KHW | true_HW, (1, 2))]
    )
