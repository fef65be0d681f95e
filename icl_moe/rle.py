"""COCO's run-length encoding (RLE) of masks, as pycocotools has it, with the checks that it lacks.

An RLE is {"size": [height, width], "counts": ...}; its counts are alternating runs of 0 and 1,
column by column: text or bytes in COCO's compressed form, or in its uncompressed form a list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_moe.errors import InputError, shown


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """The RLE of a boolean mask, with counts as text, equal to that of pycocotools."""
    return {"size": list(mask_HW.shape), "counts": _compress(count_runs(mask_HW))}


def coco_annotation(
    rle: Mapping[str, Any], box: Sequence[int], area: int, score: float | None, **ids: int
) -> dict[str, Any]:
    """The record of a mask in a file of COCO's instances. box: left, top, width, height in pixels.
    area: of the mask, in pixels. ids: `id`, `image_id` and `category_id`.
    """
    found = {"segmentation": dict(rle), "area": area, "bbox": list(box), "iscrowd": 0}
    return {**ids, **found, **({} if score is None else {"score": round(score, 4)})}


def encode_counts(mask_HW: np.ndarray) -> bytes:
    """The counts of `encode_rle`."""
    return _compress(count_runs(mask_HW)).encode("ascii")


def count_runs(mask_HW: np.ndarray) -> np.ndarray:
    """The lengths (int64) of alternating runs of 0 and 1, column by column, as COCO's uncompressed
    form has them: the first run is one of 0, even if it is empty.
    """
    flat = np.asarray(mask_HW, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []
    return np.diff(np.concatenate([[0], first, edges, [flat.size]]).astype(np.int64))


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The boolean mask (H, W) of an RLE.

    Raises InputError if the counts are no run lengths, or if these do not cover H x W pixels
    exactly; pycocotools would return uninitialised memory.
    """
    height, width = rle["size"]
    try:
        runs = _runs(rle["counts"])
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"counts must be run lengths, COCO's compressed text or a list of whole numbers, not "
            f"{shown(rle['counts'])}."
        ) from error
    if (covered := sum(runs)) != height * width:
        raise InputError(
            f"run lengths do not cover the {height} x {width} pixels of their mask: they are of "
            f"{covered} pixels."
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(counts: Any) -> list[int]:
    """Run lengths in either form; raises as `run_lengths` does."""
    if not isinstance(counts, list):
        return run_lengths(counts)
    if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts):
        raise ValueError("not run lengths")
    return counts


def _compress(runs: np.ndarray) -> str:
    """The inverse of `run_lengths` (pycocotools' maskApi.c, rleToString)."""
    values = runs.copy()
    values[3:] -= runs[1:-2]
    characters = []  # One row for each 5-bit group of the numbers; 0 after a number's last group.
    going = np.ones(len(values), dtype=bool)
    while going.any():
        groups, values = values & 0x1F, values >> 5
        more = going & np.where(groups & 0x10, values != -1, values != 0)
        characters.append(np.where(going, (groups | more * 0x20) + 48, 0))
        going = more
    text = np.stack(characters, axis=1).astype(np.uint8).ravel()
    return text[text > 0].tobytes().decode("ascii")


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
    last_N = np.flatnonzero(groups_G & 0x20 == 0)  # The last group of each number.
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
"""The most groups of a number. The number is then less than 2^40, which is more than the pixels of
any mask, and sums of such numbers cannot overflow.
"""
