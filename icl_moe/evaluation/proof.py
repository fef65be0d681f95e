"""Whether a model does what its examples show: the same queries with examples of two classes that
both are seen in them (of two styles, where they are described in several), and with more and fewer
examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from icl_moe.bootstrap import Interval, mean_intervals
from icl_moe.tasks import Task
from icl_moe.tasks.task import Judge, Kind, Output, Truth, kind_of


class SwappedQuery(NamedTuple):
    """A query that shows two things, with the model's output after the query's own examples, and
    its output after swapped examples, which are of the other thing, `shown`.
    """

    truth: Truth
    shown: Kind
    said: Output
    said_swapped: Output


@dataclass(frozen=True)
class RespectScores:
    """How often an output is what the examples show in one respect, over the queries whose own and
    swapped examples differ in it; as in `SwapScores`. The other queries are left out: if both
    examples are in one style, an output in this style is right after both, whether the model reads
    the examples or not.
    """

    queries: int
    right: float
    right_swapped: float
    flips: float
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class SwapScores:
    """Shares and means over the queries that show something else too, for which the swapped
    examples ask: another class, in another style where queries are described in several styles. A
    query that shows no such thing is asked for another class in its own style, or for its own class
    in another style.

    own_with_own: agreement of what is said after the right examples with what is annotated of the
    query's own kind; own_with_other: with the other kind. swapped_with_shown, swapped_with_own: of
    what is said after the swapped examples, with the kind that they show and with the query's own.
    Agreement is the task's (IoU of masks, ROUGE-L of captions). These four are means over the
    queries whose swapped examples are of another class, `of_another_class` in number; None where
    there are none.
    right, right_swapped: how often an output is what the examples show in every respect
    (`Task.judge`), after the right and after the swapped examples. flips: how often both.
    intervals: 95 % intervals over queries, by score. respects: the same shares in each respect
    alone, where there are several.
    """

    queries: int
    own_with_own: float | None
    own_with_other: float | None
    swapped_with_shown: float | None
    swapped_with_own: float | None
    right: float
    right_swapped: float
    flips: float
    of_another_class: int
    intervals: dict[str, Interval] = field(default_factory=dict)
    respects: dict[str, RespectScores] = field(default_factory=dict)


def score_swaps(task: Task, queries: Sequence[SwappedQuery], judge: Judge) -> SwapScores:
    """Scores of at least one query. judge: see `Task.judge`."""
    followed = [_follow(task, query, judge) for query in queries]
    every = [(all(own.values()), all(swapped.values())) for own, swapped in followed]
    shares, intervals = _means(_shares(every))
    others = [query for query in queries if "class" not in _shared(query)]
    agreements: dict[str, Any] = dict.fromkeys(_AGREEMENTS)
    if others:
        values = zip(*(_agreements(task, query) for query in others), strict=True)
        means, of_means = _means(dict(zip(_AGREEMENTS, values, strict=True)))
        agreements, intervals = means, of_means | intervals
    return SwapScores(
        len(queries),
        **agreements,
        **shares,
        of_another_class=len(others),
        intervals=intervals,
        respects=_score_respects(queries, followed),
    )


def _shared(query: SwappedQuery) -> set[str]:
    """The respects in which a query's own and its swapped examples are the same."""
    own, shown = kind_of(query.truth.meta), query.shown
    same = {"class": own.category == shown.category, "style": own.style == shown.style}
    return {name for name, is_same in same.items() if is_same}


_AGREEMENTS = ("own_with_own", "own_with_other", "swapped_with_shown", "swapped_with_own")


def _agreements(task: Task, query: SwappedQuery) -> tuple[float, ...]:
    objects = task.objects(query.truth)
    own, other = objects[kind_of(query.truth.meta)], objects[query.shown]
    return (
        task.agreement(query.said, own),
        task.agreement(query.said, other),
        task.agreement(query.said_swapped, other),
        task.agreement(query.said_swapped, own),
    )


_Followed = tuple[dict[str, bool], dict[str, bool]]
"""For each respect, such as the class, whether the output after the query's own examples is what
these show; and the same for the swapped examples.
"""


def _follow(task: Task, query: SwappedQuery, judge: Judge) -> _Followed:
    objects = task.objects(query.truth)
    return (
        judge(query.said, kind_of(query.truth.meta), objects),
        judge(query.said_swapped, query.shown, objects),
    )


def _score_respects(
    queries: Sequence[SwappedQuery], followed: Sequence[_Followed]
) -> dict[str, RespectScores]:
    """The scores of each respect, over the queries whose examples differ in it; empty if the
    queries are judged in one respect only.
    """
    names = dict.fromkeys(name for own, _ in followed for name in own)
    found = {}
    for name in names if len(names) > 1 else ():
        pairs = [
            (own[name], swapped[name])
            for query, (own, swapped) in zip(queries, followed, strict=True)
            if name in own and name not in _shared(query)
        ]
        if pairs:
            means, intervals = _means(_shares(pairs))
            found[name] = RespectScores(len(pairs), **means, intervals=intervals)
    return found


def _shares(right: Sequence[tuple[bool, bool]]) -> dict[str, Sequence[float]]:
    """Whether each query is right after its own examples, after the swapped ones, and after
    both.
    """
    return {
        "right": [own for own, _ in right],
        "right_swapped": [swapped for _, swapped in right],
        "flips": [own and swapped for own, swapped in right],
    }


def _means(values: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, Interval]]:
    """The means over queries, and their intervals."""
    arrays = {name: np.array(of_queries, dtype=np.float64) for name, of_queries in values.items()}
    means = {name: float(array.mean()) for name, array in arrays.items()}
    return means, dict(zip(arrays, mean_intervals(*arrays.values()), strict=True))


def flips(task: Task, query: SwappedQuery, judge: Judge) -> bool:
    """Whether a query is right with the right examples and with the swapped ones."""
    return all(all(respects.values()) for respects in _follow(task, query, judge))


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
    task: Task, truths: Sequence[Truth], predictions: Mapping[int, Sequence[Output]]
) -> tuple[ShotScores, ...]:
    """Scores by number of examples, the smallest first. predictions: the output for each query
    after each number of examples.
    """
    right = [task.right_outputs(truth) for truth in truths]
    rows: list[ShotScores] = []
    before: np.ndarray | None = None
    for shots, outputs in sorted(predictions.items()):
        pairs = zip(outputs, right, strict=True)
        values = np.array([task.agreement(output, of_query) for output, of_query in pairs])
        gained = values if before is None else values - before
        interval, gain_interval = mean_intervals(values, gained)
        gain = None if before is None else (float(gained.mean()), gain_interval)
        rows.append(ShotScores(shots, len(truths), float(values.mean()), interval, *(gain or ())))
        before = values
    return tuple(rows)
