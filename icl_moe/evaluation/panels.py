"""The tables of report.html: numbers with their intervals, and the best of each column in bold
where the intervals allow to call it that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from icl_moe.bootstrap import Interval
from icl_moe.evaluation.predictions import describe_shots, describe_task
from icl_moe.evaluation.proof import RespectScores, SwapScores
from icl_moe.evaluation.published import FIGURES
from icl_moe.evaluation.results import Metrics, Row, Source, SwapRow, TaskResult
from icl_moe.tables import percent
from icl_moe.tasks.task import Measure


class Entry(NamedTuple):
    """A number, and below it its interval."""

    text: str = ""
    interval: str = ""
    is_best: bool = False


class Line(NamedTuple):
    """A row. kind: "model" or "bound", which are set off, and "first" of a group of rows."""

    name: str
    entries: tuple[Entry, ...]
    kind: str = ""


class Group(NamedTuple):
    """A heading above so many columns."""

    name: str
    columns: int


@dataclass(frozen=True)
class Panel:
    """A table. columns: the headings of the columns; the first heading is that of the rows' names.
    groups: headings above these, which together cover all columns.
    """

    caption: str
    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: str = ""


_Column = tuple[str, str]
"""A column by the headings of its group and of itself."""


class _Row(NamedTuple):
    """A row before it is laid out. source: see `results.Source`."""

    name: str
    source: Source
    measures: Mapping[_Column, Measure]


def systems_panel(metrics: Metrics) -> Panel:
    """The model after one example, or the next larger number that was requested, next to all other
    systems, as in the paper's Table 4.
    """
    shots = shown_shots(metrics)
    found: dict[tuple[Source, str], dict[_Column, Measure]] = {}
    columns: list[_Column] = []
    for task, result in metrics.tasks.items():
        group = _queries(task, result)
        columns += [(group, name) for name in main_measures(result)]
        columns += [(group, _FLIPS)] if result.swapped else []
        for row in result.rows:
            if _is_shown(row, shots):
                own = {(group, name): measure for name, measure in row.scores.measures().items()}
                found.setdefault((row.prediction, _name(metrics, row)), {}).update(own)
        for swap in result.swapped:
            if (place := (swap.prediction, _name(metrics, swap))) in found:
                found[place][group, _FLIPS] = _measure(swap.scores, "flips")
    rows = [_Row(name, source, measures) for (source, name), measures in found.items()]
    return _panel(
        f"Systems on the same queries, the model after {describe_shots(shots)}.",
        sorted(rows, key=lambda row: _rank(row.source)),
        columns,
        f"{_HOW_TO_READ} Definitions are at the end.",
        told=told_of(metrics),
    )


_HOW_TO_READ = (
    "Below each number: its 95 % interval over queries. Bold: the best system of a column, where "
    "its interval lies apart from that of every other. In italics: bounds, which know the "
    "truth and are no systems. All scores except MAE are multiplied by 100."
)


def shots_panel(metrics: Metrics) -> Panel | None:
    """The model by number of examples, on the same queries, as in the paper's Table 7. None if the
    model was evaluated with only one number of examples.
    """
    counts = _all_shots(metrics)
    if len(counts) < 2:
        return None
    found: dict[int, dict[_Column, Measure]] = {shots: {} for shots in counts}
    columns: list[_Column] = []
    gains: set[_Column] = set()
    for task, result in metrics.tasks.items():
        group, gain = _queries(task, result), f"gain in mean {result.measure}"
        columns += [(group, name) for name in main_measures(result)]
        columns += [(group, _FLIPS)] if result.swapped else []
        columns.append((group, gain))
        gains.add((group, gain))
        for row in result.rows:
            if row.asked and row.asked.control is None:
                own = {(group, name): measure for name, measure in row.scores.measures().items()}
                found[row.asked.shots].update(own)
        for swap in result.swapped:
            if swap.prediction == "model" and swap.shots is not None:
                found[swap.shots][group, _FLIPS] = _measure(swap.scores, "flips")
        for score in result.by_shots:
            if score.gain is not None:
                found[score.shots][group, gain] = Measure(score.gain, score.gain_interval)
    rows = [_Row(describe_shots(shots), "", measures) for shots, measures in found.items()]
    panel = _panel(
        f"{model_name(metrics).capitalize()} by number of examples, on the same queries.",
        rows,
        columns,
        "Gain: the mean difference to the row above, query by query; bold where its 95 % interval "
        "does not contain 0. The intervals of other columns are wider, since they contain how much "
        "queries differ, so they do not tell whether more examples help.",
        is_best={
            column: {n for n, row in enumerate(rows) if _is_apart_from_0(row.measures.get(column))}
            if column in gains
            else set()
            for column in columns
        },
        told=told_of(metrics),
    )
    return panel


def swapped_panel(metrics: Metrics, task: str, notes: str) -> Panel:
    """Queries that show two classes, with their own and with swapped examples."""
    result = metrics.tasks[task]
    measure, swapped = result.measure, result.swapped
    own, other, both = "after examples of its own class", "after swapped examples", "after both"
    # How far an output agrees with what was not asked for is neither good nor bad by itself.
    columns: dict[_Column, tuple[str, bool | None]] = {
        (own, f"{measure} with own class"): ("own_with_own", True),
        (own, "with the other"): ("own_with_other", None),
        (own, "right"): ("right", True),
        (other, f"{measure} with shown class"): ("swapped_with_shown", True),
        (other, "with its own"): ("swapped_with_own", None),
        (other, "right"): ("right_swapped", True),
        (both, _FLIPS): ("flips", True),
    }
    rows = [
        _Row(
            _name(metrics, row),
            row.prediction,
            {column: _measure(row.scores, *arguments) for column, arguments in columns.items()},
        )
        for row in swapped
    ]
    return _panel(
        f"{describe_task(task)}: {asked_for_two(result)}, asked with examples of either.",
        rows,
        list(columns),
        notes,
    )


def asked_for_two(result: TaskResult) -> str:
    """Which queries swapped examples were shown with, such as "90 queries that show two
    classes".
    """
    scores = result.swapped[0].scores
    if scores.of_another_class == scores.queries:
        return f"{scores.queries} queries that show two classes"
    return (
        f"{scores.queries} queries that are described in several ways, of which "
        f"{scores.of_another_class} show two classes"
    )


def respects_panel(metrics: Metrics, task: str) -> Panel | None:
    """The queries whose own and swapped examples differ in a respect, scored separately in each
    respect, such as class and style; None if there is only one respect.
    """
    swapped = metrics.tasks[task].swapped
    names = {
        name: f"{name} ({scores.queries} queries)"
        for row in swapped
        for name, scores in row.scores.respects.items()
    }
    if not names:
        return None
    fields = {"right, own": "right", "right, swapped": "right_swapped", _FLIPS: "flips"}
    rows = [
        _Row(
            _name(metrics, row),
            row.prediction,
            {
                (names[name], heading): _measure(scores, field)
                for name, scores in row.scores.respects.items()
                for heading, field in fields.items()
            },
        )
        for row in swapped
    ]
    return _panel(
        f"{describe_task(task)}: in what respect the examples are obeyed, over the queries whose "
        "own and swapped examples differ in it.",
        rows,
        [(name, heading) for name in names.values() for heading in fields],
    )


def scores_panel(metrics: Metrics, task: str, notes: str) -> Panel:
    """All rows and measures of a task."""
    result = metrics.tasks[task]
    rows = []
    for row in result.rows:
        measures = {("", name): measure for name, measure in row.scores.measures().items()}
        if row.asked:
            copies = Measure(row.asked.copy_rate, more_is_better=None)
            measures["", "copies"] = copies
        rows.append(_Row(_name(metrics, row), row.prediction, measures))
    columns = dict.fromkeys(column for row in rows for column in row.measures)
    shown_columns = [
        column
        for column in columns
        if any(row.measures[column].value is not None for row in rows if column in row.measures)
    ]
    answers = [row.asked for row in result.rows if row.asked]
    if answers:
        notes += (
            " Copies: how often an output equals an example's; the truth does in "
            f"{percent(answers[0].truth_copy_rate)} %."
        )
    return _panel(
        f"{describe_task(task)}: all scores of {result.rows[0].scores.episodes} queries.",
        rows,
        shown_columns,
        notes,
        told=told_of(metrics),
    )


def group_panels(metrics: Metrics, task: str) -> dict[str, Panel]:
    """The main score of each group of queries, for the model, for other systems and for the copy of
    the first example; one panel for each way in which queries are grouped, by its name.
    """
    result = metrics.tasks[task]
    shown_rows = [row for row in result.rows if _is_of_a_system(row)]
    scores_of_rows = [row.scores.groups() for row in shown_rows]
    columns = [("", _name(metrics, row)) for row in shown_rows]
    found = {}
    for grouped_by, groups in scores_of_rows[0].items():
        names = list(groups)
        if grouped_by == "class":  # Classes with many queries tell the most, so they come first.
            names.sort(key=lambda name: -groups[name].episodes)
        rows = [
            _Row(
                f"{name} ({groups[name].episodes})",
                "",
                {
                    column: Measure(
                        scores[grouped_by][name].score, scores[grouped_by][name].interval, ""
                    )
                    for column, scores in zip(columns, scores_of_rows, strict=True)
                },
            )
            for name in names
        ]
        found[grouped_by] = _panel(
            f"{describe_task(task)}: {result.measure} by {grouped_by}, with the number of queries.",
            rows,
            columns,
            is_best={column: set() for column in columns},
            has_arrows=False,
        )
    return found


def speed_panel(metrics: Metrics) -> Panel | None:
    """How fast the model answered; None where it was not asked."""
    seconds, queries = ("", "seconds a query (median)"), ("", "queries a second")
    rows = [
        _Row(
            f"{task}, {row.name}",
            "",
            {
                seconds: Measure(row.asked.seconds_a_query, None, "", False, False),
                queries: Measure(row.asked.queries_per_second, None, "", False),
            },
        )
        for task, result in metrics.tasks.items()
        for row in result.rows
        if row.asked
    ]
    if not rows:
        return None
    return _panel(
        f"Time of decoding in batches of {metrics.batch_size}, on {metrics.machine}.",
        rows,
        [seconds, queries],
        "The time of a query is that of its batch, divided by the number of queries in it. Both "
        "figures are of one process.",
    )


def main_measures(result: TaskResult) -> list[str]:
    """The headings of the measures that the papers' tables have and that were computed; all that
    were, where papers have none.
    """
    measures = [row.scores.measures() for row in result.rows]
    computed = [n for n in measures[0] if any(m[n].value is not None for m in measures)]
    of_papers = {*FIGURES.values(), "FB-IoU"}
    return [name for name in computed if name.split(" ")[-1] in of_papers] or computed


def told_of(metrics: Metrics) -> dict[str, str]:
    """The headings of a benchmark's own scores, with how many of its queries they are of, if these
    are not all.
    """
    standard, limit = metrics.standard, metrics.limit
    if standard is None or limit is None or limit >= standard["episodes"]:
        return {}
    of = f"(the first {limit:,} of its {standard['episodes']:,} queries)"
    names = (f"{standard['name']} {score}" for score in ("mIoU", "FB-IoU"))
    return {name: f"{name} {of}" for name in names}


def model_name(metrics: Metrics) -> str:
    """What the model is called in its rows."""
    return name_of_folder(metrics.model_folder)


def name_of_folder(folder: str) -> str:
    """What the model of a folder of this name is called: so, unless that says nothing."""
    return "the model" if folder == "model" else folder


def shown_shots(metrics: Metrics) -> int:
    """The number of examples of the main table: 1, as in the papers, or the largest."""
    counts = _all_shots(metrics)
    return 1 if 1 in counts else max(counts, default=0)


_FLIPS = "flips"
_SHORT = {
    "first example": "copy of the first example",
    "mean mask": "mean of the examples' masks",
    "centred disc": "disc in the middle",
    "frequent caption": "most frequent caption",
    "every object": "every annotated object (oracle)",
    "tokenizer": "ceiling of the tokenizer",
}
"""What produced the outputs of a row -> its name in the report."""


def _name(metrics: Metrics, row: Row | SwapRow) -> str:
    if row.prediction == "model":
        return f"{model_name(metrics)}, {row.name}"
    return _SHORT.get(row.prediction, row.name.removeprefix("the "))


def _queries(task: str, result: TaskResult) -> str:
    flips = f", {result.swapped[0].scores.queries} for flips" if result.swapped else ""
    return f"{describe_task(task)} ({result.rows[0].scores.episodes} queries{flips})"


def _all_shots(metrics: Metrics) -> list[int]:
    """The numbers of examples that the model was asked with."""
    answers = [row.asked for result in metrics.tasks.values() for row in result.rows if row.asked]
    return sorted({answer.shots for answer in answers if answer.control is None})


def _is_shown(row: Row, shots: int) -> bool:
    if row.asked:
        return row.asked.control is None and row.asked.shots == shots
    return row.prediction != "matcher" or row.shots == shots


def _is_of_a_system(row: Row) -> bool:
    if row.asked:
        return row.asked.control is None
    return row.prediction in ("predictions", "matcher", "first example")


def _measure(
    scores: SwapScores | RespectScores, name: str, more_is_better: bool | None = True
) -> Measure:
    interval = scores.intervals.get(name)
    return Measure(getattr(scores, name), interval, more_is_better=more_is_better)


_BOUNDS = ("every object", "tokenizer")
"""Oracles, and what the tokenizer allows: no system can be compared with them."""


def _rank(source: Source) -> int:
    """The model, other systems, baselines, bounds."""
    ranks = {"model": 0, "predictions": 1, **dict.fromkeys(_BOUNDS, 3)}
    return ranks.get(source, 2)


def _panel(
    caption: str,
    rows: Sequence[_Row],
    columns: Sequence[_Column],
    notes: str = "",
    is_best: Mapping[_Column, set[int]] | None = None,
    has_arrows: bool = True,
    told: Mapping[str, str] | None = None,
) -> Panel:
    """A panel of these rows and columns. is_best: for each column the places of the rows in bold;
    by default `best_of`. told: what stands below a heading, by the heading.
    """
    told = told or {}
    if is_best is None:
        is_best = {column: best_of(rows, column) for column in columns}
    lines = []
    for place, row in enumerate(rows):
        kind = {0: "model", 3: "bound"}.get(_rank(row.source), "") if row.source else ""
        if place and row.source and _rank(row.source) != _rank(rows[place - 1].source):
            kind = f"{kind} first".strip()
        entries = [_entry(row.measures.get(column), place in is_best[column]) for column in columns]
        lines.append(Line(row.name, tuple(entries), kind))
    groups = [Group(name, len(list(part))) for name, part in groupby(group for group, _ in columns)]
    arrows = {
        column: {True: "\N{NO-BREAK SPACE}↑", False: "\N{NO-BREAK SPACE}↓", None: ""}[
            measure.more_is_better
        ]
        for row in rows
        for column, measure in row.measures.items()
        if has_arrows
    }
    headings = [
        f"{told.get(heading, heading)}{arrows.get((group, heading), '')}"
        for group, heading in columns
    ]
    return Panel(caption, (Group("", 1), *groups), ("", *headings), tuple(lines), notes)


def _entry(measure: Measure | None, is_best: bool) -> Entry:
    if measure is None:
        return Entry()
    return Entry(measure.text, measure.range_text.replace(" – ", "–"), is_best)


def best_of(rows: Sequence[_Row], column: _Column) -> set[int]:
    """The places of the rows of the best system of a column whose intervals lie apart from those
    of all other systems; none if there is no other. Bounds do not count. The rows of one source,
    such as the model after more and fewer examples, are one system, except for those of other
    systems' predictions.
    """
    known = [
        (place, row.name if row.source == "predictions" else row.source, measure.interval)
        for place, row in enumerate(rows)
        if row.source not in _BOUNDS
        and (measure := row.measures.get(column))
        and measure.interval is not None
        and measure.more_is_better is not None
    ]
    more = any(row.measures[column].more_is_better for row in rows if column in row.measures)

    def is_apart(system: str, interval: Interval) -> bool:
        others = [other_interval for _, other, other_interval in known if other != system]
        if more:
            return all(interval[0] > high for _, high in others)
        return all(interval[1] < low for low, _ in others)

    if len({system for _, system, _ in known}) < 2:
        return set()
    return {place for place, system, interval in known if is_apart(system, interval)}


def _is_apart_from_0(measure: Measure | None) -> bool:
    if measure is None or measure.interval is None:
        return False
    low, high = measure.interval
    return low > 0 or high < 0
