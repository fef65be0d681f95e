"""table.json, table.md and table.html: what was measured, and beside it, greyed, what is published;
and figure.png, figure.json and figure.html.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from icl_moe.evaluation.published import FIGURES, PublishedTable, published_tables, show_figure
from icl_moe.files import write_whole
from icl_moe.pages import render
from icl_moe.pictures import Cell
from icl_moe.reproduce.figures import PaperFigure
from icl_moe.reproduce.tables import PaperTable, Row, Score
from icl_moe.tables import Table, as_markdown

_OURS = ("miou", "mae", "bleu_4", "meteor", "cider", "mean_ap")
"""The figures that an evaluation measures."""

_FLIPS = {"segmentation": "flips, masks", "captioning": "flips, captions"}
"""Our own column for each task: queries that are right after either of two examples, which no paper
reports.
"""

Results = Mapping[str, Mapping[str, Any]]
"""Run's name -> its metrics.json."""


def write_table(folder: Path, table: PaperTable, results: Results) -> Table:
    """Write the three files into `folder`, with what is finished so far, and return the table."""
    published = published_tables()[table.name]
    rows = {row.name: figures_of(row, results) for row in table.rows}
    shown = _table(published, rows)
    notes = [*table.notes, published.note()]
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "table": table.name,
        "scale": table.scale,
        "rows": [
            {
                "name": row.name,
                "system": published.rows[row.name].system,
                "runs": [run.name for run in row.runs],
                "measured": rows[row.name],
                "published": published.rows[row.name].figures,
            }
            for row in table.rows
        ],
        "notes": list(table.notes),
        "published_by": published.source,
        "published_protocol": published.protocol,
    }
    title = f"{published.title}, at {table.scale} scale"
    write_whole(folder / "table.json", json.dumps(content, indent=1) + "\n")
    ours = len(_columns(published, rows)) + 1
    paragraphs = "".join(f"\n{note}\n" for note in notes)
    text = f"# {title}\n\n{as_markdown(_in_italics(shown, ours))}\n{paragraphs}"
    write_whole(folder / "table.md", text)
    page = render("reproduced.html.j2", title=title, table=shown, ours=ours, notes=notes)
    write_whole(folder / "table.html", page)
    return shown


def figures_of(row: Row, results: Results) -> dict[str, float]:
    """The measured figures of a row, in the units of published.yaml; empty if none of its runs is
    finished.
    """
    figures: dict[str, float] = {}
    for score in row.scores:
        if score.run.name in results:
            figures |= _figures(score, results[score.run.name])
    return figures


def _figures(score: Score, metrics: Mapping[str, Any]) -> dict[str, float]:
    task = metrics["tasks"][score.task]
    own = _model_row(task["rows"], score.shots)
    bleu = own.get("bleu")
    values = dict(own) | ({"bleu_4": bleu[3]} if bleu else {})
    found = {
        name: value * (1 if name == "mae" else 100)
        for name in _OURS
        if isinstance(value := values.get(name), int | float)
    }
    swapped = _model_row(task["swapped"], score.shots)
    if swapped:
        found[_FLIPS[score.task]] = 100 * swapped["flips"]
    return found


def _model_row(rows: list[dict[str, Any]], shots: int) -> dict[str, Any]:
    """The row of the model after so many examples of its own; empty if there is none."""
    return next(
        (
            row
            for row in rows
            if row["prediction"] == "model" and row["shots"] == shots and "control" not in row
        ),
        {},
    )


def _columns(published: PublishedTable, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The columns of our figures: the columns of the published table, and flips if they were
    measured.
    """
    measured = {name for figures in rows.values() for name in figures}
    return [*published.figures, *(name for name in _FLIPS.values() if name in measured)]


def _table(published: PublishedTable, rows: Mapping[str, Mapping[str, float]]) -> Table:
    columns = _columns(published, rows)
    head = [
        "row",
        *(FIGURES.get(name, name) for name in columns),
        *(f"published {FIGURES[name]}" for name in published.figures),
    ]
    lines = []
    for name, figures in rows.items():
        row = published.rows[name]
        ours = [
            show_figure(figure, figures[figure]) if figure in figures else "–" for figure in columns
        ]
        theirs = [row.cell(figure) or "–" for figure in published.figures]
        lines.append([row.system, *ours, *theirs])
    return Table(head, lines)


def _in_italics(table: Table, ours: int) -> Table:
    """The table with the published columns in italics, since Markdown has no grey. ours: the number
    of columns before them.
    """
    lines = [
        [*line[:ours], *(f"*{cell}*" for cell in line[ours:])] for line in (table.head, *table.rows)
    ]
    return Table(lines[0], lines[1:])


def write_figure(
    folder: Path,
    figure: PaperFigure,
    says: str,
    content: Mapping[str, Any],
    picture: Image.Image,
    tables: Sequence[tuple[str, Table]] = (),
    rows: Sequence[tuple[str, Sequence[Cell]]] = (),
) -> None:
    """Write figure.png, figure.json and figure.html into `folder`.

    says: what is shown, of which run. content: the numbers. tables: under their titles. rows: of
    pictures, which the page shows instead of `picture`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{figure.title}, at {figure.scale} scale"
    head = {"figure": figure.name, "scale": figure.scale, "title": title, "says": says}
    values = head | dict(content) | {"notes": list(figure.notes)}
    write_whole(folder / "figure.json", json.dumps(values, indent=1) + "\n")
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_whole(folder / "figure.png", png.getvalue())
    page = render(
        "figure.html.j2",
        title=title,
        says=says,
        picture=None if rows else picture,
        rows=rows,
        tables=tables,
        notes=figure.notes,
    )
    write_whole(folder / "figure.html", page)
