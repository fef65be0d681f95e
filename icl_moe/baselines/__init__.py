"""Systems to compare with that run here: their predictions on the episodes of a shard folder."""

from collections.abc import Sequence
from pathlib import Path

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError, nearest
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.matcher import Matcher
from icl_moe.evaluation.other_systems import open_episodes, write_predictions
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.task import Output
from icl_moe.tokenizers.features import FeaturesTokenizer

BASELINES = (
    "copy",
    "whole_image",
    "mean_mask",
    "every_object",
    "frequent_caption",
    "matcher",
    "seggpt",
    "idefics",
)


def predict_baseline(
    name: str,
    shards: ShardSet,
    out: Path,
    shots: int = 1,
    limit: int | None = None,
    weights: str | None = None,
    images: Path | None = None,
    device: str | None = None,
    swapped: bool = True,
) -> list[str]:
    """Write the predictions of a baseline into `out`, for the tasks that it supports, and return
    the names of these tasks. swapped: also predict with swapped examples, for the queries that have
    them.

    weights: a folder or Hub id, for seggpt and idefics. images: the folder of the images that the
    shards were built from, also for seggpt and idefics. Raises InputError if there is no such
    baseline, if it supports none of the tasks of the shards, or if something that it needs is
    missing.
    """
    if name not in BASELINES:
        raise InputError(
            f"There is no baseline {name!r}{nearest(name, BASELINES)}; there are "
            f"{', '.join(BASELINES)}."
        )
    done = []
    for episodes in open_episodes(shards, limit):
        if shots > episodes.examples:
            raise InputError(
                f"The episodes of {shards.location} have {episodes.examples} example(s): --shots "
                f"must be at most that, not {shots}."
            )
        for also in (False, True) if swapped and shots and episodes.swaps else (False,):
            outputs: Sequence[Output] | None
            if name == "seggpt" and episodes.task is SEGMENTATION:
                from icl_moe.baselines.seggpt import predict_masks

                outputs = predict_masks(shards, episodes, shots, weights, images, device, also)
            elif name == "idefics" and episodes.task is CAPTIONING:
                from icl_moe.baselines.interleaved import predict_captions

                outputs = predict_captions(shards, episodes, shots, weights, images, device, also)
            else:
                outputs = _outputs(name, shards, episodes, shots, also)
            if outputs is not None:
                write_predictions(out, episodes, name, shots, outputs, also)
                done.append(episodes.task.name)
    if not done:
        raise InputError(f"The baseline {name} does none of the tasks of {shards.location}.")
    return list(dict.fromkeys(done))


def _outputs(
    name: str, shards: ShardSet, episodes: EpisodeSet, shots: int, swapped: bool
) -> Sequence[Output] | None:
    """The outputs of a baseline without a model; None if it does not do the task."""
    truths, sources = map(list, zip(*episodes.questions(swapped), strict=True))
    if name == "copy":
        return [episodes.task.true_output(source, 0) for source in sources] if shots else None
    if name == "matcher":
        if episodes.task is not SEGMENTATION or not shots:
            return None
        if shards.manifest.features_tokenizer is None:
            raise InputError(
                f"The matcher needs input images that are features codes, which those of "
                f"{shards.location} are not."
            )
        folder = shards.fetch("features_tokenizer")
        features = FeaturesTokenizer.from_pretrained(str(folder))
        return Matcher(features, episodes, shots).said(truths, sources)
    # What does not depend on the examples is the same with swapped ones.
    every = [episodes[number] for number in range(len(episodes))]
    found = {baseline.prediction: baseline.outputs for baseline in episodes.task.baselines(every)}
    outputs = found.get(name.replace("_", " "))
    return [outputs[n] for n in episodes.swaps] if outputs is not None and swapped else outputs
