"""Published figures, which reports show next to ours, in grey and set apart, each with its source
and protocol.

They are data, in published.yaml: the paper's tables, and what other systems reach on the standard
benchmarks.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from icl_moe.settings import load_recipe
from icl_moe.tables import Table

FIGURES = {
    "miou": "mIoU",
    "mae": "MAE",
    "bleu_4": "B@4",
    "meteor": "METEOR",
    "cider": "CIDEr",
    "mean_ap": "mAP",
    "coco20i": "COCO-20i",
    "pascal5i": "Pascal-5i",
    "fss1000": "FSS-1000",
    "lvis92i": "LVIS-92i",
}
"""The figures by name, in the order of columns -> heading."""


_DECIMALS = {"miou": 2, "mae": 3}
"""Figure -> the number of its decimals when it is printed, where that is not one."""


@dataclass(frozen=True)
class PublishedRow:
    """The figures of a system, as published. unverified: the figures that are known only from
    notes.
    """

    system: str
    figures: dict[str, float]
    unverified: tuple[str, ...] = ()

    def cell(self, figure: str) -> str:
        """A figure as text, empty where there is none."""
        if figure not in self.figures:
            return ""
        doubt = "?" if figure in self.unverified else ""
        return show_figure(figure, self.figures[figure]) + doubt


@dataclass(frozen=True)
class PublishedTable:
    """A published table, whose figures were measured in the way that `protocol` states."""

    title: str
    source: str
    protocol: str
    task: Literal["segmentation", "captioning", "both"]
    rows: dict[str, PublishedRow]
    address: str | None = None

    @property
    def figures(self) -> list[str]:
        """The names of the figures that any row has, in the order of columns."""
        return [name for name in FIGURES if any(name in row.figures for row in self.rows.values())]

    def table(self) -> Table:
        head = ["system", *(FIGURES[name] for name in self.figures)]
        rows = [[row.system, *map(row.cell, self.figures)] for row in self.rows.values()]
        return Table(head, rows)

    def note(self) -> str:
        """Where the figures come from, and how they were measured."""
        where = f" ({self.address})" if self.address else ""
        return f"Published by {self.source}{where}, not measured here. Protocol: {self.protocol}"


@dataclass(frozen=True)
class _Published:
    tables: dict[str, PublishedTable]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """All published tables by name, such as table3 or masks_today."""
    return load_recipe(_Published, str(Path(__file__).with_name("published.yaml"))).tables


def beside(task: str) -> list[PublishedTable]:
    """The published tables that a report on a task shows: the paper's comparison of systems, and
    the results of recent systems.
    """
    names = {
        "segmentation": ("table4", "masks_today"),
        "captioning": ("table4", "captions_today"),
    }
    return [published_tables()[name] for name in names.get(task, ())]


def show_figure(figure: str, value: float) -> str:
    """A figure in the units of published.yaml, as papers print it."""
    return f"{value:.{_DECIMALS.get(figure, 1)}f}"
