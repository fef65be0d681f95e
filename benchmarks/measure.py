"""Tools of all benchmarks: timing in turns, peak memory of a separate process, and goals for
ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A figure and its bound: at least `bound`, or at most `bound`."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def in_turns(*functions: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Median seconds of each function, measured in turns so that changes of the machine's speed
    affect all of them.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(warm_up + repeats):
        for function, mine in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            if repeat >= warm_up:
                mine.append(time.perf_counter() - started)
    return [statistics.median(mine) for mine in times]


def run_apart(arguments: Sequence[str]) -> tuple[str, float]:
    """Run this Python with `arguments`. Returns the last line of its standard output, and its peak
    memory in MiB.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} failed.")
    return output.strip().splitlines()[-1], usage.ru_maxrss / 1024


def report(figures: dict[str, Any], goals: Sequence[Goal], file: Path | None) -> None:
    """Print figures and goals as tables, list missed goals, and write everything to `file` as JSON,
    if given.
    """
    print("\n| figure | value |\n|---|---|")
    for name, value in figures.items():
        print(
            f"| {name} | {value:,.4g} |"
            if isinstance(value, int | float)
            else f"| {name} | {value} |"
        )
    print("\n| ratio | measured | goal | |\n|---|---|---|---|")
    for goal in goals:
        print(
            f"| {goal.name} | {goal.value:.4g} | {'<=' if goal.at_most else '>='} {goal.bound:g} | "
            f"{'met' if goal.met else 'MISSED'} |"
        )
    missed = [goal.name for goal in goals if not goal.met]
    print(
        f"\n{len(missed)} of {len(goals)} goals missed{': ' + '; '.join(missed) if missed else ''}"
    )
    if file is not None:
        content = {
            "figures": figures,
            "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
        }
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
