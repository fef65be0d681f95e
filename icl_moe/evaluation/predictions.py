"""The model's outputs for every episode, saved batch by batch, so that an interrupted evaluation
resumes where it stopped.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.inference.model import Decoding, InContextModel
from icl_moe.sequence import Episode
from icl_moe.tasks.task import Output

Control = Literal["shuffled", "swapped"]
"""`shuffled`: each query is asked with examples of another class, whether it shows that or not. A
model that makes use of its examples must do worse then. `swapped`: with examples of another class
that is seen in the query itself, in another style where the query is described in several. A model
that does what its examples show does that then.
"""


class Condition(NamedTuple):
    """How the queries of a task are asked: after `shots` examples, which `control` may exchange."""

    task: str
    shots: int
    control: Control | None = None

    def describe(self) -> str:
        """For example "2 examples of another class"."""
        exchanged = {
            None: "",
            "shuffled": " of another class",
            "swapped": " of something else in the query",
        }[self.control]
        return f"{describe_shots(self.shots)}{exchanged}"


def describe_shots(shots: int) -> str:
    """Such as "1 example" or "2 examples"."""
    return f"{shots} example{'' if shots == 1 else 's'}"


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: the condition, the episode's key and class, and the model's
    output, whose keys depend on the task.

    shown: the class of the examples; shown_style: their style, "" where there are none. copied:
    whether it equals an example's output; truth_copied: whether the truth does. seconds: the time
    of its batch / the batch's size.
    """

    condition: Condition
    key: str
    true_category: str
    shown: str
    shown_style: str
    copied: bool
    truth_copied: bool
    seconds: float
    said: Output

    def to_json(self) -> dict[str, Any]:
        own = {
            name: value for name, value in vars(self).items() if name not in ("condition", "said")
        }
        return self.condition._asdict() | own | self.said

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Prediction":
        condition = Condition(*(values.pop(name) for name in Condition._fields))
        names = [f.name for f in fields(cls) if f.name not in ("condition", "said")]
        own = {name: values.pop(name) for name in names}
        return cls(condition, **own, said=values)


class PredictionLog:
    """predictions.jsonl of the folder `out`, under a temporary name until `finish`.

    header: everything that the predictions depend on. Earlier lines are reused only if their header
    is equal.
    """

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self._path, self._partial = out / "predictions.jsonl", out / "predictions.partial.jsonl"
        self._lines: dict[tuple[Condition, str], Prediction] = {}
        self._header = json.dumps(header)
        kept = self._read_partial()
        self._partial.write_text(
            "".join(line + "\n" for line in (self._header, *kept)), encoding="utf-8"
        )

    def __contains__(self, place: tuple[Condition, str]) -> bool:
        return place in self._lines

    def __getitem__(self, place: tuple[Condition, str]) -> Prediction:
        """The prediction under a condition for the episode with this key."""
        return self._lines[place]

    def add(self, predictions: Sequence[Prediction]) -> None:
        with self._partial.open("a", encoding="utf-8") as file:
            file.write(
                "".join(json.dumps(prediction.to_json()) + "\n" for prediction in predictions)
            )
        for prediction in predictions:
            self._keep(prediction)

    def finish(self) -> None:
        """Rename the file to its final name."""
        os.replace(self._partial, self._path)

    def _read_partial(self) -> list[str]:
        """The lines of an earlier run with the same header, up to the first truncated or damaged
        one.
        """
        if not self._partial.is_file():
            return []
        header, *lines = self._partial.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for line in lines[:-1] if header == self._header else ():
            try:
                self._keep(Prediction.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            kept.append(line)
        return kept

    def _keep(self, prediction: Prediction) -> None:
        self._lines[prediction.condition, prediction.key] = prediction


def read_log(path: Path) -> list[Prediction]:
    """All lines of the predictions.jsonl of an evaluation that is finished. Raises InputError if
    the file is damaged.
    """
    try:
        _, *lines = path.read_text(encoding="utf-8").splitlines()
        return [Prediction.from_json(json.loads(line)) for line in lines]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged; evaluate again.") from error


def predict(
    model: InContextModel,
    episodes: EpisodeSet,
    condition: Condition,
    log: PredictionLog,
    batch_size: int,
    decoding: Decoding | None = None,
) -> None:
    """Complete every episode that can be asked under a condition, greedily, in batches of fixed
    composition, and log new predictions. decoding: see `InContextModel.complete`.
    """
    asked = list(episodes.swaps if condition.control == "swapped" else range(len(episodes)))
    with tqdm(
        total=len(asked),
        desc=f"{condition.task}, {condition.describe()}",
        unit="episode",
        leave=None,
    ) as bar:
        for start in range(0, len(asked), batch_size):
            numbers = asked[start : start + batch_size]
            batch = [episodes[number] for number in numbers]
            if not all((condition, episode.key) in log for episode in batch):
                sources = [_source(episodes, number, condition) for number in numbers]
                log.add(_complete(model, condition, batch, sources, decoding))
            bar.update(len(batch))


def _source(episodes: EpisodeSet, number: int, condition: Condition) -> EvaluationEpisode:
    """The episode whose examples are shown."""
    if condition.control == "swapped":
        return episodes.swaps[number].source
    source = episodes.of_another_class(number) if condition.control else episodes[number]
    assert source is not None, "`shuffled` requires episodes of several classes"
    return source


def _complete(
    model: InContextModel,
    condition: Condition,
    batch: Sequence[EvaluationEpisode],
    sources: Sequence[EvaluationEpisode],
    decoding: Decoding | None,
) -> list[Prediction]:
    started = time.perf_counter()
    task = batch[0].task
    examples = [source.pairs[: condition.shots] for source in sources]
    # If the class is given by name, it must be the class that the examples show.
    given = (
        [source.category for source in sources]
        if condition.control == "swapped"
        else [episode.category for episode in batch]
    )
    requests = [
        (Episode(task, name, pairs), episode.query.image)
        for name, episode, pairs in zip(given, batch, examples, strict=True)
    ]
    outputs = model.complete(requests, decoding=decoding)
    said = task.said(model, outputs)
    seconds = round((time.perf_counter() - started) / len(batch), 4)
    return [
        Prediction(
            condition,
            episode.key,
            episode.category,
            *source.kind,
            copied=any(task.repeats(output, pair) for pair in pairs),
            truth_copied=any(task.repeats(episode.query, pair) for pair in pairs),
            seconds=seconds,
            said=words,
        )
        for episode, source, pairs, output, words in zip(
            batch, sources, examples, outputs, said, strict=True
        )
    ]
