"""The layout of line charts for the SVG of parts.html.j2."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#b8860b", "#555")
_WIDTH, _HEIGHT, _MARGIN = 720, 300, 56

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> (x values, y values), with at least one point in all."""


class Label(NamedTuple):
    x: float
    y: float
    anchor: str
    text: str
    colour: str = ""


class Line(NamedTuple):
    points: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """The parts of a chart, in pixels from the upper left corner."""

    axes: str
    labels: tuple[Label, ...]
    lines: tuple[Line, ...]
    width: int = _WIDTH
    height: int = _HEIGHT


def line_chart(series: Series, x_label: str, y_label: str) -> Chart:
    """A line for each of the series, with the least and the largest value at either axis."""
    (left, right) = _limits([x for xs, _ in series.values() for x in xs])
    (low, high) = _limits([y for _, ys in series.values() for y in ys])
    bottom, end = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    labels = [
        Label(_MARGIN, bottom + 18, "start", f"{left:g}"),
        Label(end, bottom + 18, "end", f"{right:g}"),
        Label(_WIDTH / 2, bottom + 36, "middle", x_label),
        Label(_MARGIN - 6, bottom, "end", f"{low:.3g}"),
        Label(_MARGIN - 6, _MARGIN + 5, "end", f"{high:.3g}"),
        Label(_MARGIN, _MARGIN - 14, "middle", y_label),
    ]
    lines = []
    for number, (name, (xs, ys)) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [
            (
                _MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN),
                bottom - (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN),
            )
            for x, y in zip(xs, ys, strict=True)
        ]
        lines.append(Line(" ".join(f"{x:.1f},{y:.1f}" for x, y in places), colour))
        labels.append(Label(end, _MARGIN + 18 * number, "end", name, colour))
    axes = f"M{_MARGIN},{_MARGIN} V{bottom} H{end}"
    return Chart(axes, tuple(labels), tuple(lines))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value, never equal."""
    least, most = min(values), max(values)
    return (least, most) if most > least else (least - 0.5, most + 0.5)
