"""The training loop: recipe, shards, engine, steps, checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from icl_moe.data.batch import TokenBatch
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.optim.learning_rate import learning_rate
from icl_moe.recipe import TrainingRecipe
from icl_moe.seeds import stable_seed
from icl_moe.training import checkpoint
from icl_moe.training.distributed import Ranks, process_group
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.faults import StopSignal, Watchdog, any_rank
from icl_moe.training.monitor import ProgressMonitor, write_run_description


def train(recipe: TrainingRecipe, shards: ShardSet, engine_config: dict[str, Any]) -> None:
    """Train until training.steps, or stop_after, resuming from the newest checkpoint in training.output where there is one.

    shards, engine_config: what `preflight.check` gave for the recipe and the number of ranks.
    """
    with process_group() as ranks:
        settings = recipe.training
        part = RankSlice.of(ranks.rank, ranks.world, settings.global_batch, settings.micro_batch)
        schedule = Schedule(shards.manifest.samples, settings.global_batch, settings.seed, settings.sampling)
        dataset = MicroBatches(shards, schedule, part, recipe.data.layout, settings.input_loss_weight)
        engine = TrainingEngine(recipe, shards.manifest, engine_config, part, ranks)
        output = Path(settings.output)
        start = checkpoint.resume(engine.deepspeed, output)
        if ranks.is_main:
            checkpoint.write_model_folder(output, engine.model.config, shards)
            write_run_description(output, recipe, shards.folder, engine_config, ranks)
        stop = min(settings.steps, settings.stop_after or settings.steps)
        _Loop(engine, recipe, dataset, schedule, part, ranks).run(start, stop)


@dataclass
class _Loop:
    """The steps of a run. Every rank walks through it in the same way: what one rank finds, all agree on before they act."""

    engine: TrainingEngine
    recipe: TrainingRecipe
    dataset: MicroBatches
    schedule: Schedule
    part: RankSlice
    ranks: Ranks
    skipped: int = 0

    def run(self, start: int, stop: int) -> None:
        settings = self.recipe.training
        if start >= stop:
            self._say(f"{settings.output} is already at step {start} of {stop}; set training.steps higher to go on")
            return
        write_events = self.engine.deepspeed.monitor.write_events
        monitor = ProgressMonitor(
            start, stop, settings.log_every, settings.global_batch, self.ranks.is_main, self.ranks.device, write_events
        )
        batches = micro_batches(self.dataset, self.part.micro_steps, start, stop, self.recipe.data.workers)
        with StopSignal() as signal, Watchdog(self.ranks, settings.hang_seconds) as watchdog:
            for step in range(start, stop):
                stopping = self._step(step, batches, monitor, signal, watchdog)
                if (step + 1) % settings.save_every == 0 or step + 1 == stop or stopping:
                    watchdog.beat(step, "saving a checkpoint")
                    checkpoint.save(self.engine.deepspeed, Path(settings.output), step + 1, settings.keep_checkpoints)
                if stopping:
                    self._say(f"stopped by a signal after step {step + 1}; the same command goes on from there")
                    break
        monitor.close()

    def _step(self, step: int, batches: Iterator[TokenBatch], monitor: ProgressMonitor, signal: StopSignal, watchdog: Watchdog) -> bool:
        """One optimizer step; whether any rank was asked to stop."""
        settings = self.recipe.training
        task = self.schedule.task(step)
        rate = learning_rate(self.recipe.optimizer, step, settings.steps)
        self.engine.begin_step(rate, self.schedule.probabilities[task])
        not_finite = stopping = False
        for micro_step in range(self.part.micro_steps):
            watchdog.beat(step, "reading a batch")
            batch = next(batches)
            watchdog.beat(step, "computing")
            torch.manual_seed(stable_seed("dropout", settings.seed, step, micro_step, self.ranks.rank))
            loss = self.engine.backward(batch, noise=(settings.seed, step))
            if not math.isfinite(loss.total.item()):
                not_finite = True
                tqdm.write(f"icl-moe: step {step + 1}: the loss is not finite on rank {self.ranks.rank} in {', '.join(batch.sources)}")
            if micro_step + 1 == self.part.micro_steps:
                watchdog.beat(step, "agreeing with the other ranks")
                not_finite, stopping = any_rank([not_finite, signal.requested], self.ranks.device)
            self.engine.step(skip=not_finite)
            monitor.add(loss, tokens=len(batch.tokens_T) if batch.real_T is None else int(batch.real_T.sum()))
        if not_finite:
            self._skip(step)
            monitor.forget()
        monitor.step_done(step + 1, task, self.engine.norm, rate)
        return stopping

    def _skip(self, step: int) -> None:
        self.skipped += 1
        self._say(f"step {step + 1} is left out ({self.skipped} of at most {self.recipe.training.skipped_steps})")
        if self.skipped > self.recipe.training.skipped_steps:
            raise InputError(
                f"training.skipped_steps: the loss was not finite in {self.skipped} steps, the last of them step {step + 1}; "
                "look at the samples named above, or lower optimizer.learning_rate."
            )

    def _say(self, what: str) -> None:
        if self.ranks.is_main:
            tqdm.write(f"icl-moe: {what}")
