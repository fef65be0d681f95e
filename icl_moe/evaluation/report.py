"""report.html: the tables and pictures of an evaluation in one file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icl_moe.evaluation.results import Metrics, Row, TaskResult
from icl_moe.files import write_whole
from icl_moe.pages import render
from icl_moe.pages.chart import Chart
from icl_moe.pictures import Gallery
from icl_moe.tables import Table, as_text, percent


@dataclass(frozen=True)
class Section:
    """A further part of the report."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


def write_report(
    path: Path, metrics: Metrics, galleries: Sequence[Gallery], sections: Sequence[Section] = ()
) -> None:
    """Write the report of an evaluation. `sections` stand between the tables and the pictures."""
    tasks = [
        {
            "name": name,
            "scores": scores_table(result),
            "notes": _notes(result),
            "overlap": _overlap(result),
            "classes": _class_table(result),
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
    tables = {name: scores_table(result) for name, result in metrics.tasks.items()}
    tables["held-out loss"] = held_out_table(metrics)
    return "\n\n".join(f"{name.capitalize()}\n{as_text(table)}" for name, table in tables.items())


def scores_table(result: TaskResult) -> Table:
    """A task's rows. Shares, BLEU, ROUGE-L, METEOR and CIDEr are times 100, as papers print them;
    MAE is not.
    """
    columns = list(result.rows[0].scores.cells())
    head = ["prediction", *columns, "copies", "episodes", "queries/s"]
    return Table(head, [_cells(row) for row in result.rows])


def held_out_table(metrics: Metrics) -> Table:
    head = [
        "task",
        "loss (nats/token)",
        "entropy of the unigrams",
        "below it by",
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


def _cells(row: Row) -> list[str]:
    scores = list(row.scores.cells().values())
    if row.asked is None:
        return [row.name, *scores, "", str(row.scores.episodes), ""]
    asked = row.asked
    copies = f"{percent(asked.copy_rate)} ({percent(asked.truth_copy_rate)})"
    rate = f"{asked.queries_per_second:.2f}"
    return [row.name, *scores, copies, str(row.scores.episodes), rate]


def _notes(result: TaskResult) -> str:
    """What must be known to read the table."""
    notes = [
        "Scores are times 100. Copies: how often an output equals an example's (in brackets: how "
        "often the truth does).",
        *result.rows[0].scores.notes(),
    ]
    return " ".join(notes)


def _overlap(result: TaskResult) -> str:
    evaluated, seen = result.classes
    if seen is None:
        return f"{len(evaluated)} classes; the model does not say which ones it was trained on."
    return (
        f"{len(evaluated)} classes, of which {len(seen)} were seen in training: "
        f"{', '.join(seen) or 'none'}."
    )


def _class_table(result: TaskResult) -> Table | None:
    """The score of each class in each row; None for a task whose scores are not by class."""
    of_rows = [row.scores.by_class() for row in result.rows]
    rows = [
        [name, str(episodes), *(percent(by_class[name][1]) for by_class in of_rows)]
        for name, (episodes, _) in of_rows[0].items()
    ]
    if not rows:
        return None
    return Table(["class", "episodes", *(row.name for row in result.rows)], rows)
