"""The results of an evaluation, as stored in metrics.json."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from icl_moe.evaluation.held_out import HeldOutLoss
from icl_moe.evaluation.predictions import Control
from icl_moe.evaluation.proof import ShotScores, SwapScores
from icl_moe.tasks.task import Scores

Source = str
"""What produced the outputs that a row scores: the "model", the "first example" copied for every
query, the "tokenizer" (encoding and decoding the truth), the training-free "matcher", "predictions"
of another system, or a baseline of the task such as "every object".
"""


@dataclass(frozen=True)
class Asked:
    """How a model was asked, and how often it copied.

    copy_rate: how often an output equals that of an example; truth_copy_rate: how often the truth
    does. seconds_a_query: the median over queries of the time of a query's batch / the batch's
    size. The times are not in metrics.json, which so depends on nothing but model and data.
    """

    shots: int
    control: Control | None
    copy_rate: float
    truth_copy_rate: float
    queries_per_second: float
    seconds_a_query: float

    def to_json(self) -> dict[str, Any]:
        left_out = {*_TIMES, *(("control",) if self.control is None else ())}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def times(self) -> dict[str, Any]:
        """The content of speed.json."""
        return {name: vars(self)[name] for name in ("shots", "control", *_TIMES)}


_TIMES = ("queries_per_second", "seconds_a_query")


@dataclass(frozen=True)
class Row:
    """One row of a task's table. asked: how the model was asked; None if the outputs are not the
    model's. shots: for outputs of other systems, the number of examples, if it is known.
    """

    name: str
    prediction: Source
    scores: Scores
    asked: Asked | None = None
    shots: int | None = None

    def to_json(self) -> dict[str, Any]:
        head: dict[str, Any] = {"name": self.name, "prediction": self.prediction}
        asked = self.asked.to_json() if self.asked else {}
        if self.shots is not None:
            head["shots"] = self.shots
        return head | asked | asdict(self.scores)  # type: ignore[call-overload]


@dataclass(frozen=True)
class SwapRow:
    """One row of the table of swapped examples. shots: None if the outputs need no examples."""

    name: str
    prediction: Source
    shots: int | None
    scores: SwapScores

    def to_json(self) -> dict[str, Any]:
        head = {"name": self.name, "prediction": self.prediction, "shots": self.shots}
        return head | asdict(self.scores)


class Classes(NamedTuple):
    """The evaluated classes, and those of them that the model was trained on for this task (None if
    the model does not record it).
    """

    evaluated: list[str]
    seen_in_training: list[str] | None


@dataclass(frozen=True)
class TaskResult:
    """All results of one task.

    swapped: the queries that show another class, with their own and with swapped examples; if it is
    empty, swapped_note says why. by_shots: the same queries by number of examples; empty for a
    single number. measure: the name of the agreement measure in both.
    """

    rows: tuple[Row, ...]
    held_out: HeldOutLoss
    classes: Classes
    measure: str = ""
    swapped: tuple[SwapRow, ...] = ()
    swapped_note: str = ""
    by_shots: tuple[ShotScores, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [row.to_json() for row in self.rows],
            "held_out": asdict(self.held_out),
            "classes": self.classes._asdict(),
            "measure": self.measure,
            "swapped": [row.to_json() for row in self.swapped],
            "swapped_note": self.swapped_note,
            "by_shots": [asdict(row) for row in self.by_shots],
        }


@dataclass(frozen=True)
class Metrics:
    """An evaluation. model, shards: fingerprints. limit: episodes of each task, None for all.
    decoding: `greedy`, or how masks were decoded in one pass, `parallel` or `mirrored`, or one of
    these and ", shifted" (icl_moe/inference/shifts.py). mask_threshold, mask_edges: what was fitted
    for these (icl_moe/evaluation/fitting.py); edges are None if outlines do not follow the edges of
    images. standard: if the episodes are those of a benchmark, the header of their file: how they
    were drawn, the definition of the benchmark's own score, and the sha256. machine: the machine
    that computed, in words; it is in speed.json.
    """

    model: str
    shards: str
    limit: int | None
    batch_size: int
    decoding: str
    model_folder: str
    shards_folder: str
    versions: dict[str, str | None]
    tasks: dict[str, TaskResult]
    dtype: str = "float32"
    mask_threshold: dict[str, Any] | None = None
    mask_edges: dict[str, Any] | None = None
    standard: dict[str, Any] | None = None
    machine: str = "an unknown machine"

    def to_json(self) -> dict[str, Any]:
        """The content of metrics.json; docs/evaluation.md describes it."""
        tasks = {name: result.to_json() for name, result in self.tasks.items()}
        return {k: v for k, v in vars(self).items() if k != "machine"} | {"tasks": tasks}

    def speed(self) -> dict[str, Any]:
        """The content of speed.json: how long the model took, and where."""
        tasks = {
            name: [row.asked.times() for row in result.rows if row.asked]
            for name, result in self.tasks.items()
        }
        return {"machine": self.machine, "batch_size": self.batch_size, "tasks": tasks}
