"""The scores of one task in an evaluation: of the model, of other systems, and of what needs no
model at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from tqdm import tqdm

from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.matcher import Matcher
from icl_moe.evaluation.other_systems import OtherSystem
from icl_moe.evaluation.predictions import Condition, Prediction, PredictionLog, describe_shots
from icl_moe.evaluation.proof import ShotScores, SwappedQuery, score_shots, score_swaps
from icl_moe.evaluation.results import Asked, Classes, Row, Source, SwapRow
from icl_moe.inference.model import InContextModel
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.task import Judge, Output

_FIRST_EXAMPLE: tuple[str, Source] = (
    "the first example's output, whatever the query",
    "first example",
)


@dataclass(frozen=True)
class TaskScores:
    """What the model said to the episodes of a task under `conditions`, and other systems to the
    same.
    """

    model: InContextModel
    episodes: EpisodeSet
    conditions: Sequence[Condition]
    log: PredictionLog
    others: Sequence[OtherSystem]
    batch_size: int

    @cached_property
    def judge(self) -> Judge:
        return self.episodes.task.judge(self._truths, self.model.format)

    @property
    def classes(self) -> Classes:
        evaluated = sorted({truth.category for truth in self._truths})
        trained = getattr(self.model.decoder.config, "classes", None)
        if trained is None:
            return Classes(evaluated, None)
        seen = sorted(set(evaluated) & set(trained.get(self.episodes.task.name, ())))
        return Classes(evaluated, seen)

    def rows(self) -> tuple[Row, ...]:
        """Scores of the model under each condition that asks all queries, then of other systems, of
        the first example's output, of matchers, of the task's baselines, and of the truth through
        the tokenizer (the mask ceiling), if that is a bound.
        """
        task, truths = self.episodes.task, self._truths
        conditions = [condition for condition in self.conditions if condition.control != "swapped"]
        logged = [[self.log[condition, truth.key] for truth in truths] for condition in conditions]
        sets = [[prediction.said for prediction in predictions] for predictions in logged]
        names: list[tuple[str, Source, int | None]] = []
        for system in self.others:
            names.append((*_other(system), system.shots))
            sets.append(list(system.outputs))
        if self.episodes.examples:
            names.append((*_FIRST_EXAMPLE, None))
            sets.append([task.true_output(truth, 0) for truth in truths])
        for matcher in self._matchers:
            names.append((*_matched(matcher), matcher.shots))
            sets.append(matcher.said(truths, truths))
        for baseline in task.baselines(truths):
            names.append((baseline.name, baseline.prediction, None))
            sets.append(list(baseline.outputs))
        if ceiling := self._ceiling():
            names.append(("the truth through the tokenizer (ceiling)", "tokenizer", None))
            sets.append(ceiling)
        scores = iter(task.score(sets, truths, self.model.format))
        rows = [
            Row(condition.describe(), "model", next(scores), _asked(condition, predictions))
            for condition, predictions in zip(conditions, logged, strict=True)
        ]
        rows += [Row(name, source, next(scores), shots=shots) for name, source, shots in names]
        return tuple(rows)

    def swapped_rows(self) -> tuple[SwapRow, ...]:
        """Scores on the queries that show another class too, after their own and after swapped
        examples: those of the model after each number of examples, of other systems with
        predictions for swapped examples, of the first example's output, of matchers, and of the
        task's baselines, which do not depend on the examples. Empty if the model was not evaluated
        with swapped examples.
        """
        conditions = [condition for condition in self.conditions if condition.control == "swapped"]
        if not conditions:
            return ()
        episodes, task = self.episodes, self.episodes.task
        truths = [episodes[number] for number in episodes.swaps]
        sources = [swap.source for swap in episodes.swaps.values()]
        rows = []
        for swapped in conditions:
            own = swapped._replace(control=None)
            predictions, swapped_predictions = (
                [self.log[condition, truth.key].said for truth in truths]
                for condition in (own, swapped)
            )
            name: tuple[str, Source] = own.describe(), "model"
            rows.append(self._swapped_row(name, own.shots, predictions, swapped_predictions))
        for system in self.others:
            if system.swapped is not None:
                own_outputs = [system.outputs[number] for number in episodes.swaps]
                row = self._swapped_row(_other(system), system.shots, own_outputs, system.swapped)
                rows.append(row)
        first = [task.true_output(truth, 0) for truth in truths]
        first_swapped = [task.true_output(source, 0) for source in sources]
        rows.append(self._swapped_row(_FIRST_EXAMPLE, 1, first, first_swapped))
        for matcher in self._matchers:
            outputs = matcher.said(truths, truths), matcher.said(truths, sources)
            rows.append(self._swapped_row(_matched(matcher), matcher.shots, *outputs))
        for baseline in task.baselines(truths):
            name, same = (baseline.name, baseline.prediction), baseline.outputs
            rows.append(self._swapped_row(name, None, same, same))
        return tuple(rows)

    def _swapped_row(
        self,
        name: tuple[str, Source],
        shots: int | None,
        own_outputs: Sequence[Output],
        swapped_outputs: Sequence[Output],
    ) -> SwapRow:
        """The outputs are those for the queries of `EpisodeSet.swaps`, in this order."""
        swaps = self.episodes.swaps.items()
        queries = [
            SwappedQuery(self.episodes[number], swap.shown, *outputs)
            for (number, swap), *outputs in zip(swaps, own_outputs, swapped_outputs, strict=True)
        ]
        return SwapRow(*name, shots, score_swaps(self.episodes.task, queries, self.judge))

    def by_shots(self) -> tuple[ShotScores, ...]:
        """Empty if only one number of examples was asked for."""
        own = [condition for condition in self.conditions if condition.control is None]
        if len(own) == 1:
            return ()
        predictions = {
            c.shots: [self.log[c, truth.key].said for truth in self._truths] for c in own
        }
        return score_shots(self.episodes.task, self._truths, predictions)

    @cached_property
    def _truths(self) -> list[EvaluationEpisode]:
        return list(self._all("reading"))

    @cached_property
    def _matchers(self) -> list[Matcher]:
        """Training-free matchers for each number of examples, if input images are features
        codes.
        """
        features = self.model.tokenizers.features
        if features is None or self.episodes.task is not SEGMENTATION:
            return []
        counts = [
            condition.shots
            for condition in self.conditions
            if condition.control is None and condition.shots
        ]
        return [Matcher(features, self.episodes, count) for count in counts]

    def _ceiling(self) -> list[Output]:
        everything = self._all("tokenizer's ceiling")
        outputs: list[Output] = []
        while batch := list(islice(everything, self.batch_size)):
            outputs += self.episodes.task.ceiling(self.model, batch) or []
        return outputs

    def _all(self, doing: str) -> Iterator[EvaluationEpisode]:
        description = f"{doing}, {self.episodes.task.name}"
        yield from tqdm(self.episodes, desc=description, unit="episode", leave=False)


def _other(system: OtherSystem) -> tuple[str, Source]:
    return f"{system.name}, {describe_shots(system.shots)}", "predictions"


def _matched(matcher: Matcher) -> tuple[str, Source]:
    return f"the training-free matcher, {describe_shots(matcher.shots)}", "matcher"


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
