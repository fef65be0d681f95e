"""report.html: the tables and pictures of an evaluation in one self-contained file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icl_moe.bootstrap import DRAWS
from icl_moe.evaluation.published import beside
from icl_moe.evaluation.results import Metrics, Row, TaskResult
from icl_moe.files import write_whole
from icl_moe.pages import render
from icl_moe.pages.chart import Chart
from icl_moe.pictures import Gallery
from icl_moe.tables import Table, as_text, percent, percent_range
from icl_moe.tasks.task import GroupScore


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
) -> None:
    """Write the report of an evaluation. It begins with the `proofs` of each task, pictures of
    queries with examples of two classes. `sections` follow the tables and precede the other
    pictures.
    """
    tasks = [
        {
            "name": name,
            "proof": (proofs or {}).get(name),
            "swapped": swapped_table(result) if result.swapped else None,
            "respects": respects_table(result),
            "swapped_note": _swapped_note(result),
            "by_shots": shots_table(result) if result.by_shots else None,
            "scores": scores_table(result),
            "notes": _notes(result),
            "overlap": _overlap(result),
            "groups": _group_tables(result),
            "published": beside(name),
        }
        for name, result in metrics.tasks.items()
    ]
    page = render(
        "report.html.j2",
        title=f"{metrics.model_folder} on {metrics.shards_folder}",
        metrics=metrics,
        tasks=tasks,
        held_out=held_out_table(metrics),
        sections=sections,
        galleries=galleries,
    )
    write_whole(path, page)


def summary(metrics: Metrics) -> str:
    """The report's main tables as text for a terminal."""
    tables: dict[str, Table] = {}
    for name, result in metrics.tasks.items():
        if result.swapped:
            tables[f"{name}, queries that show two classes"] = swapped_table(result)
        respects = respects_table(result)
        if respects:
            tables[f"{name}, what of the examples is obeyed"] = respects
        tables[name] = scores_table(result)
        if result.by_shots:
            tables[f"{name} by number of examples"] = shots_table(result)
    tables["held-out loss"] = held_out_table(metrics)
    return "\n\n".join(f"{name.capitalize()}\n{as_text(table)}" for name, table in tables.items())


def scores_table(result: TaskResult) -> Table:
    """A task's rows. Shares, BLEU, ROUGE-L, METEOR and CIDEr are multiplied by 100, as in papers;
    MAE is not.
    """
    columns = list(result.rows[0].scores.cells())
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
    """The same queries, each respect in which the examples are obeyed or not by itself; None where
    there is only one.
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
    cells, ranges = _cells(row), row.scores.ranges()
    if not ranges:
        return [cells]
    found = [ranges.get(name, "") for name in row.scores.cells()]
    return [cells, [_INTERVAL, *found, "", "", "", ""]]


def _cells(row: Row) -> list[str]:
    scores = list(row.scores.cells().values())
    if row.asked is None:
        return [row.name, *scores, "", str(row.scores.episodes), "", ""]
    asked = row.asked
    copies = f"{percent(asked.copy_rate)} ({percent(asked.truth_copy_rate)})"
    rate = f"{asked.queries_per_second:.2f}"
    seconds = f"{asked.seconds_a_query:.3f}"
    return [row.name, *scores, copies, str(row.scores.episodes), rate, seconds]


def _notes(result: TaskResult) -> str:
    """How to read the table."""
    notes = [
        "Scores are times 100. Copies: how often an output equals an example's (in brackets: how "
        "often the truth does).",
        *result.rows[0].scores.notes(),
    ]
    if result.rows[0].scores.ranges():
        notes.append(
            f"95 % intervals: bootstrap over the queries, {DRAWS} draws; the classes and the "
            "training are held fixed."
        )
    return " ".join(notes)


def _swapped_note(result: TaskResult) -> str:
    """How to read the table of swapped examples."""
    if not result.swapped:
        return result.swapped_note
    note = (
        "Each query shows its own class and another; it is asked with examples of the one, then "
        f"of the other. {result.measure} is a mean over queries, times 100. Right: the output "
        "agrees more with the annotation of the class that the examples show than with that of "
        "any other class of the query (a caption must name that class and place its box there, if "
        "it writes these). Flips: the share of queries that are right with both. An output that "
        "does not depend on the examples never flips."
    )
    if not respects_table(result):
        return note
    return (
        f"{note} Here the swapped examples are also of another style, and right means right in "
        "every respect. Style: of all texts about these queries, those of the examples' style make "
        "the caption's words and pairs of words the most probable (naive Bayes); copying an "
        "example keeps its style."
    )


def _overlap(result: TaskResult) -> str:
    evaluated, seen = result.classes
    if seen is None:
        return f"{len(evaluated)} classes; the model does not record which ones it was trained on."
    return f"{len(evaluated)} classes; seen in training ({len(seen)}): {', '.join(seen) or 'none'}."


def _group_tables(result: TaskResult) -> list[Table]:
    """The score of each class in each row, and of whatever else a task's scores are grouped by."""
    of_rows = [row.scores.groups() for row in result.rows]
    names = [row.name for row in result.rows]
    return [
        Table(
            [grouped_by, "episodes", *names],
            [
                [name, str(first.episodes), *(_group_cell(of[grouped_by][name]) for of in of_rows)]
                for name, first in groups.items()
            ],
        )
        for grouped_by, groups in of_rows[0].items()
    ]


def _group_cell(found: GroupScore) -> str:
    if found.interval is None:
        return percent(found.score)
    return f"{percent(found.score)} ({percent_range(found.interval)})"
