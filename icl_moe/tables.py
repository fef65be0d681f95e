"""Tables of texts, and the format of numbers in tables."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_NUMBERS = re.compile(r"[\d\s.,()%–-]*")


class Table(NamedTuple):
    """Column headings, and rows of as many texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def percent(value: float | None) -> str:
    """A share times 100, as papers print it; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def percent_range(interval: tuple[float, float] | None) -> str:
    """Both ends of an interval, as `percent` prints them; an empty string for None."""
    return "" if interval is None else " – ".join(map(percent, interval))


def as_text(table: Table) -> str:
    """A table for a terminal: columns of numbers are right-aligned, others left-aligned."""
    lines = [table.head, *table.rows]
    columns = []
    for column, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        to_right = column > 0 and all(_NUMBERS.fullmatch(cell) for cell in cells[1:])
        columns.append([cell.rjust(width) if to_right else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def as_markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
