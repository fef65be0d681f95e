"""The model's outputs for every episode, saved batch by batch, so that an interrupted evaluation
resumes where it stopped.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.photographs import Photographs
from icl_moe.files import write_whole
from icl_moe.images import to_pixels
from icl_moe.inference.decode import Request
from icl_moe.inference.edges import EdgeFilter, follow_edges
from icl_moe.inference.model import Decoding, InContextModel
from icl_moe.inference.shifts import READINGS, fused_views, shifted_views
from icl_moe.sequence import Episode
from icl_moe.tasks.drawn_mask import DrawnMask
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


def describe_task(name: str) -> str:
    """Such as "Segmentation" or "Semantic segmentation"."""
    return name.replace("_", " ").capitalize()


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: the condition, the episode's key and class, and the model's
    output, whose keys depend on the task.

    shown: the class of the examples. shown_style: their style, "" if captions have no styles.
    copied: whether the output equals that of an example. truth_copied: whether the truth does.
    seconds: the time of the query's batch / the batch's size. The finished file lacks it, so that
    equal models give equal files.
    """

    condition: Condition
    key: str
    true_category: str
    shown: str
    shown_style: str
    copied: bool
    truth_copied: bool
    said: Output
    seconds: float = 0.0

    def to_json(self, with_time: bool = True) -> dict[str, Any]:
        left_out = ("condition", "said", *(() if with_time else ("seconds",)))
        own = {name: value for name, value in vars(self).items() if name not in left_out}
        return self.condition._asdict() | own | self.said

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Prediction":
        condition = Condition(*(values.pop(name) for name in Condition._fields))
        names = [f.name for f in fields(cls) if f.name not in ("condition", "said", "seconds")]
        own = {name: values.pop(name) for name in names} | {"seconds": values.pop("seconds", 0.0)}
        return cls(condition, **own, said=values)


