"""report.html: the tables and pictures of an evaluation in one self-contained file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_moe.bootstrap import DRAWS
from icl_moe.evaluation.panels import (
    asked_for_two,
    group_panels,
    main_measures,
    model_name,
    respects_panel,
    scores_panel,
    shots_panel,
    speed_panel,
    swapped_panel,
    systems_panel,
    told_of,
)
from icl_moe.evaluation.predictions import describe_task
from icl_moe.evaluation.published import beside
from icl_moe.evaluation.results import Metrics, Row, SwapRow, TaskResult
from icl_moe.files import write_whole
from icl_moe.pages import render
from icl_moe.pages.chart import Chart, Curve, score_chart
from icl_moe.pictures import Cell, Gallery
from icl_moe.tables import Table, as_text, percent, percent_range
from icl_moe.tasks.task import Measure


@dataclass(frozen=True)
class Section:
    """An additional part of the report."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


def write_report(
    path: Path,
    metrics: Metrics,
    galleries: Sequence[Gallery],
    sections: Sequence[Section] = (),
    proofs: Mapping[str, Gallery] | None = None,
    told: Sequence[str] = (),
) -> None:
    """Write the report of an evaluation. proofs: for each task, pictures of queries with examples
    of two classes. sections: what follows the tables. told: the tasks in which the model is given
    the name of the class.
    """
    charts = shots_charts(metrics)
    groups = {name: group_panels(metrics, name) for name in metrics.tasks}
    tasks = [
        {
            "title": describe_task(name),
            "proof": _pictures((proofs or {}).get(name)),
            "swapped": swapped_panel(metrics, name, _swapped_note(result, name in told))
            if result.swapped
            else None,
            "respects": respects_panel(metrics, name),
            "swapped_note": result.swapped_note,
            "scores": scores_panel(metrics, name, _notes(result)),
            "groups": [panel for kind, panel in groups[name].items() if kind != "class"],
            "classes": groups[name].get("class"),
        }
        for name, result in metrics.tasks.items()
    ]
    published = [panel for name in metrics.tasks for panel in beside(name)]
    page = render(
        "report.html.j2",
        title=f"{metrics.model_folder} on {metrics.shards_folder}",
        lede=_lede(metrics, told),
        facts=_facts(metrics),
        contents=[(id, name) for id, name in _CONTENTS.items() if galleries or id != "pictures"],
        metrics=metrics,
        systems=systems_panel(metrics),
        by_shots=shots_panel(metrics),
        charts=charts,
        charts_caption=_CHARTS,
        tasks=tasks,
        speed=speed_panel(metrics),
        held_out=held_out_table(metrics),
        sections=sections,
        galleries=[_pictures(gallery) for gallery in galleries],
        published=list({panel.title: panel for panel in published}.values()),
        definitions=_definitions(metrics),
    )
    write_whole(path, page)


_CONTENTS = {
    "results": "Results",
    "examples": "Examples obeyed?",
    "pictures": "Pictures",
    "scores": "All scores",
    "loss": "Held-out loss",
    "definitions": "Definitions",
}
_CHARTS = (
    "Scores by number of examples, times 100. Bars are 95 % intervals over queries; the model's "
    "line is solid."
)


def _lede(metrics: Metrics, told: Sequence[str]) -> list[str]:
    """What was asked, and whether the model has seen the classes, in a sentence each."""
    counts = [f"{r.rows[0].scores.episodes} queries of {name}" for name, r in metrics.tasks.items()]
    saw, other = "the examples and the query alone", ""
    if told:
        of_tasks = "" if len(told) == len(metrics.tasks) else f" (in {' and '.join(told)})"
        saw, other = f"the examples, the name of the class{of_tasks} and the query", "other "
    question = (
        f"Asked with {' and '.join(counts)}, {model_name(metrics)} saw {saw}, and wrote each "
        f"answer freely, without any {other}part of the truth."
    )
    overlaps: dict[str, list[str]] = {}
    for name, result in metrics.tasks.items():
        overlaps.setdefault(_overlap(result), []).append(name)
    seen = [f"{' and '.join(tasks).capitalize()}: {text}" for text, tasks in overlaps.items()]
    return [question, *seen]


def _overlap(result: TaskResult) -> str:
    evaluated, seen = result.classes
    begin = f"{len(evaluated)} classes"
    if seen is None:
        return f"{begin}; the model does not record which ones it was trained on."
    if not seen:
        return f"{begin}, none of which was seen in training."
    if len(seen) == len(evaluated):
        return f"{begin}, all of which were seen in training."
    named = f": {', '.join(seen)}" if len(seen) <= 20 else ""
    return f"{begin}, of which {len(seen)} were seen in training{named}."


def _facts(metrics: Metrics) -> str:
    limit = "all episodes" if metrics.limit is None else f"the first {metrics.limit} of each task"
    return (
        f"Model {metrics.model}; shards {metrics.shards}, {limit}; {metrics.decoding} decoding in "
        f"{metrics.dtype}, batches of {metrics.batch_size}; {metrics.machine}."
    )


