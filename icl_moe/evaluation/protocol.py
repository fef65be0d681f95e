"""`icl-moe evaluate`: every episode of a shard folder is completed freely from its first examples,
then scored.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState

from icl_moe.data.shards import ShardSet
from icl_moe.devices import find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, check_same_kind
from icl_moe.evaluation.gallery import Images, draw_gallery, draw_proof
from icl_moe.evaluation.held_out import held_out_loss
from icl_moe.evaluation.other_systems import OtherSystem, no_predictions, read_predictions
from icl_moe.evaluation.panels import name_of_folder
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.predictions import Condition, Control, PredictionLog, predict
from icl_moe.evaluation.report import Section, write_report
from icl_moe.evaluation.results import Metrics, TaskResult
from icl_moe.evaluation.task_scores import TaskScores
from icl_moe.files import write_whole
from icl_moe.inference.model import Decoding, InContextModel
from icl_moe.inference.model_card import TRAINING
from icl_moe.inference.shifts import check_shifts
from icl_moe.inputs import read_json
from icl_moe.messages import note
from icl_moe.outputs import output_folder, writing
from icl_moe.pictures import Gallery
from icl_moe.processes import join_processes
from icl_moe.tasks import SEGMENTATION, SEMANTIC_SEGMENTATION, TASKS
from icl_moe.versions import installed_versions

_NO_SWAPS = (
    "There are no swapped examples of several classes in one mask; benchmarks/colours.py exchanges "
    "their colours."
)

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
    shifts: bool = False,
) -> Metrics | None:
    """Evaluate an exported model on the first `limit` episodes of each task of a shard folder, at a
    path or a URL (all by default).

    shots: how many of an episode's examples to show; each number gives a row of the table.
    controls: how examples are exchanged for comparison; by default `swapped` if the shards contain
    the necessary data. sections: additional sections of the report. decoding: how masks are
    decoded, see `InContextModel.complete`. device, dtype: see `InContextModel.from_pretrained`.
    predictions: other systems' predictions for the same episodes, name of the row -> folder (see
    other_systems.py). edges: whether the outlines of masks follow the edges of images, if the model
    has `edges`. shifts: whether the queries of segmentation are read in shifted views (see
    icl_moe/inference/shifts.py). images: the folder of these images; by default the folder that the
    shards were built from.

    Writes metrics.json, speed.json, predictions.jsonl and report.html into `out`;
    docs/evaluation.md describes them. After an interruption, the same call resumes after the last
    complete batch.

    Processes that `accelerate launch` or torchrun started share the queries, with equal results;
    all but the first return None.

    Raises InputError if the model and the shards do not match, if they do not support the requested
    numbers of examples or swapped examples, if predictions are not of exactly these episodes or are
    named as the model, if the images are not there, or if `out` cannot be written.
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
    if shifts:
        _check_shifts(shards, decoding)
    _check(model, shards, shots, decoding)
    folder_name = Path(model_dir).resolve().name
    if predictions and (taken := name_of_folder(folder_name)) in predictions:
        raise InputError(
            f"--predictions: the rows of the model are named {taken}; give the other system "
            "another name."
        )
    sets = [EpisodeSet(shards, model.codec, task, limit) for task in shards.manifest.samples]
    if controls is not None and "swapped" in controls:
        _check_swaps(shards, sets)
    if decoding == "mirrored" and not any(episodes.task.mirrors for episodes in sets):
        decoding = "parallel"
    chosen_controls = ("swapped",) if controls is None else controls
    run = _Evaluation(
        model=model,
        shards=shards,
        sets=sets,
        conditions={
            episodes.task.name: _conditions(episodes, shots, chosen_controls) for episodes in sets
        },
        controls=chosen_controls,
        limit=limit,
        batch_size=batch_size,
        decoding=decoding,
        shifts=shifts,
        others=_other_systems(sets, predictions or {}),
        photographs=_photographs(model, shards, sets, decoding, images, shifts),
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        log = PredictionLog(out, run.header, process)
        run.predict(log)
        if not process.is_main_process:
            return None
        return run.report(log, out, folder_name, sections, _machine(process))


def _photographs(
    model: InContextModel,
    shards: ShardSet,
    sets: Sequence[EpisodeSet],
    decoding: Decoding,
    images: Path | None,
    shifts: bool,
) -> dict[str, Photographs]:
    """Task -> the photographs of its queries, where they are needed: the outlines of masks follow
    their edges, or they are read in shifted views. Raises InputError if that of the first query is
    not there.
    """
    if decoding == "autoregressive":
        return {}
    found = {}
    for episodes in sets:
        shifted = shifts and _can_shift(episodes)
        if (shifted or (model.edges and episodes.task.outlines)) and len(episodes):
            found[episodes.task.name] = Photographs(shards, episodes.task.name, images)
            try:
                found[episodes.task.name].at_model_size(episodes[0], -1)
            except InputError as error:
                plain = "leave masks as the model draws them with --no-edges"
                advice = [*["leave out --shifts"] * shifted, *[plain] * (model.edges is not None)]
                reason = str(error).removesuffix(".")
                raise InputError(f"{reason}, or {' and '.join(advice)}.") from error
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


@dataclass(frozen=True)
class _Evaluation:
    """One call of `evaluate`, checked. conditions, others, photographs: by task."""

    model: InContextModel
    shards: ShardSet
    sets: Sequence[EpisodeSet]
    conditions: Mapping[str, Sequence[Condition]]
    controls: Sequence[Control]
    limit: int | None
    batch_size: int
    decoding: Decoding
    shifts: bool
    others: Mapping[str, Sequence[OtherSystem]]
    photographs: Mapping[str, Photographs]

    @property
    def header(self) -> dict[str, Any]:
        """All that the predictions depend on."""
        return {
            "model": self.model.fingerprint,
            "shards": self.shards.short_fingerprint,
            "limit": self.limit,
            "batch_size": self.batch_size,
            "dtype": str(self.model.decoder.dtype).removeprefix("torch."),
            **_written_how(self.model, self.decoding, self.shifts),
        }

    def predict(self, log: PredictionLog) -> None:
        """Complete all queries under all conditions, each process a part of them."""
        batch_size = self._batch_size
        for episodes in self.sets:
            of_task = self.photographs.get(episodes.task.name)
            for condition in self.conditions[episodes.task.name]:
                shifts = self.shifts and _can_shift(episodes)
                how = (batch_size, self.decoding, of_task, shifts)
                predict(self.model, episodes, condition, log, *how)
        log.gather()

    def report(
        self,
        log: PredictionLog,
        out: Path,
        model_name: str,
        sections: Sequence[Section],
        machine: str,
    ) -> Metrics:
        """Score what was predicted, and write the files of an evaluation."""
        tasks: dict[str, TaskResult] = {}
        galleries: list[Gallery] = []
        proofs: dict[str, Gallery] = {}
        for episodes in self.sets:
            task, conditions = episodes.task.name, self.conditions[episodes.task.name]
            scores = TaskScores(
                self.model, episodes, conditions, log, self.others[task], self._batch_size
            )
            tasks[task] = TaskResult(
                scores.rows(),
                held_out_loss(self.model, self.shards, task, self.limit, self._batch_size),
                scores.classes,
                episodes.task.measure,
                scores.swapped_rows(),
                _why_not_swapped(episodes, conditions, self.controls),
                scores.by_shots(),
            )
            condition = max((c for c in conditions if c.control is None), key=lambda c: c.shots)
            images = Images(self.model, self.shards, task)
            galleries.append(draw_gallery(images, episodes, condition, log))
            if swapped := [c for c in conditions if c.control == "swapped"]:
                proofs[task] = draw_proof(images, episodes, swapped[-1], log, scores.judge)
        metrics = Metrics(
            **self.header,
            model_folder=model_name,
            shards_folder=Path(self.shards.location).name,
            versions=installed_versions(_PACKAGES),
            tasks=tasks,
            standard=self.shards.manifest.standard,
            machine=machine,
        )
        told = [
            episodes.task.name
            for episodes in self.sets
            if episodes.task.needs_category(self.model.format)
        ]
        write_report(out / "report.html", metrics, galleries, sections, proofs, told)
        write_whole(out / "speed.json", json.dumps(metrics.speed(), indent=1) + "\n")
        log.write()
        # Where it is, the evaluation is complete.
        write_whole(out / "metrics.json", json.dumps(metrics.to_json(), indent=1) + "\n")
        log.end()
        return metrics

    @property
    def _batch_size(self) -> int:
        return min(self.batch_size, max(self.shards.manifest.samples.values(), default=1))


def _machine(process: PartialState) -> str:
    """What computes, in words."""
    if process.device.type == "cuda":
        what = torch.cuda.get_device_name(process.device)
    else:
        threads = torch.get_num_threads()
        what = f"{threads} thread{'' if threads == 1 else 's'} of a CPU ({platform.machine()})"
    return what if process.num_processes == 1 else f"{process.num_processes} processes, each {what}"


def _can_shift(episodes: EpisodeSet) -> bool:
    """Whether the queries can be read in shifted views."""
    return episodes.task is SEGMENTATION


def _check_shifts(shards: ShardSet, decoding: Decoding) -> None:
    check_shifts(decoding)
    if not shards.count(SEGMENTATION.name):
        raise InputError(f"Shifted readings are for segmentation; {shards.location} has none.")


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
    if all(episodes.task is SEMANTIC_SEGMENTATION for episodes in sets):
        raise InputError(_NO_SWAPS)
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
    if fitted is not None and fitted["shards"] == shards.short_fingerprint:
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


def _written_how(model: InContextModel, decoding: Decoding, shifts: bool) -> dict[str, Any]:
    """How the outputs were written, for metrics.json. greedy: every token is the most probable one.
    parallel and mirrored: masks are decoded in one pass; these also have the threshold of the
    expected IoU, below which nothing is marked, and the settings with which outlines follow the
    edges of images, if they do. "shifted" after these: queries were read in shifted views.
    """
    if decoding == "autoregressive":
        return {"decoding": "greedy"}
    config = model.decoder.config
    return {
        "decoding": f"{decoding}, shifted" if shifts else decoding,
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
    episodes: EpisodeSet, conditions: Sequence[Condition], controls: Sequence[Control]
) -> str:
    """Empty where they were."""
    if any(condition.control == "swapped" for condition in conditions):
        return ""
    if "swapped" not in controls:
        return "Examples were not swapped: the control was not asked for."
    if not any(condition.shots for condition in conditions):
        return "Examples were not swapped: none were shown."
    if episodes.task is SEMANTIC_SEGMENTATION:
        return _NO_SWAPS
    if not episodes.keep_objects:
        return (
            "Examples were not swapped: these shards do not keep what else a query shows, as "
            "shards that are built again do."
        )
    return (
        "Examples were not swapped: no query shows another class of which the shards have examples."
    )
