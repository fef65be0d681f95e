"""The figures of `icl-moe shards stats` as PNG plots, drawn with Pillow."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from icl_moe.canvas import GRID, PALE, Canvas, shortened
from icl_moe.outputs import output_file, output_folder, write_output
from preprocessing.stats import ShardFigures, area_counts, code_use, overlap

WIDTH, ROW = 920, 22
_COLOURS = ("#3b73b9", "#d9822b", "#4c9f70")
_MARGIN, _LABELS, _TOP = 24, 210, 64

MOST_CLASSES = 40


def write_plots(location: str | Path, out: Path, against: Sequence[str | Path] = ()) -> list[Path]:
    """Write the plots of a shard folder into `out`, and return their paths. Raises InputError if
    the folder cannot be written.
    """
    out = output_folder(out)
    figures = ShardFigures(location)
    plots: dict[str, Image.Image] = {}
    for task, of_task in figures.tasks.items():
        ranked = sorted(of_task.classes.items(), key=lambda item: (-item[1], item[0]))
        more = f", the {MOST_CLASSES} most frequent of {len(ranked)} classes"
        plots[f"{task}_samples"] = draw_bars(
            f"{task}: samples by class" + more * (len(ranked) > MOST_CLASSES),
            [Bar(name, (count,)) for name, count in ranked[:MOST_CLASSES]],
        )
        plots[f"{task}_lengths"] = draw_histogram(
            f"{task}: length of samples in tokens, without padding", of_task.lengths
        )
        counts, bounds = area_counts(of_task.areas)
        plots[f"{task}_areas"] = draw_bars(
            f"{task}: area of the object / area of what a pair shows",
            [Bar(name, (count,)) for name, count in zip(bounds, counts, strict=True)],
        )
        for kind, used in of_task.codes.items():
            plots["_".join([task, *re.findall(r"\w+", kind)])] = draw_ranks(
                f"{task}: {kind}, {code_use(used)}", used
            )
    for number, other in enumerate(map(ShardFigures, against)):
        common = [task for task in figures.tasks if task in other.tasks]
        rows = [
            Bar(f"{what} of {task}", counts)
            for task in common
            for what, counts in overlap(figures.tasks[task], other.tasks[task]).items()
        ]
        legend = ("only here", "in both", f"only in {other.name}")
        plots[f"overlap_{number}"] = draw_bars("Classes and images of two splits", rows, legend)
    files = []
    for name, plot in plots.items():
        file = output_file(out / f"{name}.png", (".png",))
        write_output(file, _png(plot))
        files.append(file)
    return files


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its label and the lengths of its parts, one after the other."""

    label: str
    parts: tuple[int, ...]


def draw_bars(title: str, bars: Sequence[Bar], legend: Sequence[str] = ()) -> Image.Image:
    """Horizontal bars with their counts. legend: the names of the parts; with it, all bars are
    equally long and show shares.
    """
    canvas = Canvas(title, WIDTH, _TOP + ROW * (len(bars) + bool(legend)) + _MARGIN)
    most = max((sum(bar.parts) for bar in bars), default=0) or 1
    room = WIDTH - _LABELS - 2 * _MARGIN - 70
    for row, bar in enumerate(bars):
        most = sum(bar.parts) or 1 if legend else most
        y = _TOP + row * ROW
        canvas.text((_LABELS, y + ROW / 2), shortened(bar.label, 28), "rm")
        x: float = _LABELS + 10
        for part, colour in zip(bar.parts, _COLOURS, strict=False):
            width = room * part / most
            if part:
                canvas.box((x, y + 3, x + max(width, 1), y + ROW - 3), colour)
            x += width
        total = " + ".join(f"{part:,}" for part in bar.parts)
        canvas.text((x + 8, y + ROW / 2), total, "lm", PALE)
    x = _LABELS + 10
    for name, colour in zip(legend, _COLOURS, strict=False):
        y = _TOP + len(bars) * ROW + 6
        canvas.box((x, y + 4, x + 10, y + 14), colour)
        x = canvas.text((x + 16, y + 9), shortened(name, 40), "lm", PALE) + 24
    return canvas.finish()


def draw_histogram(title: str, values: np.ndarray, bins: int = 40) -> Image.Image:
    """How many values lie in each of up to `bins` ranges of equal width."""
    low, high = float(np.min(values)), float(np.max(values))
    bins = max(1, min(bins, int(high - low) + 1))
    counts, _ = np.histogram(values, bins=bins, range=(low, high + (low == high)))
    canvas = Canvas(title, WIDTH, 320)
    plot = _Axes(canvas, most=int(counts.max()), labels=(f"{low:,.0f}", f"{high:,.0f}"))
    for number, count in enumerate(counts.tolist()):
        left, right = (number / bins, (number + 1) / bins) if bins > 1 else (0.48, 0.52)
        plot.column(left, right, count)
    return canvas.finish()


def draw_ranks(title: str, counts: np.ndarray) -> Image.Image:
    """The share of each code, the most frequent first, on a logarithmic scale."""
    canvas = Canvas(title, WIDTH, 320)
    ranked = np.sort(counts)[::-1]
    most = max(int(ranked[0]), 1)
    plot = _Axes(canvas, most, ("most frequent", f"{len(ranked):,} codes"), logarithmic=True)
    points = [
        (number / max(len(ranked) - 1, 1), count)
        for number, count in enumerate(ranked.tolist())
        if count
    ]
    plot.line(points)
    return canvas.finish()


class _Axes:
    """A plot within a canvas, from 0 to 1 across and 0 (or 1, if logarithmic) to `most` upwards.
    labels: what stands below its left and right end.
    """

    def __init__(
        self, canvas: Canvas, most: int, labels: tuple[str, str], logarithmic: bool = False
    ) -> None:
        self._canvas, self._most, self._logarithmic = canvas, most, logarithmic
        self._left, self._right, self._top, self._bottom = 90, WIDTH - 40, _TOP, canvas.height - 44
        for level in self._levels():
            y = self._y(level)
            canvas.line([(self._left, y), (self._right, y)], GRID, 1)
            canvas.text((self._left - 10, y), f"{level:,}", "rm", PALE)
        canvas.text((self._left, self._bottom + 18), labels[0], "lm", PALE)
        canvas.text((self._right, self._bottom + 18), labels[1], "rm", PALE)

    def column(self, left: float, right: float, count: int) -> None:
        if count:
            gap = min(1.0, (self._x(right) - self._x(left)) / 6)
            self._canvas.box(
                (self._x(left) + gap, self._y(count), self._x(right) - gap, self._bottom),
                _COLOURS[0],
            )

    def line(self, points: Sequence[tuple[float, int]]) -> None:
        if len(points) > 1:
            self._canvas.line([(self._x(x), self._y(y)) for x, y in points], _COLOURS[0], 2)

    def _levels(self) -> list[int]:
        """Round numbers up to `most`."""
        if self._logarithmic:
            return [10**power for power in range(len(str(self._most)))]
        step = 10 ** max(len(str(self._most)) - 1, 0)
        step = next((s for s in (step // 5, step // 2, step) if s and self._most // s <= 5), step)
        return list(range(0, self._most + 1, step))

    def _x(self, share: float) -> float:
        return self._left + share * (self._right - self._left)

    def _y(self, count: float) -> float:
        share = count / self._most
        if self._logarithmic:
            share = np.log(max(count, 1)) / np.log(max(self._most, 2))
        return float(self._bottom - share * (self._bottom - self._top))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()
