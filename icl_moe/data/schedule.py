"""Which task and which samples make the global batch of step t: a pure function of (seed, t, sample
counts, global batch size).

No rank waits for another one to choose, any number of ranks reads the same batches, and resuming
needs only the step number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from icl_moe.errors import InputError
from icl_moe.seeds import stable_seed

MIXED = "mixed"

_BLOCK = 4096  # Steps whose tasks are drawn together.


class Schedule:
    """The order of training.

    counts: samples of each task. sampling: `unmixed` draws one task for the whole global batch,
    with probability proportional to the square root of its count (the paper), or to `weights` if
    they are given, 0 for a task without one; `mixed` shuffles the samples of all tasks together
    (the baseline of its Table 3). Each task is shuffled again every epoch, and its place in the
    shuffle is the number of its earlier draws times the batch, so every sample comes once an epoch.

    Raises InputError if a task has fewer samples than a global batch, or if a weight is given for a
    task without samples.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        global_batch: int,
        seed: int,
        sampling: Literal["unmixed", "mixed"] = "unmixed",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        held = {task: counts[task] for task in sorted(counts) if counts[task]}
        for task in sorted(set(weights or ()) - set(held)):
            raise InputError(
                f"training.task_weights names {task}, of which data.shards has no samples; it has "
                f"{', '.join(held)}."
            )
        self.counts = held if weights is None else {task: held[task] for task in sorted(weights)}
        if not self.counts:
            raise InputError("data.shards holds no samples.")
        self.global_batch = global_batch
        self.seed = seed
        self.sampling = sampling
        self._pools = {MIXED: sum(self.counts.values())} if sampling == "mixed" else self.counts
        for task, count in self._pools.items():
            if count < global_batch:
                raise InputError(
                    f"data.shards has {count} {task} samples, fewer than training.global_batch "
                    f"({global_batch})."
                )
        shares = np.array(
            [weights[task] if weights else math.sqrt(count) for task, count in self._pools.items()],
            dtype=np.float64,
        )
        self.probabilities = dict(zip(self._pools, (shares / shares.sum()).tolist(), strict=True))
        self._draws_before: list[np.ndarray] = [np.zeros(len(self._pools), dtype=np.int64)]
        self._open_caches()

    def _open_caches(self) -> None:
        # The caches belong to this object; a decorated method would keep every Schedule alive.
        self._draws = lru_cache(maxsize=8)(self._draw_block)
        # One shuffle for each task, and two at the end of an epoch.
        self._shuffle = lru_cache(maxsize=len(self._pools) + 1)(self._draw_shuffle)

    def __getstate__(self) -> dict[str, Any]:
        # A reader that is not forked gets a pickled copy, and such a cache cannot be pickled.
        return {k: v for k, v in vars(self).items() if k not in ("_draws", "_shuffle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()

    def task(self, step: int) -> str:
        """The task of step t (counted from 0); "mixed" if tasks are mixed."""
        return list(self._pools)[self._draws(step // _BLOCK)[step % _BLOCK]]

    def samples(self, step: int) -> list[tuple[str, int]]:
        """(task, index within the task) of each sample of the global batch of step t, in order."""
        task = self.task(step)
        first = self._earlier_draws(task, step) * self.global_batch
        return [self._sample(task, place) for place in range(first, first + self.global_batch)]

    def _sample(self, pool: str, place: int) -> tuple[str, int]:
        epoch, offset = divmod(place, self._pools[pool])
        index = int(self._shuffle(pool, epoch)[offset])
        if pool != MIXED:
            return pool, index
        for task, count in self.counts.items():
            if index < count:
                return task, index
            index -= count
        raise AssertionError("the pool is the sum of the tasks")

    def _earlier_draws(self, task: str, step: int) -> int:
        block, offset = divmod(step, _BLOCK)
        number = list(self._pools).index(task)
        while len(self._draws_before) <= block:
            counts = np.bincount(
                self._draws(len(self._draws_before) - 1), minlength=len(self._pools)
            )
            self._draws_before.append(self._draws_before[-1] + counts)
        return int(
            self._draws_before[block][number]
            + np.count_nonzero(self._draws(block)[:offset] == number)
        )

    def _draw_block(self, block: int) -> np.ndarray:
        generator = np.random.Generator(
            np.random.Philox(stable_seed("task of a step", self.seed, block))
        )
        return generator.choice(len(self._pools), size=_BLOCK, p=list(self.probabilities.values()))

    def _draw_shuffle(self, pool: str, epoch: int) -> np.ndarray:
        generator = np.random.Generator(
            np.random.Philox(stable_seed("shuffle", self.seed, pool, epoch))
        )
        # So a reader holds only four bytes for each sample.
        return generator.permutation(self._pools[pool]).astype(np.uint32)


@dataclass(frozen=True)
class RankSlice:
    """Which part of each global batch this rank reads: `micro_batch` samples in each of
    `micro_steps` micro-steps.

    rank, ranks: among the data-parallel ranks; the tp_size neighbours of a tensor-parallel group
    share a slice and count as one. Micro-step m of rank r takes the samples from (m * ranks + r) *
    micro_batch on.
    """

    rank: int
    ranks: int
    micro_batch: int
    micro_steps: int

    @classmethod
    def of(
        cls, rank: int, world: int, global_batch: int, micro_batch: int, tp_size: int = 1
    ) -> "RankSlice":
        """The slice of rank `rank` among all `world`. Raises InputError if the global batch is not
        a whole number of micro-steps.
        """
        ranks = world // tp_size
        if global_batch % (micro_batch * ranks):
            raise InputError(
                f"training.global_batch ({global_batch}) must be a multiple of "
                "training.micro_batch x data-parallel ranks "
                f"({micro_batch} x {ranks})."
            )
        return cls(rank // tp_size, ranks, micro_batch, global_batch // (micro_batch * ranks))
