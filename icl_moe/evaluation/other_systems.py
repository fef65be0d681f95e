"""Predictions of any system on the episodes of a shard folder: a folder with a file for each task,
which is checked as a whole before anything is scored.

TASK.json            {"episodes": HASH, "system": NAME, "shots": K, "results": [...]}
TASK_swapped.json    the same, of the queries that were also asked with swapped examples; optional

The results are those of COCO's results format, with an episode's key (or its number in the
template, from 1) as the image_id:

segmentation    {"image_id": KEY, "segmentation": {"size": [H, W], "counts": TEXT}}
captioning      {"image_id": KEY, "caption": TEXT, "category": TEXT, "box": [x1, y1, x2, y2],
                 "score": NUMBER}

A mask has the image size of the shards; its counts are text, or a list of run lengths. The
category, the box (fractions of the image) and the score (how sure the system is, for the mean
average precision) may be left out; a mask may have a category and a score too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from icl_moe.boxes import Box
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError, nearest, shown
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.files import write_whole
from icl_moe.inputs import read_json
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.sequence import SequenceCodec
from icl_moe.tasks.task import Output
from icl_moe.tokenizers.text import TextTokenizer

_WHAT_IS_ASKED = ("class", "style", "sources", "boxes", "captions", "references", "masks")
"""The keys of KEY.json that say what an episode shows and asks for. They do not depend on the
tokenizers, so that systems with different ones can be compared.
"""


@dataclass(frozen=True)
class OtherSystem:
    """The predictions of a system for the episodes of one task, in their order. shots: how many
    examples it was shown. swapped: its predictions with swapped examples, in the order of
    `EpisodeSet.swaps`; None if it has none.
    """

    name: str
    shots: int
    outputs: Sequence[Output]
    swapped: Sequence[Output] | None = None


def open_episodes(
    shards: ShardSet, limit: int | None = None, every_task: bool = False
) -> list[EpisodeSet]:
    """The episodes of each task of a shard folder whose predictions can be read, or of every task,
    without a model. Raises InputError if there is no such task.
    """
    held = list(shards.manifest.samples)
    tasks = [task for task in held if every_task or task in _RECORDS]
    if not tasks:
        raise _none_can_be_read(shards.location, held)
    folder = shards.fetch("text_tokenizer")
    format = shards.manifest.format
    codec = SequenceCodec(format, TextTokenizer(format.vocabulary.text_merges, str(folder)))
    return [EpisodeSet(shards, codec, task, limit) for task in tasks]


def episodes_hash(episodes: EpisodeSet, swapped: bool = False) -> str:
    """A hash of all queries, examples and truths of a set of episodes, or of those with swapped
    examples, in 16 hexadecimal digits.
    """

    def describe(episode: EvaluationEpisode) -> dict[str, Any]:
        return {name: episode.meta.get(name) for name in _WHAT_IS_ASKED}

    digest = hashlib.sha256(f"{episodes.task.name} {episodes.image_size}".encode())
    for truth, source in episodes.questions(swapped):
        content = [truth.key, describe(truth), *([describe(source)] if swapped else ())]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_predictions(
    folder: Path,
    episodes: EpisodeSet,
    name: str,
    shots: int,
    outputs: Sequence[Output],
    swapped: bool = False,
) -> None:
    """Write the predictions of a system for every one of the episodes, in their order; swapped: for
    every one of `EpisodeSet.swaps`, with swapped examples.
    """
    record = _RECORDS[episodes.task.name]
    results = [
        {"image_id": question.truth.key} | record.write(output)
        for question, output in zip(episodes.questions(swapped), outputs, strict=True)
    ]
    content = {
        "episodes": episodes_hash(episodes, swapped),
        "system": name,
        "shots": shots,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(predictions_file(folder, episodes, swapped), json.dumps(content) + "\n")


def read_predictions(
    folder: Path, episodes: EpisodeSet, name: str | None = None
) -> OtherSystem | None:
    """The predictions of a folder for these episodes; None if it has none for their task. name: the
    system's name, by default the name that the file says.

    Raises InputError, in one sentence, if a file is malformed or of other episodes, if an episode
    is missing, is there twice or does not exist, if a result is not what its task needs, or if the
    predictions with swapped examples do not belong to the others.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of predictions.")
    if episodes.task.name not in _RECORDS:
        return None
    own, swapped = (predictions_file(folder, episodes, is_swapped) for is_swapped in (False, True))
    if not own.is_file():
        if swapped.is_file():
            raise InputError(f"{swapped} needs {own.name}, the predictions without swapping.")
        return None
    found = _read_file(own, episodes, False)
    system = replace(found, name=name or found.name or folder.name)
    if not swapped.is_file():
        return system
    other = _read_file(swapped, episodes, True)
    if other.name and found.name and other.name != found.name:
        raise InputError(
            f"{swapped} is of the system {shown(other.name)} and {own.name} of "
            f"{shown(found.name)}; both must be of one."
        )
    if other.shots != system.shots:
        raise InputError(
            f"{swapped} is of {other.shots} example(s) and {own.name} of {system.shots}; both must "
            "be of as many."
        )
    return replace(system, swapped=other.outputs)


