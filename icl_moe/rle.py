"""COCO's run-length encoding (RLE) of masks, with pycocotools and the checks that it lacks.

An RLE is {"size": [height, width], "counts": ...}; its counts are text or bytes in COCO's
compressed form: alternating runs of 0 and 1, column by column.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from icl_moe.errors import InputError


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """The RLE of a boolean mask, with counts as text."""
    from pycocotools import mask as tools

    rle = tools.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": list(mask_HW.shape), "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The boolean mask (H, W) of an RLE.

    Raises InputError if the run lengths do not cover H x W pixels exactly; pycocotools would return
    uninitialised memory.
    """
    from pycocotools import mask as tools

    height, width = rle["size"]
    try:
        covered = sum(run_lengths(rle["counts"]))
    except (IndexError, TypeError, ValueError):
        covered = -1
    if covered != height * width:
        raise InputError(f"run lengths do not cover the {height} x {width} pixels of their mask.")
    return tools.decode(dict(rle)).astype(bool)


def run_lengths(counts: str | bytes) -> list[int]:
    """Decode COCO's compressed run lengths: numbers of 5-bit groups, low group first; from the
    third number on, the difference to the number before the previous one (pycocotools' maskApi.c,
    rleFrString).

    Raises IndexError, TypeError or ValueError if the input does not have this form.
    """
    if not isinstance(counts, str | bytes):
        raise TypeError("run lengths are text")
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    groups_G = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups_G):
        return []
    if groups_G.min() < 0 or groups_G.max() >= 64:
        raise ValueError("not run lengths")
    last_N = np.flatnonzero(groups_G & 0x20 == 0)  # Of each number.
    if not len(last_N) or last_N[-1] != len(groups_G) - 1:
        raise IndexError("the last number is not complete")
    first_N = np.concatenate([[0], last_N[:-1] + 1])
    lengths_N = last_N - first_N + 1
    if lengths_N.max() > _MOST_GROUPS:
        raise ValueError("not run lengths")
    shifts_G = 5 * (np.arange(len(groups_G)) - np.repeat(first_N, lengths_N))
    runs_N = np.add.reduceat((groups_G & 0x1F) << shifts_G, first_N)
    runs_N -= np.where(groups_G[last_N] & 0x10, 1 << (5 * lengths_N), 0)
    for start in (1, 2):
        runs_N[start::2] = np.cumsum(runs_N[start::2])
    if runs_N.min() < 0:
        raise ValueError("a run length is negative")
    runs: list[int] = runs_N.tolist()
    return runs


_MOST_GROUPS = 8
"""Of a number, which then is under 2^40: more than the pixels of any mask, and a sum of them cannot
overflow.
"""
