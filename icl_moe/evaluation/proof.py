"""Scores whether a model does what its examples show: swapped examples (the same queries with
examples of two classes that they show), and more or fewer examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from icl_moe.bootstrap import Interval, mean_intervals
from icl_moe.sequence import SequenceFormat
from icl_moe.tasks import Task
from icl_moe.tasks.task import Objects, Output, Truth


class SwappedQuery(NamedTuple):
    """A query that shows another class, `shown` by the swapped examples; the output after its own
    examples, and after the swapped ones.
    """

    truth: Truth
    shown: str
    said: Output
    said_swapped: Output


@dataclass(frozen=True)
class SwapScores:
    """Shares and means over the queries that show another class.

    own_with_own: agreement of the output after the right examples with the query's own class;
    own_with_other: with the other class. swapped_with_shown, swapped_with_own: agreement of the
    output after the swapped examples with the class that they show and with the query's own.
    Agreement is the task's (IoU of masks, ROUGE-L of captions).
    right, right_swapped: how often an output is for the class that the examples show
    (`Task.follows`), after the right and after the swapped examples. flips: how often both are
    right. intervals: 95 % intervals over queries, by score.
    """

    queries: int
    own_with_own: float
    own_with_other: float
    swapped_with_shown: float
    swapped_with_own: float
    right: float
    right_swapped: float
    flips: float
    intervals: dict[str, Interval] = field(default_factory=dict)


def score_swaps(task: Task, queries: Sequence[SwappedQuery], format: SequenceFormat) -> SwapScores:
    """Scores of at least one query."""
    rows = [_score_swap(task, query, format) for query in queries]
    values = dict(zip(_SWAP_SCORES, np.array(rows, dtype=np.float64).T, strict=True))
    means = {name: float(np.mean(of_queries)) for name, of_queries in values.items()}
    ranges = dict(zip(values, mean_intervals(*values.values()), strict=True))
    return SwapScores(len(queries), **means, intervals=ranges)


_SWAP_SCORES = (
    "own_with_own",
    "own_with_other",
    "swapped_with_shown",
    "swapped_with_own",
    "right",
    "right_swapped",
    "flips",
)


def _score_swap(task: Task, query: SwappedQuery, format: SequenceFormat) -> tuple[float, ...]:
    truth, shown, said, swapped = query
    objects: Objects = task.objects(truth)
    own, other = objects[truth.category], objects[shown]
    right = task.follows(said, truth.category, objects, format)
    right_swapped = task.follows(swapped, shown, objects, format)
    return (
        task.agreement(said, own),
        task.agreement(said, other),
        task.agreement(swapped, other),
        task.agreement(swapped, own),
        float(right),
        float(right_swapped),
        float(right and right_swapped),
    )


def flips(task: Task, query: SwappedQuery, format: SequenceFormat) -> bool:
    """Whether a query is right with the right examples and with the swapped ones."""
    return bool(_score_swap(task, query, format)[-1])


@dataclass(frozen=True)
class ShotScores:
    """The same queries after `shots` examples: the mean agreement with the truth, and the gain over
    the next smaller number of examples (None for the smallest), each with its 95 % interval. The
    gain's interval is computed from the differences of each query, so it is narrower than the two
    intervals suggest.
    """

    shots: int
    queries: int
    agreement: float
    interval: Interval
    gain: float | None = None
    gain_interval: Interval | None = None


def score_shots(
    task: Task, truths: Sequence[Truth], said: Mapping[int, Sequence[Output]]
) -> tuple[ShotScores, ...]:
    """Scores by number of examples, the smallest first. said: the output for each query after each
    number of examples.
    """
    right = [task.right_outputs(truth) for truth in truths]
    rows: list[ShotScores] = []
    before: np.ndarray | None = None
    for shots, outputs in sorted(said.items()):
        pairs = zip(outputs, right, strict=True)
        values = np.array([task.agreement(output, of_query) for output, of_query in pairs])
        gained = values if before is None else values - before
        interval, gain_interval = mean_intervals(values, gained)
        gain = None if before is None else (float(gained.mean()), gain_interval)
        rows.append(ShotScores(shots, len(truths), float(values.mean()), interval, *(gain or ())))
        before = values
    return tuple(rows)
