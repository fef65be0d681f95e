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
    """A line through points; `bars` is the path of the intervals at its `dots`."""

    points: str
    colour: str
    dots: tuple[tuple[float, float], ...] = ()
    bars: str = ""
    dashes: str = ""


@dataclass(frozen=True)
class Chart:
    """The parts of a chart, in pixels from the upper left corner."""

    axes: str
    labels: tuple[Label, ...]
    lines: tuple[Line, ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    grid: str = ""
    title: str = ""


class Curve(NamedTuple):
    """A value with its interval, if there is one, at each x. is_ours: whether the curve is of the
    system that the chart is about; other curves are drawn with dashes.
    """

    name: str
    xs: Sequence[int]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]
    is_ours: bool = True


_STEPS = (1, 2, 5, 10, 20, 25, 50)


def score_chart(title: str, curves: Sequence[Curve], x_label: str) -> Chart:
    """Scores, times 100 and from 0 on, at whole numbers, with their intervals as bars, and the name
    of each curve above the chart.
    """
    width, height, left, top, bottom = 460, 300, 40, 34 + 18 * len(curves), 250
    xs = sorted({x for curve in curves for x in curve.xs})
    most = max(high for curve in curves for _, high in _ends(curve))
    step = next((s for s in _STEPS if 100 * most / s <= 6), _STEPS[-1] * 2)
    ceiling = max(step, -(-100 * most // step) * step)

    def place(x: float, value: float) -> tuple[float, float]:
        across = (x - xs[0]) / max(xs[-1] - xs[0], 1)
        up = bottom - 100 * value / ceiling * (bottom - top)
        return round(left + 24 + across * (width - left - 60), 1), round(up, 1)

    labels = [
        Label(left, 16, "start", title, "#1c2430"),
        Label(width / 2, height - 10, "middle", x_label),
    ]
    labels += [Label(place(x, 0)[0], bottom + 18, "middle", str(x)) for x in xs]
    levels = [step * n for n in range(int(ceiling // step) + 1)]
    labels += [Label(left - 6, place(0, v / 100)[1] + 4, "end", f"{v:g}") for v in levels]
    grid = " ".join(f"M{left},{place(0, v / 100)[1]} H{width - 12}" for v in levels[1:])
    lines = []
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        # Beside each other, so that no bar hides another.
        aside = 6 * (number - (len(curves) - 1) / 2)
        placed = map(place, curve.xs, curve.values)
        dots = tuple((round(x + aside, 1), y) for x, y in placed)
        bars = [
            f"M{x},{place(0, high)[1]} V{place(0, low)[1]}"
            for (x, _), (low, high) in zip(dots, _ends(curve), strict=True)
            if high > low
        ]
        points = " ".join(f"{x},{y}" for x, y in dots)
        lines.append(Line(points, colour, dots, " ".join(bars), "" if curve.is_ours else "5 4"))
        labels.append(Label(left, 34 + 18 * number, "start", curve.name, colour))
    axes = f"M{left},{top} V{bottom} H{width - 12}"
    return Chart(axes, tuple(labels), tuple(lines), width, height, grid, title)


def _ends(curve: Curve) -> list[tuple[float, float]]:
    """The interval at each place, or the value twice."""
    pairs = zip(curve.values, curve.intervals, strict=True)
    return [(value, value) if interval is None else interval for value, interval in pairs]


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