def _pictures(gallery: Gallery | None) -> dict[str, Any] | None:
    """A gallery whose cells are grouped: examples; then the query and what was written for it; and
    in queries with several examples in turns, each example and what follows it.
    """
    if gallery is None:
        return None
    return {
        "title": gallery.title,
        "rows": [
            {"name": name, "about": "· ".join(about), "groups": _cell_groups(cells)}
            for title, cells in gallery.rows
            for name, *about in [title.split("· ")]
        ],
    }


def _cell_groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: list[list[Cell]] = []
    for before, cell in zip((None, *cells), cells, strict=False):
        is_example = cell.heading.startswith("example")
        follows = before is not None and before.heading.startswith("example")
        if not groups or cell.heading == "query" or (is_example and not follows):
            groups.append([])
        groups[-1].append(cell)
    return groups


def _definitions(metrics: Metrics) -> list[tuple[str, str]]:
    """Every measure of the tables, once."""
    found: dict[str, str] = {}
    for result in metrics.tasks.values():
        for name, measure in result.rows[0].scores.measures().items():
            if measure.definition:
                found[name] = f"{measure.definition[:1].upper()}{measure.definition[1:]}."
    return [*found.items(), *_DEFINITIONS.items()]


_DEFINITIONS = {
    "flips": "The share of the queries that show two classes, or are described in two styles, for "
    "which the model is right after examples of the one and also after examples of the other. What "
    "does not depend on its examples never flips.",
    "95 % interval": f"Percentile bootstrap over the queries, {DRAWS} draws. The examples and "
    "the training are held fixed: what another seed of the training would give is not in it.",
}


def shots_charts(metrics: Metrics) -> list[Chart]:
    """A main score of each task, and flips, by number of examples; none for a single number."""
    charts = []
    for task, result in metrics.tasks.items():
        own = sorted({row.asked.shots for row in _own(result) if row.asked})
        if len(own) < 2:
            continue
        heading = "CIDEr" if "CIDEr" in (main := main_measures(result)) else main[0]
        curves: dict[str, dict[int, Measure]] = {}
        for row in result.rows:
            shots = row.asked.shots if row.asked else row.shots
            if shots is not None and (row.asked is None or row.asked.control is None):
                name = _curve_name(metrics, row)
                curves.setdefault(name, {})[shots] = row.scores.measures()[heading]
            elif row.prediction == "first example":
                curves["copy of the first example"] = {
                    shots: row.scores.measures()[heading] for shots in own if shots
                }
        shown = told_of(metrics).get(heading, heading)
        charts.append(_chart(f"{describe_task(task)}: {shown}", curves, metrics))
        flips: dict[str, dict[int, Measure]] = {}
        for swap in result.swapped:
            if swap.shots is not None and swap.prediction != "first example":
                found = Measure(swap.scores.flips, swap.scores.intervals.get("flips"))
                flips.setdefault(_curve_name(metrics, swap), {})[swap.shots] = found
        if flips:
            charts.append(_chart(f"{describe_task(task)}: flips", flips, metrics))
    return charts


def _own(result: TaskResult) -> list[Row]:
    return [row for row in result.rows if row.asked and row.asked.control is None]


def _curve_name(metrics: Metrics, row: Row | SwapRow) -> str:
    names = {"model": model_name(metrics), "matcher": "training-free matcher"}
    return names.get(row.prediction, row.name.rsplit(", ", 1)[0])


def _chart(title: str, curves: Mapping[str, Mapping[int, Measure]], metrics: Metrics) -> Chart:
    found = []
    for name, values in curves.items():
        places = sorted(values)
        found.append(
            Curve(
                name,
                places,
                [values[shots].value or 0.0 for shots in places],
                [values[shots].interval for shots in places],
                is_ours=name == model_name(metrics),
            )
        )
    return score_chart(title, found, "examples")


def summary(metrics: Metrics) -> str:
    """The report's main tables as text for a terminal."""
    tables: dict[str, Table] = {}
    for name, result in metrics.tasks.items():
        if result.swapped:
            tables[f"{name}, {asked_for_two(result)}"] = swapped_table(result)
        respects = respects_table(result)
        if respects:
            tables[f"{name}, what of the examples is obeyed"] = respects
        tables[name] = scores_table(result, told_of(metrics))
        if result.by_shots:
            tables[f"{name} by number of examples"] = shots_table(result)
    tables["held-out loss"] = held_out_table(metrics)
    return "\n\n".join(f"{describe_task(name)}\n{as_text(table)}" for name, table in tables.items())


def scores_table(result: TaskResult, told: Mapping[str, str]) -> Table:
    """A task's rows. Shares, BLEU, ROUGE-L, METEOR and CIDEr are multiplied by 100, as in papers;
    MAE is not. told: see `told_of`.
    """
    columns = [told.get(name, name) for name in result.rows[0].scores.measures()]
    head = ["prediction", *columns, "copies", "episodes", "queries/s", "s a query"]
    return Table(head, [line for row in result.rows for line in _lines(row)])