class PredictionLog:
    """predictions.jsonl of the folder `out`, under a temporary name until it is complete. Each of
    several processes that share the work has a temporary file of its own.

    process: this one among these; None if it works alone, whatever others do.
    header: everything that the predictions depend on. Earlier lines are reused only if their header
    is equal.
    """

    def __init__(
        self, out: Path, header: dict[str, Any], process: PartialState | None = None
    ) -> None:
        self.rank, self.ranks = 0, 1
        if process is not None:
            self.rank, self.ranks = process.process_index, process.num_processes
        self._process = process
        self.asked: list[tuple[Condition, str]] = []
        self._out = out
        self._lines: dict[tuple[Condition, str], Prediction] = {}
        self._header = json.dumps(header)
        if not self.rank:
            self._gather()
        self._wait()
        if self.rank:
            self._read(self._partial(0))
            write_whole(self._partial(self.rank), self._header + "\n")

    def __contains__(self, place: tuple[Condition, str]) -> bool:
        return place in self._lines

    def __getitem__(self, place: tuple[Condition, str]) -> Prediction:
        """The prediction under a condition for the episode with this key."""
        return self._lines[place]

    def add(self, predictions: Sequence[Prediction]) -> None:
        with self._partial(self.rank).open("a", encoding="utf-8") as file:
            file.write(
                "".join(json.dumps(prediction.to_json()) + "\n" for prediction in predictions)
            )
        for prediction in predictions:
            self._keep(prediction)

    def gather(self) -> None:
        """Wait for all processes; the first one then has the predictions of all."""
        self._wait()
        if not self.rank:
            self._gather()

    def finish(self) -> None:
        """Write the file, and remove what an interrupted evaluation would resume from. Only the
        first process calls it.
        """
        self.write()
        self.end()

    def write(self) -> None:
        """Write the file with what was asked, in that order."""
        lines = [json.dumps(self[place].to_json(with_time=False)) for place in self.asked]
        write_whole(self._out / "predictions.jsonl", "\n".join([self._header, *lines]) + "\n")

    def end(self) -> None:
        """Remove the temporary file, after which nothing can be resumed."""
        self._partial(0).unlink()

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait_for_everyone()

    def _partial(self, number: int) -> Path:
        return self._out / f"predictions.partial{f'.{number}' if number else ''}.jsonl"

    def _gather(self) -> None:
        """Read the temporary files of all processes, and leave one file."""
        found = sorted(self._out.glob("predictions.partial*.jsonl"))
        for path in found:
            self._read(path)
        lines = [json.dumps(prediction.to_json()) for prediction in self._lines.values()]
        write_whole(self._partial(0), "\n".join([self._header, *lines]) + "\n")
        for path in found:
            if path != self._partial(0):
                path.unlink()

    def _read(self, path: Path) -> None:
        """Keep the lines of a run with the same header, up to the first truncated or damaged
        one.
        """
        header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines[:-1] if header == self._header else ():
            try:
                self._keep(Prediction.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError):
                return

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
    photographs: Photographs | None = None,
    shifts: bool = False,
) -> None:
    """Complete every episode that can be asked under a condition, greedily, in batches of fixed
    composition, and log new predictions. If there are n processes, each completes every n-th batch.
    decoding: see `InContextModel.complete`. photographs: the photographs of the queries, if the
    outlines of masks are to follow their edges, or if queries are read in shifted views (`shifts`,
    see inference/shifts.py). Raises InputError if a photograph is missing.
    """
    selected = list(episodes.swaps if condition.control == "swapped" else range(len(episodes)))
    keys = episodes.keys
    log.asked += [(condition, keys[number]) for number in selected]
    with tqdm(
        total=len(selected),
        desc=f"{condition.task}, {condition.describe()}",
        unit="episode",
        leave=None,
        disable=log.rank > 0,
    ) as bar:
        for place, start in enumerate(range(0, len(selected), batch_size)):
            numbers = selected[start : start + batch_size]
            is_mine = place % log.ranks == log.rank
            if is_mine and not all((condition, keys[number]) in log for number in numbers):
                batch = [episodes[number] for number in numbers]
                sources = [_source(episodes, number, condition) for number in numbers]
                how = (decoding, photographs, shifts)
                log.add(_complete(model, condition, batch, sources, *how))
            bar.update(len(numbers))


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
    photographs: Photographs | None,
    shifts: bool,
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
    shown = photographs and [photographs.at_model_size(episode, -1) for episode in batch]
    if shown and shifts:
        outputs = _complete_shifted(model, requests, shown, decoding)
    else:
        outputs = model.complete(requests, decoding=decoding)
    if shown and model.edges is not None:
        outputs = [
            replace(output, drawn=output.drawn.each(_following(guide, model.edges)))
            for output, guide in zip(outputs, shown, strict=True)
        ]
    predicted = task.said(model, outputs)
    seconds = round((time.perf_counter() - started) / len(batch), 4)
    return [
        Prediction(
            condition,
            episode.key,
            episode.category,
            *source.kind,
            copied=any(task.repeats(output, pair) for pair in pairs),
            truth_copied=any(task.repeats(episode.query, pair) for pair in pairs),
            said=prediction,
            seconds=seconds,
        )
        for episode, source, pairs, output, prediction in zip(
            batch, sources, examples, outputs, predicted, strict=True
        )
    ]


def _complete_shifted(
    model: InContextModel,
    requests: Sequence[Request],
    pictures: Sequence[Image.Image],
    decoding: Decoding | None,
) -> list[Any]:
    """The pairs of requests whose queries are read in shifted views, the first of which the shards
    hold; as many sequences at a time as without. The examples are read once for all views.
    """
    cells = model.format.codes_per_image
    moved = [
        codes_N
        for picture in pictures
        for codes_N in model.encode(shifted_views(to_pixels(picture), cells)[1:])
    ]
    read = [model.read_examples(episode) for episode, _ in requests]
    by_view = [model.complete(requests, decoding=decoding, read=read)]
    for view in range(READINGS - 1):
        codes = moved[view :: READINGS - 1]
        asked = [(episode, codes_N) for (episode, _), codes_N in zip(requests, codes, strict=True)]
        by_view.append(model.complete(asked, decoding=decoding, read=read))
    return [fused_views(pairs) for pairs in zip(*by_view, strict=True)]


def _following(guide: Image.Image, edges: EdgeFilter) -> Callable[[DrawnMask], DrawnMask]:
    """Makes the outlines of a mask follow the edges of a picture."""
    return lambda drawn: follow_edges(drawn, guide, edges)
