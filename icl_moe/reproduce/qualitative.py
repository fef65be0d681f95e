"""Figures 7 to 12: queries with their examples, the model's outputs and the truths, and how a
model's outputs fail.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from icl_moe.canvas import PALE, Canvas, wrap
from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EvaluationEpisode
from icl_moe.evaluation.other_systems import open_episodes
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.predictions import describe_shots, read_log
from icl_moe.files import write_whole
from icl_moe.inputs import read_json
from icl_moe.pictures import Cell
from icl_moe.reproduce.figures import Choice, PaperFigure
from icl_moe.reproduce.output import write_figure
from icl_moe.reproduce.tables import CAPTIONING, SEGMENTATION
from icl_moe.rle import decode_rle
from icl_moe.tables import Table, percent
from icl_moe.tasks.task import Judge, Output

SHOWN = 6

_FAILS = 0.5
"""The agreement (IoU, or ROUGE-L) below which an output fails: PASCAL VOC's border for masks."""

_NOTHING = 0.1
"""The highest IoU with any object at which a mask is taken to mark none."""

_SIDE, _GAP, _LEFT, _TOP, _LINES = 150, 12, 24, 56, 4
_HEAD, _APART, _LEAST_WIDTH = 48, 40, 760
_SHORT = 5
"""The most pictures of a row that has room for another one beside it."""


@dataclass(frozen=True)
class Query:
    """A query, what the model answered, and how far that and a copy of the example agree with the
    truth (0..1). failure: its kind; None if the answer does not fail.
    """

    episode: EvaluationEpisode
    said: Output
    agreement: float
    copy: float
    failure: str | None


@dataclass(frozen=True)
class Evaluated:
    """The queries of a task after so many examples. what: completes "The queries are"."""

    what: str
    run: str
    shots: int
    measure: str
    queries: Sequence[Query]
    photographs: Photographs
    image_size: int
    scores: Mapping[str, Any]


def open_evaluation(what: str, run: str, shards: Path, evaluation: Path, task: str) -> Evaluated:
    """What `icl-moe evaluate` wrote into the folder `evaluation`, after the fewest examples that it
    has, beside the shards that it was of. Raises InputError if it has no queries of the task, or is
    of other shards.
    """
    metrics = read_json(evaluation / "metrics.json")
    shard_set = ShardSet(shards)
    if metrics.get("shards") != shard_set.short_fingerprint:
        raise InputError(
            f"{evaluation} is an evaluation on other shards than those in {shards}; delete it to "
            "evaluate again."
        )
    lines = [
        line
        for line in read_log(evaluation / "predictions.jsonl")
        if line.condition.task == task and line.condition.control is None
    ]
    sets = {
        episode_set.task.name: episode_set
        for episode_set in open_episodes(shard_set, metrics.get("limit"))
    }
    if not lines or task not in sets:
        raise InputError(f"{evaluation} has no queries of {task}.")
    shots = min(line.condition.shots for line in lines)
    predictions = {line.key: line.said for line in lines if line.condition.shots == shots}
    episodes = sets[task]
    judge = episodes.task.judge(
        list(map(episodes.__getitem__, range(len(episodes)))), shard_set.manifest.format
    )
    queries = [_query(episodes[n], predictions[key], judge) for n, key in enumerate(episodes.keys)]
    return Evaluated(
        what,
        run,
        shots,
        episodes.task.measure,
        queries,
        Photographs(shard_set, task),
        episodes.image_size,
        metrics["tasks"][task],
    )


def write_pictures(folder: Path, figure: PaperFigure, sets: Sequence[Evaluated]) -> Table:
    """Write the figure's files into `folder`, with pictures of the first of the sets and numbers of
    all, and return its table.
    """
    evaluated = sets[0]
    chosen = _failing(evaluated) if figure.choice == "failures" else _spaced(evaluated)
    rows = [(_title(query, figure.choice), _cells(query, evaluated)) for query in chosen]
    table = scores_table(sets)
    tables = [("Agreement with the truth, times 100", table)]
    if figure.choice == "failures":
        tables.append(("Kinds of failures", failures_table(evaluated)))
    says = _says(figure, evaluated, len(chosen))
    keys = [query.episode.key for query in chosen]
    content = {
        "runs": [evaluated.run],
        "sets": [_summary(evaluated_set) for evaluated_set in sets],
        "shown": keys,
    }
    picture = draw_rows(figure.title, rows)
    write_figure(folder, figure, says, content, picture, tables, rows)
    write_whole(folder / "figure.csv", _numbers(evaluated, keys))
    return table