def swapped_table(result: TaskResult) -> Table:
    """Queries that show two classes, with their own and with swapped examples."""
    measure = result.measure
    columns = {
        "own_with_own": f"own example: {measure} with own",
        "own_with_other": "with the other",
        "swapped_with_shown": f"swapped example: {measure} with shown",
        "swapped_with_own": "with own",
        "right": "right, own",
        "right_swapped": "right, swapped",
        "flips": "flips",
    }
    lines = []
    for row in result.swapped:
        values = [percent(getattr(row.scores, name)) for name in columns]
        lines.append([row.name, *values, str(row.scores.queries)])
        ranges = [percent_range(row.scores.intervals.get(name)) for name in columns]
        lines.append([_INTERVAL, *ranges, ""])
    return Table(["prediction", *columns.values(), "queries"], lines)


def respects_table(result: TaskResult) -> Table | None:
    """The queries whose own and swapped examples differ in a respect, scored separately in each
    respect, such as class and style; None if there is only one respect.
    """
    columns = {"right": "right, own", "right_swapped": "right, swapped", "flips": "flips"}
    lines = []
    for row in result.swapped:
        for name, scores in row.scores.respects.items():
            values = [percent(getattr(scores, column)) for column in columns]
            lines.append([row.name, name, *values, str(scores.queries)])
            ranges = [percent_range(scores.intervals[column]) for column in columns]
            lines.append([_INTERVAL, "", *ranges, ""])
    if not lines:
        return None
    return Table(["prediction", "respect", *columns.values(), "queries"], lines)


def shots_table(result: TaskResult) -> Table:
    """The same queries by number of examples, with the gain of each additional example."""
    rows = []
    for row in result.by_shots:
        gain = "–" if row.gain is None else percent(row.gain)
        gain_range = percent_range(row.gain_interval)
        agreement = percent(row.agreement)
        rows.append([str(row.shots), agreement, percent_range(row.interval), gain, gain_range])
    head = ["examples", f"mean {result.measure}", _INTERVAL, "gain over the row above", _INTERVAL]
    return Table(head, rows)


def held_out_table(metrics: Metrics) -> Table:
    head = [
        "task",
        "loss (nats/token)",
        "unigram entropy",
        "below the entropy by",
        "loss by pair, first to last",
        "targets",
    ]
    rows = []
    for task, result in metrics.tasks.items():
        loss, entropy = result.held_out.loss, result.held_out.unigram_entropy
        below = percent(1 - loss / entropy) + " %" if entropy else "–"
        by_pair = ", ".join(f"{value:.3f}" for value in result.held_out.pair_loss)
        targets = str(result.held_out.targets)
        rows.append([task, f"{loss:.3f}", f"{entropy:.3f}", below, by_pair, targets])
    return Table(head, rows)


_INTERVAL = "95 % interval"


def _lines(row: Row) -> list[list[str]]:
    """The scores of a row and, if there are any, their intervals."""
    measures = row.scores.measures().values()
    if not any(measure.interval for measure in measures):
        return [_cells(row)]
    return [_cells(row), [_INTERVAL, *(measure.range_text for measure in measures), *[""] * 4]]


def _cells(row: Row) -> list[str]:
    scores = [measure.text for measure in row.scores.measures().values()]
    if row.asked is None:
        return [row.name, *scores, "", str(row.scores.episodes), "", ""]
    asked = row.asked
    copies = f"{percent(asked.copy_rate)} ({percent(asked.truth_copy_rate)})"
    rate = f"{asked.queries_per_second:.2f}"
    seconds = f"{asked.seconds_a_query:.3f}"
    return [row.name, *scores, copies, str(row.scores.episodes), rate, seconds]


def _notes(result: TaskResult) -> str:
    """How to read the table of a task's scores."""
    return " ".join(["Below each number: its 95 % interval.", *result.rows[0].scores.notes()])


def _swapped_note(result: TaskResult, is_told: bool) -> str:
    """How to read the table of swapped examples. is_told: whether the model is given the name of
    the class that the examples show.
    """
    if not result.swapped:
        return result.swapped_note
    begin = "Each query shows its own class and another"
    scores = result.swapped[0].scores
    if scores.of_another_class < scores.queries:
        begin = (
            "Each query shows its own class and another, or is described in another style alone "
            f"({scores.queries - scores.of_another_class} queries, which do not count in the "
            f"columns of {result.measure})"
        )
    note = (
        f"{begin}; it is asked with examples of the one, then "
        f"of the other. {result.measure} is a mean over queries, times 100. Right: the output "
        "agrees more with the annotation of the class that the examples show than with that of "
        "any other class of the query (a caption must name that class and place its box there, if "
        "it writes these). Flips: the share of queries that are right with both. An output that "
        "does not depend on the examples never flips."
    )
    if is_told:
        note += (
            " This model is also given the name of the class that the examples show, so flips do "
            "not tell whether it followed the examples or the name."
        )
    if not respects_table(result):
        return note
    return (
        f"{note} Here examples have styles too: the swapped ones are of another class and another "
        "style wherever a query has both, and right means right in every respect. Style: of all "
        "texts about these queries, those of the examples' style make "
        "the caption's words and pairs of words the most probable (naive Bayes); copying an "
        "example keeps its style."
    )
