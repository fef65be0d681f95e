"""`icl-moe evaluate`: every episode of a shard folder is completed freely from its first examples,
then scored.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.devices import find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, check_same_kind
from icl_moe.evaluation.gallery import Images, draw_gallery, draw_proof
from icl_moe.evaluation.held_out import held_out_loss
from icl_moe.evaluation.matcher import Matcher
from icl_moe.evaluation.other_systems import OtherSystem, no_predictions, read_predictions
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.predictions import (
    Condition,
    Control,
    Prediction,
    PredictionLog,
    describe_shots,
    predict,
)
from icl_moe.evaluation.proof import ShotScores, SwappedQuery, score_shots, score_swaps
from icl_moe.evaluation.report import Section, write_report
from icl_moe.evaluation.results import (
    Asked,
    Classes,
    Metrics,
    Row,
    Source,
    SwapRow,
    TaskResult,
)
from icl_moe.files import write_whole
from icl_moe.inference.model import Decoding, InContextModel
from icl_moe.inference.model_card import TRAINING
from icl_moe.inputs import read_json
from icl_moe.messages import note
from icl_moe.outputs import output_folder, writing
from icl_moe.pictures import Gallery
from icl_moe.processes import join_processes
from icl_moe.tasks import SEGMENTATION, TASKS
from icl_moe.tasks.task import Judge, Output
from icl_moe.versions import installed_versions

_PACKAGES = ("icl-moe", "torch", "transformers", "numpy", "pillow", "pycocotools", "pycocoevalcap")


def evaluate(
    model_dir: str | Path,
    shards_dir: str | Path,
    out: str | Path,
    shots: Sequence[int] = (1,),
    limit: int | None = None,
    batch_size: int = 8,
    controls: Sequence[Control] | None = None,
    device: str | None = None,
    sections: Sequence[Section] = (),
    decoding: Decoding | None = None,
    dtype: str | None = None,
    predictions: Mapping[str, Path] | None = None,
    images: Path | None = None,
    edges: bool = True,
) -> Metrics | None:
    """Evaluate an exported model on the first `limit` episodes of each task of a shard folder, at a
    path or a URL (all by default).

    shots: how many of an episode's examples to show; each number gives a row of the table.
    controls: how examples are exchanged for comparison; by default `swapped` if the shards contain
    the necessary data. sections: additional sections of the report. decoding: of masks, see
    `InContextModel.complete`. device, dtype: see `InContextModel.from_pretrained`. predictions: of
    other systems on the same episodes, name of the row -> folder (see other_systems.py). edges:
    whether the outlines of masks follow the edges of images, if the model has `edges`. images: the
    folder of these images, by default where the shards were built of them. Writes metrics.json,
    speed.json, predictions.jsonl and report.html into `out`; docs/evaluation.md describes them.
    After an interruption, the same call resumes after the last complete batch.

    Processes that `accelerate launch` or torchrun started share the queries, with equal results;
    all but the first return None.

    Raises InputError if the model and the shards do not match, if they do not support the requested
    numbers of examples or swapped examples, if predictions are not of exactly these episodes, if
    the images are not there, or if `out` cannot be written.
    """
    out, shots = output_folder(out), list(shots)
    if (out / "model.safetensors").exists():
        raise InputError(f"{out} holds a model; give --out another folder for the report.")
    _check_numbers(shots, limit, batch_size)
    _check_controls(controls)
    process = join_processes(device)
    place = process.device if process.num_processes > 1 else find_device(device)
    shards = ShardSet(shards_dir)
    model = InContextModel.from_pretrained(model_dir, place, dtype)
    if not edges:
        model.edges = None
    decoding = model.decoding(decoding)
    _check(model, shards, shots, decoding)
    sets = [EpisodeSet(shards, model.codec, task, limit) for task in shards.manifest.samples]
    if controls is not None and "swapped" in controls:
        _check_swaps(shards, sets)
    others = _other_systems(sets, predictions or {})
    photographs = _photographs(model, shards, sets, decoding, images)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        model_name = Path(model_dir).resolve().name
        asked = ("swapped",) if controls is None else controls
        return _evaluate(
            model,
            model_name,
            shards,
            sets,
            out,
            shots,
            limit,
            batch_size,
            asked,
            sections,
            decoding,
            others,
            process,
            photographs,
        )


def _photographs(
    model: InContextModel,
    shards: ShardSet,
    sets: Sequence[EpisodeSet],
    decoding: Decoding,
    images: Path | None,
) -> dict[str, Photographs]:
    """Task -> the photographs whose edges the outlines of its masks follow. Raises InputError if
    that of the first query is not there.
    """
    if model.edges is None or decoding == "autoregressive":
        return {}
    found = {}
    for episodes in sets:
        if episodes.task is SEGMENTATION and len(episodes):
            found[episodes.task.name] = Photographs(shards, episodes.task.name, images)
            try:
                found[episodes.task.name].at_model_size(episodes[0], -1)
            except InputError as error:
                raise InputError(
                    f"{str(error).removesuffix('.')}, or leave masks as the model draws them with "
                    "--no-edges."
                ) from error
    return found


def _other_systems(
    sets: Sequence[EpisodeSet], predictions: Mapping[str, Path]
) -> dict[str, list[OtherSystem]]:
    """Task -> the systems that have predictions for it. Raises InputError if one has none at
    all.
    """
    found: dict[str, list[OtherSystem]] = {episodes.task.name: [] for episodes in sets}
    for name, folder in predictions.items():
        systems = [read_predictions(folder, episodes, name) for episodes in sets]
        if not any(systems):
            raise no_predictions(folder, list(found))
        for task, system in zip(found, systems, strict=True):
            found[task] += [system] if system else []
    return found


def _evaluate(
    model: InContextModel,
    model_name: str,
    shards: ShardSet,
    sets: Sequence[EpisodeSet],
    out: Path,
    shots: Sequence[int],
    limit: int | None,
    batch_size: int,
    controls: Sequence[Control],
    sections: Sequence[Section],
    decoding: Decoding,
    others: Mapping[str, Sequence[OtherSystem]],
    process: PartialState,
    photographs: Mapping[str, Photographs],
) -> Metrics | None:
    header: dict[str, Any] = {
        "model": model.fingerprint,
        "shards": shards.fingerprint[:16],
        "limit": limit,
        "batch_size": batch_size,
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        **_written_how(model, decoding),
    }
    batch_size = min(batch_size, max(shards.manifest.samples.values(), default=1))
    log = PredictionLog(out, header, process)
    asked = {each.task.name: _conditions(each, shots, controls) for each in sets}
    for episodes in sets:
        of_task = photographs.get(episodes.task.name)
        for condition in asked[episodes.task.name]:
            predict(model, episodes, condition, log, batch_size, decoding, of_task)
    log.gather()
    if not process.is_main_process:
        return None
    tasks: dict[str, TaskResult] = {}
    galleries: list[Gallery] = []
    proofs: dict[str, Gallery] = {}
    for episodes in sets:
        task = episodes.task.name
        conditions = asked[task]
        swapped = [c for c in conditions if c.control == "swapped"]
        truths = list(_all(episodes, "reading"))
        matchers = _matchers(model, episodes, shots)
        judge = episodes.task.judge(truths, model.format)
        tasks[task] = TaskResult(
            _rows(model, episodes, truths, conditions, log, batch_size, matchers, others[task]),
            held_out_loss(model, shards, task, limit, batch_size),
            _classes(model, truths, task),
            episodes.task.measure,
            _swap_rows(episodes, swapped, log, others[task], matchers, judge),
            "" if swapped else _why_not_swapped(episodes, shots, controls),
            _by_shots(episodes, truths, conditions, log),
        )
        shown = max((c for c in conditions if c.control is None), key=lambda c: c.shots)
        images = Images(model, shards, task)
        galleries.append(draw_gallery(images, episodes, shown, log))
        if swapped:
            proofs[task] = draw_proof(images, episodes, swapped[-1], log, judge)
    metrics = Metrics(
        **header,
        model_folder=model_name,
        shards_folder=Path(shards.location).name,
        versions=installed_versions(_PACKAGES),
        tasks=tasks,
        standard=shards.manifest.standard,
        machine=_machine(process),
    )
    told = [each.task.name for each in sets if each.task.needs_category(model.format)]
    write_report(out / "report.html", metrics, galleries, sections, proofs, told)
    write_whole(out / "speed.json", json.dumps(metrics.speed(), indent=1) + "\n")
    log.write()
    # Where it is, the evaluation is complete.
    write_whole(out / "metrics.json", json.dumps(metrics.to_json(), indent=1) + "\n")
    log.end()
    return metrics


def _machine(process: PartialState) -> str:
    """What computes, in words."""
    if process.device.type == "cuda":
        what = torch.cuda.get_device_name(process.device)
    else:
        threads = torch.get_num_threads()
        what = f"{threads} thread{'' if threads == 1 else 's'} of a CPU ({platform.machine()})"
    return what if process.num_processes == 1 else f"{process.num_processes} processes, each {what}"


def _check_numbers(shots: Sequence[int], limit: int | None, batch_size: int) -> None:
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {number!r}.")
    if not shots or not all(isinstance(count, int) and count >= 0 for count in shots):
        raise InputError(
            f"shots must be whole numbers of at least 0, one or more, not {list(shots)}."
        )


def _check_controls(controls: Sequence[Control] | None) -> None:
    for control in controls or ():
        if control not in get_args(Control):
            raise InputError(
                f"A control must be {' or '.join(get_args(Control))}, not {control!r}."
            )


def _check_swaps(shards: ShardSet, sets: Sequence[EpisodeSet]) -> None:
    """Raise InputError if no task of the shards supports swapped examples."""
    if not any(episodes.keep_objects for episodes in sets):
        raise InputError(
            f"The shards in {shards.location} do not keep what else a query shows, which the "
            "control swapped needs; build them again, in another folder, with this version of "
            "icl-moe."
        )
    if not any(episodes.swaps for episodes in sets):
        raise InputError(
            f"No query in {shards.location} shows another class of which the shards have examples, "
            "which the control swapped needs; take shards of scenes with several classes."
        )


def _check(
    model: InContextModel, shards: ShardSet, shots: Sequence[int], decoding: Decoding
) -> None:
    manifest = shards.manifest
    fitted = model.decoder.config.mask_threshold
    if fitted is not None and fitted["shards"] == shards.fingerprint[:16]:
        raise InputError(
            f"The threshold of this model's masks was fitted on {shards.location}: evaluate it on "
            "others."
        )
    if _trained_on(model) == shards.fingerprint:
        note(
            f"warning: the model was trained on {shards.location}, so none of these scores, the "
            "held-out loss included, is of data that it has not seen."
        )
    check_same_kind(model, shards)
    for count in shots:
        if count > manifest.examples:
            most = manifest.examples
            raise InputError(
                f"The episodes of {shards.location} have {most} example(s): shots must lie in "
                f"0..{most}, not {count}."
            )
        for task in manifest.samples:
            model.check_examples(count, TASKS[task], decoding)


def _trained_on(model: InContextModel) -> str | None:
    """The fingerprint of the shards that a model was trained on last; None where it is unknown."""
    if model.folder is None or not (model.folder / TRAINING).is_file():
        return None
    record = read_json(model.folder / TRAINING)
    shards = record.get("shards") if isinstance(record, dict) else None
    return shards.get("manifest_sha256") if isinstance(shards, dict) else None


def _written_how(model: InContextModel, decoding: Decoding) -> dict[str, Any]:
    """greedy: every token is the most probable one. parallel and mirrored: masks are decoded in one
    pass; nothing is marked where the expected IoU is less than a threshold; and where outlines
    follow the edges of images, how.
    """
    if decoding == "autoregressive":
        return {"decoding": "greedy"}
    config = model.decoder.config
    return {
        "decoding": decoding,
        "mask_threshold": config.mask_threshold,
        "mask_edges": config.mask_edges if model.edges else None,
    }


def _conditions(
    episodes: EpisodeSet, shots: Sequence[int], controls: Sequence[Control]
) -> list[Condition]:
    """How the queries are asked; a control is left out if there is nothing to exchange."""
    own = [Condition(episodes.task.name, count) for count in dict.fromkeys(shots)]
    possible = {
        "shuffled": lambda: episodes.of_another_class(0) is not None,
        "swapped": lambda: bool(episodes.swaps),
    }
    return own + [
        Condition(c.task, c.shots, control)
        for control in dict.fromkeys(controls)
        if possible[control]()
        for c in own
        if c.shots
    ]


def _why_not_swapped(
    episodes: EpisodeSet, shots: Sequence[int], controls: Sequence[Control]
) -> str:
    if "swapped" not in controls:
        return "Examples were not swapped: the control was not asked for."
    if not any(shots):
        return "Examples were not swapped: none were shown."
    if not episodes.keep_objects:
        return (
            "Examples were not swapped: these shards do not keep what else a query shows, as "
            "shards that are built again do."
        )
    return (
        "Examples were not swapped: no query shows another class of which the shards have examples."
    )


def _rows(
    model: InContextModel,
    episodes: EpisodeSet,
    truths: Sequence[EvaluationEpisode],
    conditions: Sequence[Condition],
    log: PredictionLog,
    batch_size: int,
    matchers: Sequence[Matcher],
    others: Sequence[OtherSystem],
) -> tuple[Row, ...]:
    """Scores of the model under each condition that asks all queries, then of other systems, of the
    first example's output, of matchers, of the task's baselines, and of the truth through the
    tokenizer (the mask ceiling), if that is a bound.
    """
    task = episodes.task
    conditions = [condition for condition in conditions if condition.control != "swapped"]
    asked = [[log[condition, truth.key] for truth in truths] for condition in conditions]
    sets = [[prediction.said for prediction in predictions] for predictions in asked]
    names: list[tuple[str, Source, int | None]] = []
    for system in others:
        name = f"{system.name}, {describe_shots(system.shots)}"
        names.append((name, "predictions", system.shots))
        sets.append(list(system.outputs))
    if episodes.examples:
        names.append((*_FIRST_EXAMPLE, None))
        sets.append([task.true_output(truth, 0) for truth in truths])
    for matcher in matchers:
        names.append((*_matched(matcher), matcher.shots))
        sets.append(matcher.said(truths, truths))
    for baseline in task.baselines(truths):
        names.append((baseline.name, baseline.prediction, None))
        sets.append(list(baseline.outputs))
    ceiling = _ceiling(model, episodes, batch_size)
    if ceiling:
        names.append(("the truth through the tokenizer (ceiling)", "tokenizer", None))
        sets.append(ceiling)
    scores = iter(task.score(sets, truths, model.format))
    rows = [
        Row(condition.describe(), "model", next(scores), _asked(condition, predictions))
        for condition, predictions in zip(conditions, asked, strict=True)
    ]
    rows += [Row(name, source, next(scores), shots=shots) for name, source, shots in names]
    return tuple(rows)


_FIRST_EXAMPLE: tuple[str, Source] = (
    "the first example's output, whatever the query",
    "first example",
)


def _matchers(model: InContextModel, episodes: EpisodeSet, shots: Sequence[int]) -> list[Matcher]:
    """Training-free matchers for each number of examples, if input images are features codes."""
    features = model.tokenizers.features
    if features is None or episodes.task is not SEGMENTATION:
        return []
    counts = [count for count in dict.fromkeys(shots) if count]
    return [Matcher(features.codebook_KD, episodes, count) for count in counts]


def _matched(matcher: Matcher) -> tuple[str, Source]:
    return f"the training-free matcher, {describe_shots(matcher.shots)}", "matcher"


def _swap_rows(
    episodes: EpisodeSet,
    conditions: Sequence[Condition],
    log: PredictionLog,
    others: Sequence[OtherSystem],
    matchers: Sequence[Matcher],
    judge: Judge,
) -> tuple[SwapRow, ...]:
    """The queries that show another class, with their own and with swapped examples: of the model
    after each number of examples, of other systems that were asked so, of the first example's
    output, of matchers, and of the task's baselines, which do not depend on the examples.
    """
    if not conditions:
        return ()
    task = episodes.task
    truths = [episodes[number] for number in episodes.swaps]
    swaps = list(episodes.swaps.values())

    def row(
        name: str,
        source: Source,
        shots: int | None,
        said: Sequence[Output],
        said_swapped: Sequence[Output],
    ) -> SwapRow:
        queries = [
            SwappedQuery(truth, swap.shown, *outputs)
            for truth, swap, *outputs in zip(truths, swaps, said, said_swapped, strict=True)
        ]
        return SwapRow(name, source, shots, score_swaps(task, queries, judge))

    rows = []
    for swapped in conditions:
        own = swapped._replace(control=None)
        said, said_swapped = (
            [log[condition, truth.key].said for truth in truths] for condition in (own, swapped)
        )
        rows.append(row(own.describe(), "model", own.shots, said, said_swapped))
    for system in others:
        if system.swapped is not None:
            own_outputs = [system.outputs[number] for number in episodes.swaps]
            name = f"{system.name}, {describe_shots(system.shots)}"
            rows.append(row(name, "predictions", system.shots, own_outputs, system.swapped))
    first = [task.true_output(truth, 0) for truth in truths]
    first_swapped = [task.true_output(swap.source, 0) for swap in swaps]
    rows.append(row(*_FIRST_EXAMPLE, 1, first, first_swapped))
    sources = [swap.source for swap in swaps]
    for matcher in matchers:
        outputs = matcher.said(truths, truths), matcher.said(truths, sources)
        rows.append(row(*_matched(matcher), matcher.shots, *outputs))
    for baseline in task.baselines(truths):
        same = baseline.outputs
        rows.append(row(baseline.name, baseline.prediction, None, same, same))
    return tuple(rows)


def _by_shots(
    episodes: EpisodeSet,
    truths: Sequence[EvaluationEpisode],
    conditions: Sequence[Condition],
    log: PredictionLog,
) -> tuple[ShotScores, ...]:
    """Empty if only one number of examples was requested."""
    own = [condition for condition in conditions if condition.control is None]
    if len(own) == 1:
        return ()
    said = {c.shots: [log[c, truth.key].said for truth in truths] for c in own}
    return score_shots(episodes.task, truths, said)


def _asked(condition: Condition, predictions: Sequence[Prediction]) -> Asked:
    seconds_Q = np.array([prediction.seconds for prediction in predictions])
    return Asked(
        condition.shots,
        condition.control,
        copy_rate=float(np.mean([prediction.copied for prediction in predictions])),
        truth_copy_rate=float(np.mean([prediction.truth_copied for prediction in predictions])),
        queries_per_second=round(1 / max(float(seconds_Q.mean()), 1e-4), 3),
        seconds_a_query=round(float(np.median(seconds_Q)), 4),
    )


def _ceiling(model: InContextModel, episodes: EpisodeSet, batch_size: int) -> list[Output]:
    everything = _all(episodes, "tokenizer's ceiling")
    outputs: list[Output] = []
    while batch := list(islice(everything, batch_size)):
        outputs += episodes.task.ceiling(model, batch) or []
    return outputs


def _classes(model: InContextModel, truths: Sequence[EvaluationEpisode], task: str) -> Classes:
    evaluated = sorted({truth.category for truth in truths})
    trained = getattr(model.decoder.config, "classes", None)
    seen = None if trained is None else sorted(set(evaluated) & set(trained.get(task, ())))
    return Classes(evaluated, seen)


def _all(episodes: EpisodeSet, doing: str) -> Iterator[EvaluationEpisode]:
    description = f"{doing}, {episodes.task.name}"
    yield from tqdm(episodes, desc=description, unit="episode", leave=False)