def scores_table(sets: Sequence[Evaluated]) -> Table:
    head = ["queries", "number", f"mean {sets[0].measure}", "of a copied example", "fail", "flips"]
    return Table(head, [_scores(evaluated) for evaluated in sets])


def failures_table(evaluated: Evaluated) -> Table:
    """A line for each kind of failure, the most frequent first."""
    kinds = Counter(query.failure for query in evaluated.queries if query.failure)
    total = len(evaluated.queries)
    lines = [[kind, str(count), percent(count / total)] for kind, count in kinds.most_common()]
    return Table(["failure", "queries", "% of all"], lines)


def draw_rows(title: str, rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A row of pictures under each title, each picture with a heading above it and its text below;
    two rows beside each other where they are short.
    """
    columns = max((len(cells) for _, cells in rows), default=1)
    beside = 2 if columns <= _SHORT and len(rows) > 1 else 1
    block = columns * (_SIDE + _GAP) - _GAP
    lines = [rows[start : start + beside] for start in range(0, len(rows), beside)]
    titled = max((len(wrap(name, block, 2, 13)) for name, _ in rows), default=1)
    head = _HEAD + 18 * (titled - 1)
    heights = [head + max(_height(cells) for _, cells in line) for line in lines]
    width = max(2 * _LEFT + beside * (block + _APART) - _APART, _LEAST_WIDTH)
    canvas = Canvas(title, width, _TOP + sum(heights) + _LEFT)
    top = _TOP
    for line, height in zip(lines, heights, strict=True):
        for place, (name, cells) in enumerate(line):
            _draw_row(canvas, (_LEFT + place * (block + _APART), top), block, head, name, cells)
        top += height
    return canvas.finish_for_print()


def _draw_row(
    canvas: Canvas,
    corner: tuple[int, int],
    width: int,
    head: int,
    name: str,
    cells: Sequence[Cell],
) -> None:
    """head: how far below the corner the pictures begin."""
    left, top = corner
    canvas.line([(left, top), (left + width, top)], "#d0d7de", 1)
    canvas.wrapped((left, top + 8), name, width, 2)
    for column, cell in enumerate(cells):
        x, y = left + column * (_SIDE + _GAP), top + head
        canvas.text((x, y - 10), cell.heading, "lm", PALE, 12)
        canvas.paste(cell.picture, (x, y, x + _SIDE, y + _SIDE))
        canvas.wrapped((x, y + _SIDE + 6), cell.text, _SIDE, _LINES, size=12)


def _height(cells: Sequence[Cell]) -> int:
    """The height of a row without its title; each text has the lines that the longest one needs."""
    lines = max(len(wrap(cell.text, _SIDE, _LINES, 12)) if cell.text else 0 for cell in cells)
    return _SIDE + 16 * lines + 24


def _query(episode: EvaluationEpisode, prediction: Output, judge: Judge) -> Query:
    task = episode.task
    right = task.right_outputs(episode)
    copied = task.agreement(task.true_output(episode, 0), right) if len(episode.pairs) > 1 else 0.0
    agreement = task.agreement(prediction, right)
    return Query(
        episode, prediction, agreement, copied, _FAILURES[task.name](episode, prediction, judge)
    )


def _mask_failure(episode: EvaluationEpisode, prediction: Output, judge: Judge) -> str | None:
    task, objects = episode.task, episode.task.objects(episode)
    if task.agreement(prediction, task.right_outputs(episode)) >= _FAILS:
        return None
    if not decode_rle(prediction["mask"]).any():
        return "nothing is marked"
    best = max((task.agreement(prediction, right) for right in objects.values()), default=0.0)
    if objects and best < _NOTHING:
        return "no object is marked"
    if objects and not all(judge(prediction, episode.kind, objects).values()):
        return "another object is marked"
    return "the right object is marked, but coarsely"


def _caption_failure(episode: EvaluationEpisode, prediction: Output, judge: Judge) -> str | None:
    objects = episode.task.objects(episode)
    respects = judge(prediction, episode.kind, objects) if objects else {}
    if not respects.get("class", True):
        return "another object is described, or placed elsewhere"
    if not respects.get("style", True):
        return "the right object, in another style"
    right = episode.task.right_outputs(episode)
    if episode.task.agreement(prediction, right) < _FAILS:
        return "the right object, described wrongly or in other words"
    return None


_FAILURES: Mapping[str, Callable[[EvaluationEpisode, Output, Judge], str | None]] = {
    SEGMENTATION: _mask_failure,
    CAPTIONING: _caption_failure,
}


def _spaced(evaluated: Evaluated) -> list[Query]:
    return [evaluated.queries[number] for number in evenly_spaced(len(evaluated.queries), SHOWN)]


def _failing(evaluated: Evaluated) -> list[Query]:
    """The queries of the lowest agreement of each kind of failure in turns, the most frequent kind
    first.
    """
    kinds = Counter(query.failure for query in evaluated.queries if query.failure)
    of_kinds = [
        sorted((q for q in evaluated.queries if q.failure == kind), key=lambda q: q.agreement)
        for kind, _ in kinds.most_common()
    ]
    in_turns = filter(None, chain.from_iterable(zip_longest(*of_kinds)))
    chosen = list(in_turns)[:SHOWN]
    return sorted(chosen, key=lambda q: -kinds[q.failure])


def _title(query: Query, choice: Choice) -> str:
    words = [query.failure] if query.failure and choice == "failures" else []
    return " · ".join([*words, query.episode.kind.describe(), query.episode.key])


def _cells(query: Query, evaluated: Evaluated) -> list[Cell]:
    episode = query.episode
    size = evaluated.image_size
    numbers = [*range(evaluated.shots), -1]
    images = [
        evaluated.photographs.show(episode, n).convert("RGB").resize((size, size)) for n in numbers
    ]
    return episode.task.cells(episode, images, query.said, evaluated.shots)


def _says(figure: PaperFigure, evaluated: Evaluated, pictured: int) -> str:
    total = len(evaluated.queries)
    if figure.choice == "failures":
        failing = sum(query.failure is not None for query in evaluated.queries)
        how = (
            f"{pictured} of the {failing} queries, of {total}, that fail, those of the lowest "
            f"{evaluated.measure} of each kind of failure in turns"
        )
    else:
        how = f"{pictured} of {total} queries, evenly spaced and not chosen by their scores"
    return (
        f"{how}, after {describe_shots(evaluated.shots)}, by the model of the run {evaluated.run}. "
        f"The queries are {evaluated.what}."
    )


def _scores(evaluated: Evaluated) -> list[str]:
    count = len(evaluated.queries)
    swapped = next((r for r in evaluated.scores["swapped"] if r["prediction"] == "model"), None)
    return [
        evaluated.what,
        str(count),
        percent(sum(query.agreement for query in evaluated.queries) / count),
        percent(sum(query.copy for query in evaluated.queries) / count),
        percent(sum(query.failure is not None for query in evaluated.queries) / count),
        percent(swapped["flips"]) if swapped else "–",
    ]


def _summary(evaluated: Evaluated) -> dict[str, Any]:
    kinds = Counter(query.failure for query in evaluated.queries if query.failure)
    return {
        "what": evaluated.what,
        "shots": evaluated.shots,
        "measure": evaluated.measure,
        "queries": len(evaluated.queries),
        "mean": sum(query.agreement for query in evaluated.queries) / len(evaluated.queries),
        "mean_of_copies": sum(query.copy for query in evaluated.queries) / len(evaluated.queries),
        "failures": dict(kinds.most_common()),
        "model": next(r for r in evaluated.scores["rows"] if r["prediction"] == "model"),
    }


def _numbers(evaluated: Evaluated, shown_keys: Sequence[str]) -> str:
    """A line for each query."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["query", "class", "style", "agreement", "copy", "failure", "shown"])
    for query in evaluated.queries:
        key, kind = query.episode.key, query.episode.kind
        values = [f"{query.agreement:.4f}", f"{query.copy:.4f}", query.failure or ""]
        writer.writerow([key, *kind, *values, int(key in shown_keys)])
    return file.getvalue()
