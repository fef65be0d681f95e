"""The training loop: recipe, shards, engine, steps, checkpoints."""

import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
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
from icl_moe.files import write_whole
from icl_moe.model.loss import DecoderLoss
from icl_moe.optim.learning_rate import learning_rate
from icl_moe.recipe import TrainingRecipe
from icl_moe.seeds import stable_seed
from icl_moe.signals import stop_requested
from icl_moe.training import checkpoint
from icl_moe.training.distributed import Ranks, process_group
from icl_moe.training.dry_run import dry_run
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.expert_table import as_markdown, as_text, expert_choices
from icl_moe.training.faults import Watchdog, agreed_to_stop, any_rank
from icl_moe.training.gradients import GradientReport
from icl_moe.training.monitor import ProgressMonitor
from icl_moe.training.preflight import make_schedule, open_validation
from icl_moe.training.run_folder import alone_in, record_stretch
from icl_moe.training.throughput import peak_flops, real_tokens, training_flops
from icl_moe.training.validation import Validation


def train(recipe: TrainingRecipe, shards: ShardSet, engine_config: dict[str, Any]) -> None:
    """Train until training.steps, or stop_after, resuming from the newest checkpoint in
    training.output where there is one.

    shards, engine_config: what `preflight.check` gave for the recipe and the number of ranks.
    """
    with process_group() as ranks:
        if agreed_to_stop(ranks):
            if ranks.is_main:
                _say("stopped by a signal before it began; the same command starts it")
        else:
            train_on(ranks, recipe, shards, engine_config)


