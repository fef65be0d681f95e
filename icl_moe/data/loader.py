"""Micro-batches of one rank, in the schedule's order."""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from icl_moe.data.batch import Layout, TokenBatch, collate
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet


class MicroBatches(Dataset[TokenBatch]):
    """Item i is micro-step i % micro_steps of step i // micro_steps."""

    def __init__(self, shards: ShardSet, schedule: Schedule, part: RankSlice, layout: Layout, input_weight: float) -> None:
        self._shards = shards
        self._schedule = schedule
        self._part = part
        self._layout = layout
        self._input_weight = input_weight

    def __getitem__(self, index: int) -> TokenBatch:
        step, micro_step = divmod(index, self._part.micro_steps)
        samples = self._schedule.samples(step)
        first = (micro_step * self._part.ranks + self._part.rank) * self._part.micro_batch
        mine = [self._shards.sample(task, i) for task, i in samples[first : first + self._part.micro_batch]]
        # The engine averages over ranks and micro-steps; this makes that the mean over all targets of the global batch.
        scale = self._part.ranks * self._part.micro_steps / max(self._total_weight(samples), 1.0)
        vocabulary = self._shards.manifest.format.vocabulary
        sequences, sources = [sample.sequence for sample in mine], [f"{sample.shard}:{sample.key}" for sample in mine]
        return collate(sequences, vocabulary, self._schedule.task(step), self._layout, self._input_weight, scale, sources)

    def _total_weight(self, samples: list[tuple[str, int]]) -> float:
        """Sum of the loss weights over the global batch, read from the index: no rank needs to ask another."""
        total = 0.0
        for task in {task for task, _ in samples}:
            inputs, outputs = self._shards.target_counts(task)[np.array([i for t, i in samples if t == task])].sum(axis=0)
            total += self._input_weight * float(inputs) + float(outputs)
        return total


def micro_batches(dataset: MicroBatches, micro_steps: int, start: int, stop: int, workers: int) -> Iterator[TokenBatch]:
    """The micro-batches of steps start..stop-1 in order; `workers` processes read ahead, 0 reads in this one."""
    order = range(start * micro_steps, stop * micro_steps)
    options: dict[str, Any] = dict(num_workers=workers, prefetch_factor=4 if workers else None, worker_init_fn=_outlive_a_signal)
    return iter(DataLoader(dataset, batch_size=None, sampler=order, **options))


def _outlive_a_signal(_: int) -> None:
    """A cluster may signal every process of a job: a reader goes on for a minute, in which the ranks end their step and save."""

    def end_later(*_: object) -> None:
        signal.alarm(60)

    signal.signal(signal.SIGTERM, end_later)
    signal.signal(signal.SIGINT, end_later)
