"""Fits the least expected IoU at which a mask that was decoded in one pass marks anything, on
training episodes, all of whose queries show the object.

The threshold must not be fitted on the evaluated queries.
"""

from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, check_same_kind, evenly_spaced
from icl_moe.inference.model import InContextModel
from icl_moe.sequence import Episode
from icl_moe.tasks import SEGMENTATION

EPISODES = 256
_MISSED = 0.02
"""The share of training queries of whose mask the model may be less sure than the threshold."""

_BATCH = 8


def fit_threshold(
    model: InContextModel, shards: ShardSet, episodes: int = EPISODES
) -> dict[str, Any]:
    """The configuration's `mask_threshold`: the `value`, which is the quantile `missed` of the
    expected IoU (see `DrawnMask`) over the queries of `episodes` evenly spaced training episodes,
    each with all its examples; the number of episodes; and the fingerprint of the shards.

    Raises InputError if the shards hold no segmentation or do not match the model, or the model was
    not trained to decode masks in one pass.
    """
    task = SEGMENTATION
    if not shards.count(task.name):
        raise InputError(f"{shards.location} holds no {task.name} to fit the mask threshold on.")
    check_same_kind(model, shards)
    model.decoding("parallel")
    numbered = EpisodeSet(shards, model.codec, task.name)
    numbers = evenly_spaced(len(numbered), episodes)
    sure: list[float] = []
    for start in tqdm(range(0, len(numbers), _BATCH), desc="fitting the threshold", unit="batch"):
        batch = [numbered[number] for number in numbers[start : start + _BATCH]]
        pairs = model.complete(
            [(Episode(task, e.category, e.pairs[:-1]), e.query.image) for e in batch]
        )
        sure += [drawn.expected_iou for drawn in task.draw(model, pairs)]
    return {
        "value": round(float(np.quantile(sure, _MISSED)), 4),
        "missed": _MISSED,
        "episodes": len(numbers),
        "shards": shards.fingerprint[:16],
    }
