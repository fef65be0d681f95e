"""`icl-moe compare`: two models, or the predictions of two systems, on the same queries, with tests
of significance.

Scores are compared by the paired bootstrap (Efron and Tibshirani 1993; Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation"): queries are resampled, and both systems are
scored on each resample. Flips, which are right or wrong query by query, are compared by the sign
test on the queries in which exactly one of the two is right (McNemar's exact test).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from icl_moe.bootstrap import Interval, differences
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.other_systems import open_episodes, read_predictions
from icl_moe.evaluation.predictions import Condition, read_log
from icl_moe.evaluation.proof import SwappedQuery, flips
from icl_moe.rle import decode_rle
from icl_moe.tables import Table, percent
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.caption_scores import tokenise
from icl_moe.tasks.task import Output

_PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Compared:
    """One measure of two systems A and B on the same queries. difference: B - A. p: of the
    hypothesis that there is none, two-sided; test: how it was found. interval: 95 %, of the
    difference; None for a test that has none.
    """

    task: str
    measure: str
    queries: int
    a: float
    b: float
    difference: float
    interval: Interval | None
    p: float
    test: str


@dataclass(frozen=True)
class _System:
    """The outputs of a system for each task by key, and with swapped examples where it has them."""

    name: str
    own: Mapping[str, Mapping[str, Output]]
    swapped: Mapping[str, Mapping[str, Output]]


def compare(a: Path, b: Path, shards: ShardSet, shots: int | None = None) -> list[Compared]:
    """Compare two folders, each of an evaluation (`icl-moe evaluate --out`) or of predictions, on
    the episodes of `shards`.

    shots: of evaluations with several numbers of examples, the one to compare; by default the
    largest. Raises InputError if they are not of the same queries of these shards.
    """
    limit = _common_limit(a, b)
    sets = open_episodes(shards, limit)
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
    head = ["task", "measure", "queries", "A", "B", "B - A", "95 % interval", "p", "test"]
    return Table(head, [_line(each) for each in found])


def _line(each: Compared) -> list[str]:
    interval = "" if each.interval is None else " – ".join(map(_signed, each.interval))
    shown = [percent(each.a), percent(each.b), _signed(each.difference), interval]
    return [each.task, each.measure, str(each.queries), *shown, f"{each.p:.3f}", each.test]


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _common_limit(a: Path, b: Path) -> int | None:
    """How many episodes of each task the evaluations among the two folders have."""
    headers = [_header(folder) for folder in (a, b) if (folder / _PREDICTIONS).is_file()]
    limits = {header.get("limit") for header in headers}
    if len(limits) > 1:
        raise InputError(
            f"{a} and {b} are of other queries: the first {_limit_words(headers[0])} and "
            f"{_limit_words(headers[1])} of each task."
        )
    return limits.pop() if limits else None


def _limit_words(header: Mapping[str, Any]) -> str:
    return "all" if header.get("limit") is None else str(header["limit"])


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
    own = {}
    for episodes in sets:
        system = read_predictions(folder, episodes)
        if system is not None:
            own[episodes.task.name] = dict(zip(episodes.keys, system.outputs, strict=True))
    if not own:
        raise InputError(
            f"{folder} holds neither an evaluation ({_PREDICTIONS}) nor predictions "
            f"({' or '.join(f'{episodes.task.name}.json' for episodes in sets)})."
        )
    return _System(folder.name, own, {})


def _open_evaluation(folder: Path, shards: ShardSet, shots: int | None) -> _System:
    if _header(folder).get("shards") != shards.fingerprint[:16]:
        raise InputError(
            f"{folder} is an evaluation on other shards than {shards.location}: their manifests "
            "differ."
        )
    lines = read_log(folder / _PREDICTIONS)
    taken: dict[str, dict[str, dict[str, Output]]] = {"own": {}, "swapped": {}}
    asked = {line.condition.shots for line in lines}
    most = max(asked, default=0) if shots is None else shots
    if most not in asked:
        raise InputError(
            f"{folder} has no predictions after {most} examples; it has "
            f"{', '.join(map(str, sorted(asked)))}."
        )
    for line in lines:
        for kind, control in (("own", None), ("swapped", "swapped")):
            if line.condition == Condition(line.condition.task, most, control):  # type: ignore[arg-type]
                taken[kind].setdefault(line.condition.task, {})[line.key] = line.said
    return _System(folder.name, taken["own"], taken["swapped"])


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
    measures = _mask_measures if task is SEGMENTATION else _caption_measures
    names, values, statistic = measures(truths, outputs)
    found = differences(statistic, len(truths))
    compared = [
        Compared(task.name, name, len(truths), *of, each.value, each.interval, each.p, _BOOTSTRAP)
        for name, of, each in zip(names, values, found, strict=True)
    ]
    return compared + _flips(episodes, shards, systems)


_BOOTSTRAP = "paired bootstrap"

_Statistic = Callable[[np.ndarray], np.ndarray]
_Measures = tuple[list[str], list[tuple[float, float]], _Statistic]
"""The names of measures; of each, the values of A and B; and from weights (draws, queries), the
differences B - A (draws, measures).
"""


def _mask_measures(
    truths: Sequence[EvaluationEpisode], outputs: Sequence[Sequence[Output]]
) -> _Measures:
    """mIoU (the mean over classes of the IoU of their summed pixels) and mean IoU."""
    classes, of_Q = np.unique([truth.category for truth in truths], return_inverse=True)
    one_QC = np.eye(len(classes))[of_Q]
    pixels = [_pixels(truths, of_system) for of_system in outputs]

    def scores(weights_BQ: np.ndarray) -> list[np.ndarray]:
        """Of each system mIoU and mean IoU, (B, 2)."""
        found = []
        for both_Q, either_Q in pixels:
            either_BC = weights_BQ * either_Q @ one_QC
            drawn_BC = weights_BQ @ one_QC > 0
            iou_BC = np.where(either_BC > 0, weights_BQ * both_Q @ one_QC, 1.0)
            iou_BC = iou_BC / np.where(either_BC > 0, either_BC, 1.0)
            miou_B = np.sum(iou_BC * drawn_BC, axis=1) / drawn_BC.sum(axis=1)
            iou_Q = np.where(either_Q > 0, both_Q, 1.0) / np.where(either_Q > 0, either_Q, 1.0)
            found.append(np.stack([miou_B, weights_BQ @ iou_Q / weights_BQ.sum(axis=1)], axis=1))
        return found

    return _measures(["mIoU", "mean IoU"], scores, len(truths))


def _measures(
    names: list[str], scores: Callable[[np.ndarray], list[np.ndarray]], queries: int
) -> _Measures:
    """scores: weights (B, Q) -> of A and of B, (B, measures)."""
    a, b = (each[0].tolist() for each in scores(np.ones((1, queries))))

    def statistic(weights_BQ: np.ndarray) -> np.ndarray:
        first, second = scores(weights_BQ)
        return second - first

    return names, list(zip(a, b, strict=True)), statistic


def _pixels(
    truths: Sequence[EvaluationEpisode], outputs: Sequence[Output]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each query the pixels in both masks, and in either one, float64 (Q,)."""
    counts = []
    for truth, output in zip(truths, outputs, strict=True):
        said_HW = decode_rle(output["mask"])
        true_HW = decode_rle(truth.task.true_output(truth)["mask"])
        counts.append((np.sum(said_HW & true_HW), np.sum(said_HW | true_HW)))
    both_Q, either_Q = np.array(counts, dtype=np.float64).T
    return both_Q, either_Q


