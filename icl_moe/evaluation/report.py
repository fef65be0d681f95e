"""report.html: the tables and pictures of an evaluation in one file that needs nothing else."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from icl_moe.files import write_whole


@dataclass(frozen=True)
class Section:
    """A part of the report. `body` is HTML: of `table`, `line_chart`, or one's own."""

    title: str
    body: str


@dataclass(frozen=True)
class Cell:
    """A picture with a word above it and text below."""

    heading: str
    picture: Image.Image
    text: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures, an episode each: its class, and examples, query, prediction and truth."""

    title: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


Table = tuple[list[str], list[list[str]]]
"""Column heads and rows."""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    galleries: Sequence[Gallery],
    sections: Sequence[Section] = (),
) -> None:
    """Write the report of what `evaluate` returned. `sections` stand between the tables and the
    pictures.
    """
    title = f"{metrics['model_folder']} on {metrics['shards_folder']}"
    parts = [
        "<!doctype html><html lang='en'><meta "
        f"charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    ]
    parts.append(f"<h1>{html.escape(title)}</h1>{_provenance(metrics)}")
    for task, results in metrics["tasks"].items():
        parts.append(
            f"<h2>{task.capitalize()}</h2>{table(*scores_table(results))}{_notes(results)}"
        )
    parts.append(f"<h2>Held-out loss</h2>{table(*held_out_table(metrics))}<p>{_HELD_OUT_NOTE}</p>")
    parts += [f"<h2>{html.escape(section.title)}</h2>{section.body}" for section in sections]
    parts += [_gallery(gallery) for gallery in galleries]
    for task, results in metrics["tasks"].items():
        parts.append(f"<h2>Classes of {task}</h2>{_classes(results)}")
    write_whole(path, "\n".join(parts))


def summary(metrics: dict[str, Any]) -> str:
    """The report's main tables as text for a terminal."""
    tables = {task: scores_table(results) for task, results in metrics["tasks"].items()} | {
        "held-out loss": held_out_table(metrics)
    }
    return "\n\n".join(
        f"{name.capitalize()}\n{_aligned(*content)}" for name, content in tables.items()
    )


def scores_table(results: dict[str, Any]) -> Table:
    """A task's rows. Shares, BLEU, ROUGE-L, METEOR and CIDEr are times 100, as papers print them;
    MAE is not.
    """
    if "miou" in results["rows"][0]:
        head = ["prediction", "mIoU", "mean IoU", "MAE", "copies", "episodes", "queries/s"]
        rows = [
            [
                row["name"],
                _percent(row["miou"]),
                _percent(row["mean_iou"]),
                f"{row['mae']:.3f}",
                *_common(row),
            ]
            for row in results["rows"]
        ]
        return head, rows
    head = [
        "prediction",
        "B@1",
        "B@2",
        "B@3",
        "B@4",
        "ROUGE-L",
        "METEOR",
        "CIDEr",
        "category",
        "box IoU",
        "copies",
        "episodes",
        "queries/s",
    ]
    rows = []
    for row in results["rows"]:
        scores = [
            *row["bleu"],
            row["rouge_l"],
            row["meteor"],
            row["cider"],
            row.get("category_accuracy"),
            row.get("box_iou"),
        ]
        rows.append([row["name"], *map(_percent, scores), *_common(row)])
    return head, rows


