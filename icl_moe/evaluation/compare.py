"""`icl-moe compare`: two models, or the predictions of two systems, on the same queries, with tests
of significance.

Scores are those of `icl-moe evaluate`. The interval of a difference is that of the paired
bootstrap, in which queries are resampled and both systems are scored on each resample; its p is
that of the permutation test, in which the two outputs for a query are exchanged (see bootstrap.py).
Flips, which are right or wrong query by query, are compared by the sign test on the queries in
which exactly one of the two is right (McNemar's exact test).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from icl_moe.bootstrap import Interval, differences
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.other_systems import no_predictions, open_episodes, read_predictions
from icl_moe.evaluation.predictions import Condition, read_log
from icl_moe.evaluation.proof import SwappedQuery, flips
from icl_moe.tables import Table
from icl_moe.tasks.task import Measure, Output

_PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Compared:
    """One measure of two systems A and B on the same queries. shots_a, shots_b: how many examples
    each system was shown. difference: B - A. p: the two-sided p of the hypothesis that there is no
    difference. test: the test that gave p. interval: the 95 % interval of the difference; None for
    a test that has none. is_share: whether the measure is printed times 100.
    """

    task: str
    shots_a: int
    shots_b: int
    measure: str
    queries: int
    a: float
    b: float
    difference: float
    interval: Interval | None
    p: float
    test: str
    is_share: bool = True


@dataclass(frozen=True)
class _System:
    """The outputs of a system for each task by key, and with swapped examples where it has them.
    shots: how many examples it was shown, for each task.
    """

    name: str
    shots: Mapping[str, int]
    own: Mapping[str, Mapping[str, Output]]
    swapped: Mapping[str, Mapping[str, Output]]


def compare(
    a: Path, b: Path, shards: ShardSet, shots: int | None = None, limit: int | None = None
) -> list[Compared]:
    """Compare two folders, each of an evaluation (`icl-moe evaluate --out`) or of predictions, on
    the episodes of `shards`.

    shots: the number of examples to compare, if an evaluation has several; by default the largest.
    Predictions have one number, which the table says.
    limit: how many episodes of each task to compare. Predictions must be for exactly these
    episodes, and evaluations must contain them; by default they are the episodes of the
    evaluations, or all. Raises InputError if the folders are not for the same queries of these
    shards, or if `shots` has nothing to choose from.
    """
    if shots is not None and not any((folder / _PREDICTIONS).is_file() for folder in (a, b)):
        raise InputError(
            "--shots chooses among the numbers of examples of an evaluation; the predictions in "
            f"{a} and {b} are of one number each."
        )
    limit = limit or _common_limit(a, b, shards)
    sets = open_episodes(shards, limit, every_task=True)
    systems = [_open(folder, shards, sets, shots) for folder in (a, b)]
    found: list[Compared] = []
    for episodes in sets:
        task = episodes.task.name
        if all(task in system.own for system in systems):
            found += _compare_task(episodes, shards, systems)
    if not found:
        raise InputError(f"{a} and {b} have predictions of no common task of {shards.location}.")
    return found


def comparison_table(found: Sequence[Compared]) -> Table:
    head = ["task", "examples", "measure", "queries", "A", "B", "B - A", "95 % interval", "p"]
    return Table([*head, "test"], [_line(compared) for compared in found])


def _line(compared: Compared) -> list[str]:
    def formatted(value: float) -> str:
        return Measure(value, is_share=compared.is_share).text

    def signed(value: float) -> str:
        text = formatted(abs(value))
        return f"{'-' if value < 0 and float(text) else '+'}{text}"

    interval = "" if compared.interval is None else " – ".join(map(signed, compared.interval))
    found = [formatted(compared.a), formatted(compared.b), signed(compared.difference), interval]
    a, b = compared.shots_a, compared.shots_b
    shots = str(a) if a == b else f"A {a}, B {b}"
    p = f"{compared.p:.4f}" if compared.p >= _LEAST_P else f"< {_LEAST_P}"
    return [compared.task, shots, compared.measure, str(compared.queries), *found, p, compared.test]


_LEAST_P = 0.0001
"""The least p that is printed as a number."""


def _common_limit(a: Path, b: Path, shards: ShardSet) -> int | None:
    """How many episodes of each task the evaluations among the two folders have; None for all."""
    every = max(shards.manifest.samples.values(), default=0)
    headers = [_header(folder) for folder in (a, b) if (folder / _PREDICTIONS).is_file()]
    counts = [min(header.get("limit") or every, every) for header in headers]
    if len(set(counts)) > 1:
        first, second = ("all" if count == every else f"the first {count}" for count in counts)
        raise InputError(
            f"{a} is of {first} episodes of each task and {b} of {second}; compare them on "
            f"those that both have with --limit {min(counts)}."
        )
    return counts[0] if counts and counts[0] < every else None


def _header(folder: Path) -> dict[str, Any]:
    path = folder / _PREDICTIONS
    with path.open(encoding="utf-8") as file:
        try:
            header = json.loads(file.readline())
        except ValueError as error:
            raise InputError(f"{path} is damaged; evaluate again.") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is damaged; evaluate again.")
    return header


def _open(folder: Path, shards: ShardSet, sets: Sequence[EpisodeSet], shots: int | None) -> _System:
    if (folder / _PREDICTIONS).is_file():
        return _open_evaluation(folder, shards, shots)
    own, swapped, shots_of = {}, {}, {}
    for episodes in sets:
        system = read_predictions(folder, episodes)
        if system is None:
            continue
        task = episodes.task.name
        shots_of[task] = system.shots
        own[task] = dict(zip(episodes.keys, system.outputs, strict=True))
        if system.swapped is not None:
            keys = [question.truth.key for question in episodes.questions(swapped=True)]
            swapped[task] = dict(zip(keys, system.swapped, strict=True))
    if not own:
        problem = str(no_predictions(folder, list(shards.manifest.samples))).rstrip(".")
        raise InputError(f"{problem}; nor is there the {_PREDICTIONS} of an evaluation.")
    return _System(folder.name, shots_of, own, swapped)


def _open_evaluation(folder: Path, shards: ShardSet, shots: int | None) -> _System:
    if _header(folder).get("shards") != shards.short_fingerprint:
        raise InputError(
            f"{folder} is an evaluation on other shards than {shards.location}: their manifests "
            "differ."
        )
    lines = read_log(folder / _PREDICTIONS)
    taken: dict[str, dict[str, dict[str, Output]]] = {"own": {}, "swapped": {}}
    available = {line.condition.shots for line in lines}
    most = max(available, default=0) if shots is None else shots
    if most not in available:
        raise InputError(
            f"{folder} has no predictions after {most} examples; it has "
            f"{', '.join(map(str, sorted(available)))}."
        )
    for line in lines:
        for kind, control in (("own", None), ("swapped", "swapped")):
            if line.condition == Condition(line.condition.task, most, control):  # type: ignore[arg-type]
                taken[kind].setdefault(line.condition.task, {})[line.key] = line.said
    own, swapped = taken["own"], taken["swapped"]
    return _System(folder.name, dict.fromkeys(own, most), own, swapped)


def _compare_task(
    episodes: EpisodeSet, shards: ShardSet, systems: Sequence[_System]
) -> list[Compared]:
    task = episodes.task
    truths = [episodes[index] for index in range(len(episodes))]
    outputs = []
    for system in systems:
        missing = [truth.key for truth in truths if truth.key not in system.own[task.name]]
        if missing:
            raise InputError(
                f"{system.name} lacks {len(missing)} of {len(truths)} episodes of {task.name}, the "
                f"first of them {missing[0]}."
            )
        outputs.append([system.own[task.name][truth.key] for truth in truths])
    statistic = task.statistic(outputs, truths, shards.manifest.format)
    shots_a, shots_b = (system.shots[task.name] for system in systems)
    compared = [
        Compared(
            task.name,
            shots_a,
            shots_b,
            name,
            len(truths),
            found.a,
            found.b,
            found.value,
            found.interval,
            found.p,
            _TEST,
            is_share=name not in statistic.plain,
        )
        for name, found in zip(statistic.names, differences(statistic, len(truths)), strict=True)
    ]
    return compared + _flips(episodes, shards, systems)


_TEST = "permutation"


def _flips(episodes: EpisodeSet, shards: ShardSet, systems: Sequence[_System]) -> list[Compared]:
    """Nothing where one of the systems was not asked with swapped examples, or none of these
    queries has any.
    """
    task = episodes.task
    if not episodes.swaps or not all(task.name in system.swapped for system in systems):
        return []
    truths = [episodes[number] for number in episodes.swaps]
    every = [episodes[index] for index in range(len(episodes))]
    judge = task.judge(every, shards.manifest.format)
    rights = []
    for system in systems:
        own, swapped = system.own[task.name], system.swapped[task.name]
        queries = [
            SwappedQuery(truth, swap.shown, own[truth.key], swapped[truth.key])
            for truth, swap in zip(truths, episodes.swaps.values(), strict=True)
        ]
        rights.append(np.array([flips(task, query, judge) for query in queries]))
    a, b = rights
    p = sign_test(int(np.sum(a & ~b)), int(np.sum(b & ~a)))
    share_a, share_b = float(a.mean()), float(b.mean())
    shots_a, shots_b = (system.shots[task.name] for system in systems)
    return [
        Compared(
            task.name,
            shots_a,
            shots_b,
            "flips",
            len(a),
            share_a,
            share_b,
            share_b - share_a,
            None,
            p,
            "sign test",
        )
    ]


def sign_test(first: int, second: int) -> float:
    """The two-sided p of the exact sign test: `first` queries speak for the one system and `second`
    for the other, and each would do so with probability 1/2 if there were no difference.
    """
    total, fewer = first + second, min(first, second)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)