def train_on(
    ranks: Ranks, recipe: TrainingRecipe, shards: ShardSet, engine_config: dict[str, Any]
) -> None:
    """`train` on ranks that have met already."""
    settings = recipe.training
    output = Path(settings.output)
    with alone_in(output, ranks), _repeatable(settings.deterministic):
        part = RankSlice.of(
            ranks.rank,
            ranks.world,
            settings.global_batch,
            settings.micro_batch,
            recipe.parallel.tp_size,
        )
        schedule = make_schedule(recipe, shards.manifest)
        engine = TrainingEngine(recipe, shards.manifest, engine_config, part, ranks)
        # It would write the learning rate at every step; the monitor here does, at its lines.
        engine.deepspeed.monitor.enabled = False
        start = checkpoint.resume(engine.deepspeed, output)
        if ranks.is_main:
            checkpoint.write_model_folder(output, engine.model.config, shards)
        stop = min(settings.steps, settings.stop_after or settings.steps)
        if start >= stop:
            if ranks.is_main:
                _say(
                    f"{settings.output} is already at step {start} of {stop}; set training.steps "
                    "higher to go on"
                )
            return
        if ranks.is_main:
            record_stretch(output, recipe, shards, engine_config, ranks, start)
        write_events = engine.deepspeed.monitor.write_events
        peak = peak_flops(ranks.device, engine_config)
        all_peaks = None if peak is None else peak * ranks.world
        monitor = ProgressMonitor(
            start,
            stop,
            settings.log_every,
            settings.global_batch,
            list(schedule.probabilities),
            ranks,
            all_peaks,
            write_events,
        )
        gradients = GradientReport(
            engine,
            schedule,
            settings.gradient_report_every,
            output,
            start,
            settings.global_batch,
            write_events,
        )
        _Loop(engine, recipe, shards, schedule, part, ranks, monitor, gradients).run(start, stop)
        monitor.close()


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Within it, where wanted, torch refuses operations that may give other bits when they are run
    again.
    """
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS repeats itself only with a workspace of fixed size.
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = (
            False  # It would fill DeepSpeed's buckets, gigabytes, in every step.
        )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@dataclass
class _Loop:
    """The steps of a run. Every rank walks through it in the same way: what one rank finds, all
    agree on before they act.
    """

    engine: TrainingEngine
    recipe: TrainingRecipe
    shards: ShardSet
    schedule: Schedule
    part: RankSlice
    ranks: Ranks
    monitor: ProgressMonitor
    gradients: GradientReport
    skipped: int = 0

    def run(self, start: int, stop: int) -> None:
        settings = self.recipe.training
        dataset = MicroBatches(
            self.shards,
            self.schedule,
            self.part,
            self.recipe.data.layout,
            settings.input_loss_weight,
        )
        reading = micro_batches(
            dataset, self.part.micro_steps, start, stop, self.recipe.data.workers
        )
        with closing(reading) as batches, Watchdog(self.ranks, settings.hang_seconds) as watchdog:
            if settings.dry_run:
                dry_run(self.engine, self.recipe, self.shards, self.ranks, watchdog)
            validation = self._validation(watchdog)
            watchdog.beat(start, "agreeing with the other ranks")
            if agreed_to_stop(self.ranks):
                self._say(f"stopped by a signal before step {start + 1}; the same command goes on")
                return
            for step in range(start, stop):
                stopping = self._step(step, batches, watchdog)
                completed = step + 1
                if completed % settings.save_every == 0 or completed == stop or stopping:
                    watchdog.beat(step, "saving a checkpoint")
                    self._save(completed)
                if stopping:
                    self._say(
                        f"stopped by a signal after step {completed}; the same command goes on "
                        "from there"
                    )
                    break
                if validation is not None and completed % (settings.evaluate_every or 1) == 0:
                    validation.run(completed)

    def _validation(self, watchdog: Watchdog) -> Validation | None:
        if self.recipe.training.evaluate_every is None:
            return None
        return Validation(
            self.engine, self.recipe, open_validation(self.recipe), self.ranks, watchdog
        )

    def _step(self, step: int, batches: Iterator[TokenBatch], watchdog: Watchdog) -> bool:
        """One optimizer step; whether any rank was asked to stop."""
        settings = self.recipe.training
        task = self.schedule.task(step)
        rate = learning_rate(self.recipe.optimizer, step, settings.steps)
        self.engine.begin_step(rate, task, self.schedule.probabilities[task])
        not_finite = stopping = False
        for micro_step in range(self.part.micro_steps):
            watchdog.beat(step, "reading a batch")
            batch = next(batches)
            watchdog.beat(step, "computing")
            torch.manual_seed(
                stable_seed("dropout", settings.seed, step, micro_step, self.part.rank)
            )
            loss = self.engine.backward(batch, noise=(settings.seed, step))
            if not math.isfinite(loss.total.item()):
                not_finite = True
                tqdm.write(
                    f"icl-moe: step {step + 1}: the loss is not finite on rank {self.ranks.rank} "
                    f"in {', '.join(batch.sources)}"
                )
            is_last = micro_step + 1 == self.part.micro_steps
            if is_last:
                watchdog.beat(step, "agreeing with the other ranks")
                not_finite, stopping = any_rank([not_finite, stop_requested()], self.ranks.device)
            with self.gradients.step(step) if is_last else nullcontext():
                self.engine.step(skip=not_finite)
            self._count(task, loss, batch)
        if not_finite:
            self._skip(step)
            self.monitor.forget()
        self.monitor.step_done(step + 1, task, None if not_finite else self.engine.norm, rate)
        return stopping

    def _count(self, task: str, loss: DecoderLoss, batch: TokenBatch) -> None:
        # Tensor ranks read the same tokens; the first of them counts them.
        counts = self.ranks.rank % self.recipe.parallel.tp_size == 0
        flops = training_flops(self.recipe.model, self.recipe.vocabulary.size, batch)
        self.monitor.add(task, loss, *((real_tokens(batch), flops) if counts else (0, 0)))

    def _save(self, completed: int) -> None:
        output = Path(self.recipe.training.output)
        checkpoint.save(
            self.engine.deepspeed, output, completed, self.recipe.training.keep_checkpoints
        )
        choices = expert_choices(self.engine.model)
        if choices and self.ranks.is_main:
            write_whole(output / "experts.txt", f"after {completed} steps\n\n{as_text(choices)}")
            tensorboard = self.engine.deepspeed.monitor.tb_monitor
            if tensorboard is not None:
                tensorboard.summary_writer.add_text(
                    "experts", as_markdown(choices), completed * self.recipe.training.global_batch
                )

    def _skip(self, step: int) -> None:
        self.skipped += 1
        self._say(
            f"step {step + 1} is left out ({self.skipped} of at most "
            f"{self.recipe.training.skipped_steps})"
        )
        if self.skipped > self.recipe.training.skipped_steps:
            raise InputError(
                f"training.skipped_steps: the loss was not finite in {self.skipped} steps, the "
                f"last of them step {step + 1}; "
                "look at the samples named above, or lower optimizer.learning_rate."
            )

    def _say(self, what: str) -> None:
        if self.ranks.is_main:
            _say(what)


def _say(what: str) -> None:
    tqdm.write(f"icl-moe: {what}")