def held_out_table(metrics: dict[str, Any]) -> Table:
    head = [
        "task",
        "loss (nats/token)",
        "entropy of the unigrams",
        "below it by",
        "loss by pair, first to last",
        "targets",
    ]
    rows = []
    for task, results in metrics["tasks"].items():
        held_out = results["held_out"]
        loss, entropy = held_out["loss"], held_out["unigram_entropy"]
        below = _percent(1 - loss / entropy) + " %" if entropy else "–"
        by_pair = ", ".join(f"{value:.3f}" for value in held_out["pair_loss"])
        rows.append(
            [task, f"{loss:.3f}", f"{entropy:.3f}", below, by_pair, str(held_out["targets"])]
        )
    return head, rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain texts."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def line_chart(
    series: dict[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> str:
    """An SVG of lines: name -> (x values, y values), at least one point in all."""
    xs = [x for line in series.values() for x in line[0]]
    ys = [y for line in series.values() for y in line[1]]
    (left, right), (low, high) = _spread(xs), _spread(ys)
    width, height, margin = 720, 300, 56

    def place(x: float, y: float) -> str:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        x = margin + across * (width - 2 * margin)
        y = height - margin - up * (height - 2 * margin)
        return f"{x:.1f},{y:.1f}"

    parts = [f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img'>"]
    bottom, end = height - margin, width - margin
    parts.append(f"<path d='M{margin},{margin} V{bottom} H{end}' fill='none' stroke='#888'/>")
    labels = [
        (margin, bottom + 18, "start", f"{left:g}"),
        (end, bottom + 18, "end", f"{right:g}"),
        (width / 2, bottom + 36, "middle", x_label),
    ]
    labels += [
        (margin - 6, bottom, "end", f"{low:.3g}"),
        (margin - 6, margin + 5, "end", f"{high:.3g}"),
        (margin, margin - 14, "middle", y_label),
    ]
    parts += [
        f"<text x='{x}' y='{y}' text-anchor='{anchor}'>{html.escape(text)}</text>"
        for x, y, anchor, text in labels
    ]
    for number, (name, (line_x, line_y)) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(place(x, y) for x, y in zip(line_x, line_y, strict=True))
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.6'/>"
        )
        parts.append(
            f"<text x='{end}' y='{margin + 18 * number}' text-anchor='end' style='fill: "
            f"{colour}'>{html.escape(name)}</text>"
        )
    return "".join(parts) + "</svg>"


_COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#b8860b", "#555")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 84rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
p, dl { color: #555; max-width: 60rem; } small { color: #777; }
svg text { font-size: 13px; fill: #444; }
article { border-top: 1px solid #ddd; padding: .9rem 0; }
article h3 { margin: 0 0 .5rem; font-size: 1rem; font-weight: 600; }
.cells { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 168px; }
figure img { width: 168px; image-rendering: pixelated; display: block; border-radius: 3px; }
figure b { font-size: .8rem; font-weight: 600; color: #777; }
figcaption { font-size: .82rem; color: #444; }
.prediction b { color: #1f6fb4; }
"""
_HELD_OUT_NOTE = (
    "Teacher forcing: each target (mask codes, caption text) is predicted from the true tokens "
    "before it, in every pair of an episode. "
    "The entropy is that of these targets' own unigram distribution: no model that ignores its "
    "context gets below it."
)


def _provenance(metrics: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    return (
        f"<p>Model {metrics['model']}, shards {metrics['shards']}; free decoding, "
        f"{metrics['decoding']}, batches of "
        f"{metrics['batch_size']}; limit per task: "
        f"{metrics['limit'] or 'none'}.<br><small>{html.escape(versions)}</small></p>"
    )


def _notes(results: dict[str, Any]) -> str:
    """What must be known to read the table: how texts were split, why METEOR is missing, what
    stands in the last rows.
    """
    row = results["rows"][0]
    notes = [
        "Scores are times 100, but MAE. Copies: how often an output equals an example's (in "
        "brackets: how often the truth does)."
    ]
    if "tokenizer" in row:
        notes.append(f"Texts were split by: {row['tokenizer']}.")
        if row["meteor"] is None:
            notes.append(f"METEOR was {row['meteor_note']}.")
    return f"<p>{html.escape(' '.join(notes))}</p>"


def _classes(results: dict[str, Any]) -> str:
    evaluated, seen = results["classes"]["evaluated"], results["classes"]["seen_in_training"]
    if seen is None:
        overlap = f"{len(evaluated)} classes; the model does not say which ones it was trained on."
    else:
        overlap = (
            f"{len(evaluated)} classes, of which {len(seen)} were seen in training: "
            f"{', '.join(seen) or 'none'}."
        )
    columns = [row for row in results["rows"] if "class_iou" in row]
    if not columns:
        return f"<p>{html.escape(overlap)}</p>"
    rows = [
        [
            name,
            str(columns[0]["class_episodes"][name]),
            *(_percent(row["class_iou"][name]) for row in columns),
        ]
        for name in columns[0]["class_iou"]
    ]
    head = ["class", "episodes", *(row["name"] for row in columns)]
    return f"<p>{html.escape(overlap)} IoU of each class, times 100:</p>{table(head, rows)}"


def _gallery(gallery: Gallery) -> str:
    articles = []
    for title, cells in gallery.rows:
        figures = "".join(
            f"<figure class='{cell.heading}'><b>{html.escape(cell.heading)}</b><img alt='' "
            f"src='{data_url(cell.picture)}'>"
            f"<figcaption>{html.escape(cell.text)}</figcaption></figure>"
            for cell in cells
        )
        articles.append(
            f"<article><h3>{html.escape(title)}</h3><div class='cells'>{figures}</div></article>"
        )
    return f"<h2>{html.escape(gallery.title)}</h2>{''.join(articles)}"


def data_url(picture: Image.Image) -> str:
    """A picture as the source of an <img>, PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _common(row: dict[str, Any]) -> list[str]:
    if row["prediction"] != "model":
        return ["", str(row["episodes"]), ""]
    return [
        f"{_percent(row['copy_rate'])} ({_percent(row['truth_copy_rate'])})",
        str(row["episodes"]),
        f"{row['queries_per_second']:.2f}",
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for first, *others in (head, *rows):
        lines.append(
            [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            ]
        )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest value, never equal."""
    least, most = min(values), max(values)
    return (least, most) if most > least else (least - 0.5, most + 0.5)