def _read_file(path: Path, episodes: EpisodeSet, swapped: bool) -> OtherSystem:
    """The predictions of one file; the system's name is empty if the file does not say."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise InputError(
            f"{path} must hold the keys episodes, system, shots and results, as the template has."
        )
    questions = episodes.questions(swapped)
    expected = episodes_hash(episodes, swapped)
    if content.get("episodes") != expected:
        what = " with swapped examples" if swapped else ""
        raise InputError(
            f"{path} is of other episodes: it has the hash {shown(content.get('episodes'))}, the "
            f"{len(questions)} episodes{what} that are evaluated have {expected!r}"
            f"{_advice(content, episodes, swapped)}."
        )
    shots = content.get("shots")
    if not _is_whole(shots) or not swapped <= shots <= episodes.examples:
        raise InputError(
            f"{path}: shots must be a whole number from {int(swapped)} to {episodes.examples}, not "
            f"{shown(shots)}."
        )
    system = content.get("system", "")
    if not isinstance(system, str):
        raise InputError(f"{path}: system must be text, the system's name, not {shown(system)}.")
    found = _by_key(path, [question.truth.key for question in questions], content["results"])
    record = _RECORDS[episodes.task.name]
    outputs = []
    for truth, source in questions:
        try:
            _check_keys(found[truth.key], record.keys)
            outputs.append(record.read(found[truth.key], episodes.image_size))
            _check_class(found[truth.key], source.category)
        except InputError as error:
            raise InputError(f"{path}: {truth.key}: {error}") from error
    return OtherSystem(system, shots, outputs)


def _advice(content: Mapping[str, Any], episodes: EpisodeSet, swapped: bool) -> str:
    """The end of a sentence about predictions of other episodes: that they are of more or fewer of
    the same, if so; else that those here are not all, if so.
    """
    count, every = len(content["results"]), episodes.total
    may_be_first = not swapped and 0 < count <= every and count != len(episodes)
    if may_be_first and content.get("episodes") == episodes_hash(episodes.first(count)):
        rest = "leave out --limit" if count == every else f"give --limit {count}"
        return f"; its {count} are the first of the same shards, so {rest}"
    if len(episodes) < every:
        return f", which are the first of {every} (--limit {len(episodes)})"
    return ""


def check_predictions(
    folder: Path, shards: ShardSet, limit: int | None = None
) -> dict[str, OtherSystem]:
    """Task -> the predictions of a folder for it. Raises InputError as `read_predictions` does, and
    if there are none at all.
    """
    sets = open_episodes(shards, limit)
    found = {episodes.task.name: read_predictions(folder, episodes) for episodes in sets}
    whole = {task: system for task, system in found.items() if system is not None}
    if not whole:
        raise no_predictions(folder, list(shards.manifest.samples))
    return whole


def no_predictions(folder: Path, tasks: Sequence[str]) -> InputError:
    """The error for a folder without predictions for any of the tasks of a shard folder."""
    files = [f"{task}.json" for task in tasks if task in _RECORDS]
    if not files:
        return _none_can_be_read(folder, tasks)
    what = f"neither {' nor '.join(files)}" if len(files) > 1 else f"no {files[0]}"
    return InputError(f"{folder} holds {what}: predictions of no task.")


def _none_can_be_read(place: str | Path, tasks: Sequence[str]) -> InputError:
    return InputError(
        f"{place}: these shards hold {' and '.join(tasks)}; predictions can be read of "
        f"{' and '.join(_RECORDS)} alone."
    )


def predictions_file(folder: Path, episodes: EpisodeSet, swapped: bool) -> Path:
    return folder / f"{episodes.task.name}{'_swapped' if swapped else ''}.json"


def _by_key(path: Path, keys: list[str], results: list[Any]) -> dict[str, dict[str, Any]]:
    """The results by their episode's key. Raises InputError unless there is one for each."""
    known = set(keys)
    found: dict[str, dict[str, Any]] = {}
    double = []
    for number, result in enumerate(results, 1):
        if not isinstance(result, dict) or "image_id" not in result:
            raise InputError(f"{path}: result {number} must be a record with an image_id.")
        key = result["image_id"]
        if _is_whole(key) and 1 <= key <= len(keys):
            key = keys[key - 1]
        if not isinstance(key, str) or key not in known:
            raise InputError(
                f"{path}: result {number} is of the episode {shown(key)}, which is not among the "
                f"{len(keys)} that are evaluated, {keys[0]} to {keys[-1]}."
            )
        if key in found:
            double.append(key)
        found[key] = result
    missing = [key for key in keys if key not in found]
    for what, wrong in (("lacks", missing), ("has more than one result for", double)):
        if wrong:
            raise InputError(
                f"{path} {what} {len(wrong)} of {len(keys)} episodes, the first of them {wrong[0]}."
            )
    return found


