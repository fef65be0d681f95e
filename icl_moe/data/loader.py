"""Micro-batches of one rank, in the schedule's order."""

import multiprocessing
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, Self

from torch.utils.data import DataLoader, Dataset

from icl_moe.batch import Layout, TokenBatch, collate
from icl_moe.data.corruption import hide_query_mask
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.errors import SampleError
from icl_moe.recipe import TrainingRecipe
from icl_moe.sequence import InputLoss, LossOn
from icl_moe.signals import STOPPING, obey_parent_alone


class MicroBatches(Dataset[TokenBatch]):
    """Item i is micro-step i % micro_steps of step i // micro_steps.

    layout, input_weight, input_loss, loss_on, mask_corruption: as in the recipe's sections `data`
    and `training`. With input_loss=mean the loss of a global batch with N_in targets in inputs and
    N_out in outputs is mean_out + w_in mean_in, that is, a target in an input weighs
    w_in N_out / N_in.
    """

    def __init__(
        self,
        shards: ShardSet,
        schedule: Schedule,
        part: RankSlice,
        layout: Layout,
        input_weight: float,
        loss_on: LossOn = "all",
        mask_corruption: bool = False,
        input_loss: InputLoss = "tokens",
    ) -> None:
        self._shards = shards
        self._schedule = schedule
        self._part = part
        self._layout = layout
        self._input_weight = input_weight
        self._loss_on = loss_on
        self._mask_corruption = mask_corruption
        self._input_loss = input_loss
        self._listed: tuple[int, _GlobalBatch] | None = None

    @classmethod
    def of_recipe(
        cls, recipe: TrainingRecipe, shards: ShardSet, schedule: Schedule, part: RankSlice
    ) -> Self:
        """The micro-batches of a run of this recipe."""
        training = recipe.training
        return cls(
            shards,
            schedule,
            part,
            recipe.data.layout,
            training.input_loss_weight,
            training.loss_on,
            training.mask_corruption,
            training.input_loss,
        )

    def __getitem__(self, index: int) -> TokenBatch:
        step, micro_step = divmod(index, self._part.micro_steps)
        samples, input_weight, total_weight = self._global_batch(step)
        first = (micro_step * self._part.ranks + self._part.rank) * self._part.micro_batch
        mine = [
            self._shards.sample(task, i)
            for task, i in samples[first : first + self._part.micro_batch]
        ]
        # The engine averages over ranks and micro-steps; this makes that the mean over all targets
        # of the global batch.
        scale = self._part.ranks * self._part.micro_steps / max(total_weight, 1.0)
        vocabulary = self._shards.manifest.format.vocabulary
        sequences, sources = (
            [sample.sequence for sample in mine],
            [f"{sample.shard}:{sample.key}" for sample in mine],
        )
        if self._mask_corruption:
            sequences = [
                hide_query_mask(sequence, vocabulary, self._schedule.seed, step, first + i)
                for i, sequence in enumerate(sequences)
            ]
        return collate(
            sequences,
            vocabulary,
            self._schedule.task(step),
            self._layout,
            input_weight,
            scale,
            sources,
            self._loss_on,
        )

    def _global_batch(self, step: int) -> "_GlobalBatch":
        """The global batch of a step; kept for the micro-steps that follow."""
        if self._listed is None or self._listed[0] != step:
            samples = self._schedule.samples(step)
            self._listed = (step, _GlobalBatch(samples, *self._weights(samples)))
        return self._listed[1]

    def _weights(self, samples: list[tuple[str, int]]) -> tuple[float, float]:
        """The weight of a target in an input, and by what the sum over the global batch is divided.
        The counts of targets are read from the index, so that ranks need not communicate.
        """
        inputs, outputs = sum(
            self._shards.target_counts(
                task, [i for t, i in samples if t == task], self._loss_on
            ).sum(axis=0)
            for task in sorted({task for task, _ in samples})
        ).tolist()
        if self._input_loss == "mean":
            return self._input_weight * outputs / max(inputs, 1), outputs
        return self._input_weight, self._input_weight * inputs + outputs


class _GlobalBatch(NamedTuple):
    """A global batch. samples: (task, index) of each sample. input_weight: the weight of each
    target in an input; targets in outputs have the weight 1. total_weight: what the weighted sum is
    divided by.
    """

    samples: list[tuple[str, int]]
    input_weight: float
    total_weight: float


def micro_batches(
    dataset: MicroBatches, micro_steps: int, start: int, stop: int, workers: int
) -> Generator[TokenBatch]:
    """The micro-batches of steps start..stop-1 in order; `workers` processes read ahead; with 0,
    this process reads. Closing the generator ends them.

    Raises SampleError when it reaches a sample that cannot be read.
    """
    order = range(start * micro_steps, stop * micro_steps)
    options: dict[str, Any] = dict(
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_obey_the_rank,
    )
    # The readers start now, before the first batch is requested.
    with _signals_held_back():
        return _raise_errors(
            iter(DataLoader(_ErrorsAsItems(dataset), batch_size=None, sampler=order, **options))
        )


class _ErrorsAsItems(Dataset["TokenBatch | SampleError"]):
    """Returns a SampleError as an item: if it left a worker as an exception, its message would be
    the traceback of the worker.
    """

    def __init__(self, dataset: MicroBatches) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> TokenBatch | SampleError:
        try:
            return self._dataset[index]
        except SampleError as error:
            return error


def _raise_errors(items: Iterator[TokenBatch | SampleError]) -> Generator[TokenBatch]:
    try:
        for item in items:
            if isinstance(item, SampleError):
                raise item
            yield item
    finally:
        # The readers end when their iterator is freed, and the traceback of an error keeps this
        # frame.
        del items


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that are started within this context receive no signal to stop until they unblock
    it: a signal to the whole job would otherwise end a reader before it can handle it, or end the
    process that starts readers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        if multiprocessing.get_start_method() != "fork":
            # Starting this helper unblocks the signals, so it must be running already.
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_rank(_: int) -> None:
    """A cluster may signal every process of a job, but a reader continues until its rank ends
    it.
    """
    obey_parent_alone()