def _caption_measures(
    truths: Sequence[EvaluationEpisode], outputs: Sequence[Sequence[Output]]
) -> _Measures:
    """CIDEr and ROUGE-L, whose values for a query do not depend on the draw."""
    values = [_caption_values(truths, of_system) for of_system in outputs]

    def scores(weights_BQ: np.ndarray) -> list[np.ndarray]:
        return [weights_BQ @ of_Q2 / weights_BQ.sum(axis=1, keepdims=True) for of_Q2 in values]

    return _measures(["CIDEr", "ROUGE-L"], scores, len(truths))


def _caption_values(truths: Sequence[EvaluationEpisode], outputs: Sequence[Output]) -> np.ndarray:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    right = [truth.meta["references"][0] for truth in truths]
    texts = [output["caption"] or "" for output in outputs]
    tokens, _ = tokenise([*texts, *(text for of in right for text in of)])
    rest = iter(tokens)
    said = {str(n): [next(rest)] for n in range(len(texts))}
    references = {str(n): [next(rest) for _ in of] for n, of in enumerate(right)}
    columns = [scorer.compute_score(references, said)[1] for scorer in (Cider(), Rouge())]
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


def _flips(episodes: EpisodeSet, shards: ShardSet, systems: Sequence[_System]) -> list[Compared]:
    """Nothing where one of the systems was not asked with swapped examples."""
    task = episodes.task
    if not all(task.name in system.swapped for system in systems):
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
    means = float(a.mean()), float(b.mean())
    difference = means[1] - means[0]
    return [Compared(task.name, "flips", len(a), *means, difference, None, p, "sign test")]


def sign_test(first: int, second: int) -> float:
    """The two-sided p of the exact sign test: `first` queries speak for the one system and `second`
    for the other, and each would do so with probability 1/2 if there were no difference.
    """
    total, fewer = first + second, min(first, second)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)