def _is_whole(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(result: Mapping[str, Any], keys: Sequence[str]) -> None:
    """A key that nothing reads may be meant to say something, as COCO's category_id does."""
    for key in result:
        if key not in keys:
            raise InputError(
                f"{shown(key)} is not a key of a result{nearest(key, keys)}; the keys are "
                f"{', '.join(keys)}."
            )


def _check_class(result: Mapping[str, Any], category: str) -> None:
    """A mask's class, which need not be given, is that of its examples; a caption may name any."""
    if "segmentation" in result and result.get("category", category) != category:
        raise InputError(
            f"the category is {shown(result['category'])}; the examples are of {category!r}."
        )


@dataclass(frozen=True)
class _Record:
    """How a task's output is stored in a result. keys: those that a result may have. read: the
    output, from a result and the image size.
    """

    keys: tuple[str, ...]
    write: Callable[[Output], dict[str, Any]]
    read: Callable[[Mapping[str, Any], int], Output]


def _read_mask(result: Mapping[str, Any], size: int) -> Output:
    rle = result.get("segmentation")
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise InputError("segmentation must be run lengths, a record with size and counts.")
    if rle["size"] != [size, size]:
        raise InputError(f"the mask has the size {shown(rle['size'])}; it must be {[size, size]}.")
    mask = {"size": [size, size], "counts": rle["counts"]}
    mask_HW = decode_rle(mask)
    _read_score(result)
    return {"mask": encode_rle(mask_HW) if isinstance(rle["counts"], list) else mask}


def _read_caption(result: Mapping[str, Any], size: int) -> Output:
    caption, category, box = (result.get(name) for name in ("caption", "category", "box"))
    if not isinstance(caption, str):
        raise InputError(f"caption must be text, not {shown(caption)}.")
    if not isinstance(category, str | None):
        raise InputError(f"category must be text, not {shown(category)}.")
    output = {"caption": caption, "category": category, "box": _read_box(box)}
    score = _read_score(result)
    return output if score is None else output | {"confidence": score}


def _read_score(result: Mapping[str, Any]) -> float | None:
    score = result.get("score")
    if score is None:
        return None
    try:
        if (_is_whole(score) or isinstance(score, float)) and math.isfinite(score):
            return float(score)
    except OverflowError:  # A whole number that is too large for a float.
        pass
    raise InputError(f"score must be a number, not {shown(score)}.")


def _read_box(box: Any) -> Box | None:
    if box is None:
        return None
    is_box = (
        isinstance(box, list)
        and len(box) == 4
        and all((_is_whole(side) or isinstance(side, float)) and 0 <= side <= 1 for side in box)
    )
    if not is_box or box[0] > box[2] or box[1] > box[3]:
        raise InputError(
            "box must be x1, y1, x2, y2 in fractions of the image, from 0 to 1 and in this order, "
            f"not {shown(box)}."
        )
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def _write_caption(output: Output) -> dict[str, Any]:
    found = {name: output.get(name) for name in ("caption", "category", "box")}
    found["score"] = output.get("confidence")
    return {name: value for name, value in found.items() if value is not None}


_RECORDS = {
    "segmentation": _Record(
        ("image_id", "segmentation", "category", "score"),
        lambda output: {"segmentation": output["mask"]},
        _read_mask,
    ),
    "captioning": _Record(
        ("image_id", "caption", "category", "box", "score"), _write_caption, _read_caption
    ),
}
