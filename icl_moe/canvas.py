"""Plots as pictures, drawn with Pillow: a canvas for texts, lines and pictures, and panels with
axes on it.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PALE, GRID, PAPER = "#24292f", "#57606a", "#e4e7eb", "#ffffff"
SAFE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colours that colour-blind readers can tell apart (Okabe and Ito 2008)."""

_MARGIN = 24
_SCALE = 2
"""Plots are drawn at twice their size, so that lines are smooth after scaling down, and print
well without it.
"""


class Canvas:
    """A picture with a title; coordinates are those of the picture at its nominal size."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self.text((_MARGIN, 28), shortened(title, width // 8 - 5), "lm", size=16)

    def text(
        self,
        place: tuple[float, float],
        text: str,
        anchor: str,
        colour: str = INK,
        size: int = 13,
    ) -> float:
        """Write a text, and return where it ends."""
        font = ImageFont.load_default(size * _SCALE)
        at = (place[0] * _SCALE, place[1] * _SCALE)
        self._draw.text(at, text, colour, font, anchor)
        return float(self._draw.textbbox(at, text, font, anchor)[2]) / _SCALE

    def wrapped(
        self,
        place: tuple[float, float],
        text: str,
        width: float,
        lines: int,
        colour: str = INK,
        size: int = 13,
    ) -> None:
        """Write a text into at most so many lines of a width, from the upper left corner on; what
        does not fit is cut off, with an ellipsis.
        """
        for number, line in enumerate(wrap(text, width, lines, size)):
            self.text((place[0], place[1] + number * size * 1.3), line, "la", colour, size)

    def box(self, corners: tuple[float, float, float, float], colour: str) -> None:
        self._draw.rectangle([value * _SCALE for value in corners], colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, colour, round(width * _SCALE), joint="curve")

    def mark(self, place: tuple[float, float], kind: int, colour: str, radius: float = 4) -> None:
        """A mark around a place: 0 a disc, 1 a square, 2 a diamond, 3 a triangle; so that series
        differ in more than their colour.
        """
        x, y, r = (value * _SCALE for value in (*place, radius))
        if kind == 0:
            self._draw.ellipse((x - r, y - r, x + r, y + r), colour)
            return
        corners = (
            [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
            [(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)],
            [(x, y - 1.2 * r), (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)],
        )
        self._draw.polygon(corners[(kind - 1) % len(corners)], colour)

    def paste(self, picture: Image.Image, corners: tuple[float, float, float, float]) -> None:
        """A picture, stretched to these corners, its pixels as squares."""
        left, top, right, bottom = (round(value * _SCALE) for value in corners)
        shown = picture.convert("RGB").resize((right - left, bottom - top), Image.Resampling.BOX)
        if picture.width < right - left:
            shown = picture.convert("RGB").resize(shown.size, Image.Resampling.NEAREST)
        self._image.paste(shown, (left, top))

    def finish(self) -> Image.Image:
        """The picture at its nominal size."""
        return self._image.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def finish_for_print(self) -> Image.Image:
        """The picture at twice its nominal size."""
        return self._image


class Panel:
    """A plot with axes within a canvas. corners: the corners of the plot's area, without its
    labels. x_range, y_range: the values at the ends of the axes. A line at zero is drawn if the
    range includes zero.
    """

    def __init__(
        self,
        canvas: Canvas,
        corners: tuple[float, float, float, float],
        title: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ) -> None:
        self._canvas, self._corners = canvas, corners
        self._x_range, self._y_range = x_range, y_range
        left, top, right, bottom = corners
        canvas.text((left, top - 16), title, "lm", size=13)
        for level in _levels(*y_range):
            y = self._y(level)
            heavy = level == 0 and y_range[0] < 0
            canvas.line([(left, y), (right, y)], PALE if heavy else GRID, 1)
            canvas.text((left - 8, y), f"{level:g}", "rm", PALE, 12)
        canvas.line([(left, bottom), (right, bottom)], PALE, 1)

    def x_label(self, value: float, text: str, size: int = 12) -> None:
        self._canvas.text((self._x(value), self._corners[3] + 14), text, "mm", PALE, size)

    def x_title(self, text: str) -> None:
        left, _, right, bottom = self._corners
        self._canvas.text(((left + right) / 2, bottom + 32), text, "mm", PALE, 12)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6) -> None:
        if len(points) > 1:
            self._canvas.line([(self._x(x), self._y(y)) for x, y in points], colour, width)

    def mark(self, place: tuple[float, float], kind: int, colour: str, radius: float = 4) -> None:
        self._canvas.mark((self._x(place[0]), self._y(place[1])), kind, colour, radius)

    def whisker(self, x: float, low: float, high: float, colour: str) -> None:
        self.line([(x, low), (x, high)], colour, 1)

    def _x(self, value: float) -> float:
        return _between(value, self._x_range, self._corners[0], self._corners[2])

    def _y(self, value: float) -> float:
        return _between(value, self._y_range, self._corners[3], self._corners[1])


def legend(
    canvas: Canvas, place: tuple[float, float], entries: Sequence[tuple[str, int, str]]
) -> None:
    """(name, kind of mark, colour) of each series, in a row from `place` on."""
    x, y = place
    for name, kind, colour in entries:
        canvas.mark((x + 5, y), kind, colour)
        x = canvas.text((x + 16, y), name, "lm", PALE) + 24


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def wrap(text: str, width: float, lines: int, size: int) -> list[str]:
    """A text in at most so many lines of a width in pixels at its nominal size; the last one ends
    with an ellipsis if something is cut off.
    """
    font = ImageFont.load_default(size * _SCALE)

    def fits(line: str) -> bool:
        return bool(font.getlength(line) <= width * _SCALE)

    found, words = [""], text.split()
    for word in words:
        longer = f"{found[-1]} {word}".strip()
        if fits(longer) or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) > lines:
        found = found[:lines]
        found[-1] += " …"
    for number, line in enumerate(found):
        while len(line) > 1 and not fits(line):
            line = f"{line.rstrip('… ')[:-1]}…"
        found[number] = line
    return found


def _between(value: float, ends: tuple[float, float], first: float, last: float) -> float:
    return first + (value - ends[0]) / (ends[1] - ends[0]) * (last - first)


def _levels(low: float, high: float) -> list[float]:
    """Round numbers in a range, at most six."""
    steps = [m * 10.0**p for p in range(-6, 7) for m in (1, 2, 5)]
    step = next(s for s in steps if (high - low) / s <= 5)
    first = int(-(-low // step))
    return [round(n * step, 6) for n in range(first, int(high / step + 1e-9) + 1)]
