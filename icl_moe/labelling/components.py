"""The connected parts of a mask."""

from collections.abc import Iterator

import numpy as np


def components(mask_HW: np.ndarray) -> Iterator[np.ndarray]:
    """The parts of a boolean mask whose pixels touch each other, at a side or at a corner, as
    boolean (H, W); the one whose first row lies highest comes first.

    Runs of marked pixels in neighbouring rows are joined with union-find.
    """
    rows, starts, stops = _runs(mask_HW)
    part_of = _joined(len(rows), _touching(rows, starts, stops, mask_HW.shape[1]))
    by_part = np.argsort(part_of, kind="stable")
    first_of_parts = np.flatnonzero(np.diff(part_of[by_part], prepend=-1))
    for runs in np.split(by_part, first_of_parts[1:]) if len(by_part) else ():
        part_HW = np.zeros(mask_HW.shape, dtype=bool)
        for run in runs:
            part_HW[rows[run], starts[run] : stops[run]] = True
        yield part_HW


def _runs(mask_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row, the first column and the column after the last of each run of marked pixels."""
    padded = np.pad(np.asarray(mask_HW, dtype=np.int8), ((0, 0), (1, 1)))
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]


def _touching(
    rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, width: int
) -> Iterator[tuple[int, int]]:
    """Pairs of runs in a row and in the next one that touch."""
    line = width + 2  # Longer than a row, so that runs of different rows stay apart.
    first = np.searchsorted(rows * line + stops, (rows + 1) * line + starts, side="left")
    last = np.searchsorted(rows * line + starts, (rows + 1) * line + stops, side="right")
    for run, (start, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for other in range(start, stop):
            yield run, other


def _joined(count: int, pairs: Iterator[tuple[int, int]]) -> np.ndarray:
    """For each of `count` runs the first run that it is joined with, directly or through others."""
    root = list(range(count))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = root[root[run]]
            run = root[run]
        return run

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return np.array([find(run) for run in range(count)], dtype=np.int64)
