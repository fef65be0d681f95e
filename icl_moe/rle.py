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
    runs: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        group = 0x20
        while group & 0x20:
            group = text[position] - 48
            if not 0 <= group < 64 or shift > 60:  # Decoding longer numbers would take too long.
                raise ValueError("not run lengths")
            value |= (group & 0x1F) << shift
            shift += 5
            position += 1
        if group & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    if any(run < 0 for run in runs):
        raise ValueError("a run length is negative")
    return runs
