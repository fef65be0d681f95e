"""The trainer: recipe, shards, engine, steps, checkpoints."""

import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icl_moe.batch import TokenBatch
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.deepspeed_internals import silence_own_events, tensorboard_writer
from icl_moe.errors import InputError, UnsavedError
from icl_moe.files import write_whole
from icl_moe.launcher import launched_ranks
from icl_moe.messages import note
from icl_moe.model.loss import DecoderLoss
from icl_moe.optim.learning_rate import learning_rate
from icl_moe.recipe import TrainingRecipe
from icl_moe.seeds import stable_seed
from icl_moe.signals import stop_requested
from icl_moe.tables import as_markdown, as_text
from icl_moe.training import checkpoint
from icl_moe.training.codebook import read_codebook
from icl_moe.training.distributed import Place, process_group
from icl_moe.training.dry_run import dry_run
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.expert_table import Choice, choices_table, expert_choices
from icl_moe.training.faults import Watchdog, agreed_to_stop, any_rank
from icl_moe.training.gradients import GradientReport
from icl_moe.training.initial_model import InitialModel
from icl_moe.training.monitor import ProgressMonitor, tolerate_unwritten
from icl_moe.training.preflight import (
    make_schedule,
    open_checked,
    open_initial_model,
    open_validation,
)
from icl_moe.training.run_folder import alone_in, record_stretch, saved_steps
from icl_moe.training.throughput import peak_flops, real_tokens, training_flops
from icl_moe.training.validation import Validation


@dataclass
class TrainerState:
    """How far a run has come: completed optimizer steps, and how many of them were skipped because
    their loss or gradient was not finite.
    """

    step: int = 0
    skipped: int = 0


class Trainer:
    """A run of a recipe: `Trainer(recipe).fit()`.

    Under a launcher every rank creates one, and all call `fit` together; without a launcher, the
    process is the only rank. `state` says how far the run has come. The model, its checkpoints and
    figures are written into the recipe's training.output.

    Raises InputError, before any rank starts, for a recipe that cannot run (see
    `preflight.open_checked`).
    """

    def __init__(
        self, recipe: TrainingRecipe, checked: tuple[ShardSet, dict[str, Any]] | None = None
    ) -> None:
        """checked: the result of `preflight.open_checked`, if it was called before."""
        self.recipe = recipe
        self.shards, self.engine_config = checked or open_checked(recipe, launched_ranks())
        self.state = TrainerState()

    def fit(self) -> TrainerState:
        """Train until training.steps, or stop_after, resuming from the newest checkpoint in
        training.output if there is one. Returns the state at the end.

        A request to stop (SIGTERM, SIGINT) ends it after the current step, with a checkpoint.
        Raises UnsavedError if the run ends with steps that are in no checkpoint.
        """
        unsaved = None
        with process_group() as place:
            if agreed_to_stop(place):
                if place.is_main:
                    note("stopped by a signal before it began; the same command starts it")
            else:
                try:
                    self.fit_on(place)
                except UnsavedError as error:
                    unsaved = error  # All ranks end here together, so the group can be closed.
        if unsaved is not None:
            raise unsaved
        return self.state

    def fit_on(self, place: Place) -> TrainerState:
        """`fit` on ranks that are already connected."""
        training, output = self.recipe.training, Path(self.recipe.training.output)
        with alone_in(output, place), _repeatable(training.deterministic):
            run = self._resume(place, output)
            stop = min(training.steps, training.stop_after or training.steps)
            if self.state.step < stop:
                run.go_on(stop)
            elif place.is_main:
                note(
                    f"{training.output} is already at step {self.state.step} of {stop}; set "
                    "training.steps higher to continue"
                )
        return self.state

    def _resume(self, place: Place, output: Path) -> "_Run":
        """A run at the step of the newest checkpoint."""
        training = self.recipe.training
        part = RankSlice.of(
            place.rank,
            place.world,
            training.global_batch,
            training.micro_batch,
            self.recipe.parallel.tp_size,
        )
        initial = open_initial_model(self.recipe)
        if initial is None:
            is_from_codebook = self.recipe.model.codebook_init and not saved_steps(output)
        else:
            is_from_codebook = initial.is_refined_by(self.recipe.vocabulary)
        engine = TrainingEngine(
            self.recipe,
            self.shards.manifest,
            self.engine_config,
            part,
            place,
            read_codebook(self.shards) if is_from_codebook else None,
            initial,
            checkpoint.classes_so_far(output) if initial is None else initial.classes,
        )
        silence_own_events(engine.deepspeed)
        self.state.step = checkpoint.resume(engine.deepspeed, output)
        self.state.skipped = engine.deepspeed.skipped_steps
        if place.is_main:
            checkpoint.write_model_folder(output, engine.model.config, self.shards)
        return _Run(
            self.recipe,
            self.shards,
            self.engine_config,
            self.state,
            engine,
            make_schedule(self.recipe, self.shards.manifest),
            part,
            place,
            initial,
        )


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """If `wanted`, torch refuses, within this context, operations whose result may differ when they
    are run again.
    """
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if wanted:
        # cuBLAS is repeatable only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Otherwise it would fill DeepSpeed's buckets, which are gigabytes, in every step.
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@dataclass
class _Run:
    """The steps of a run. Every rank goes through it in the same way: before the ranks act on what
    one of them finds, all agree on it.
    """

    recipe: TrainingRecipe
    shards: ShardSet
    engine_config: dict[str, Any]
    state: TrainerState
    engine: TrainingEngine
    schedule: Schedule
    part: RankSlice
    place: Place
    initial: InitialModel | None
    monitor: ProgressMonitor = field(init=False)
    gradients: GradientReport = field(init=False)

    def go_on(self, stop: int) -> None:
        """Train from the step of the state to step `stop`."""
        self._record()
        self.monitor, self.gradients = self._monitors(stop)
        with (
            closing(self.monitor),
            closing(self._batches(stop)) as batches,
            Watchdog(self.place, self.recipe.training.hang_seconds) as watchdog,
        ):
            if self.recipe.training.dry_run:
                dry_run(self.engine, self.recipe, self.shards, self.place, watchdog)
            validation = self._validation(watchdog)
            watchdog.beat(self.state.step, "agreeing with the other ranks")
            if agreed_to_stop(self.place):
                self._note(
                    f"stopped by a signal before step {self.state.step + 1}; the same command "
                    "resumes it"
                )
                return
            self._steps(stop, batches, watchdog, validation)

    def _steps(
        self,
        stop: int,
        batches: Iterator[TokenBatch],
        watchdog: Watchdog,
        validation: Validation | None,
    ) -> None:
        training, saved = self.recipe.training, self.state.step
        for step in range(self.state.step, stop):
            stopping = self._step(step, batches, watchdog)
            completed = self.state.step = step + 1
            ending = stopping or completed == stop
            if ending or completed % training.save_every == 0:
                watchdog.beat(step, "saving a checkpoint")
                if self._save(completed):
                    saved = completed
                elif ending:
                    raise UnsavedError(self._lost(saved, completed))
            if stopping:
                self._note(
                    f"stopped by a signal after step {completed}; the same command resumes "
                    "from there"
                )
                break
            if validation is not None and completed % (training.evaluate_every or 1) == 0:
                validation.run(completed)

    def _record(self) -> None:
        """Record what this stretch of the run is computed with, and print notes for the
        operator.
        """
        optimizer, training = self.recipe.optimizer, self.recipe.training
        if self.place.is_main:
            record_stretch(
                Path(training.output),
                self.recipe,
                self.shards,
                self.engine_config,
                self.place,
                self.state.step,
                self.initial.record() if self.initial is not None else None,
            )
        if optimizer.warmup_steps > training.steps:
            self._note(
                f"optimizer.warmup_steps ({optimizer.warmup_steps}) is more than "
                f"training.steps ({training.steps}): the learning rate climbs to the end and does "
                "not reach optimizer.learning_rate"
            )

    def _monitors(self, stop: int) -> tuple[ProgressMonitor, GradientReport]:
        training = self.recipe.training
        peak = peak_flops(self.place.device, self.engine_config)
        events = self.engine.deepspeed.monitor
        progress = ProgressMonitor(
            self.state.step,
            stop,
            training.log_every,
            training.global_batch,
            list(self.schedule.probabilities),
            self.place,
            None if peak is None else peak * self.place.world,
            events,
            lambda: expert_choices(self.engine.model),
        )
        gradients = GradientReport(
            self.engine,
            self.schedule,
            training.gradient_report_every,
            Path(training.output),
            self.state.step,
            training.global_batch,
            events,
        )
        return progress, gradients

    def _batches(self, stop: int) -> Generator[TokenBatch, None, None]:
        dataset = MicroBatches.of_recipe(self.recipe, self.shards, self.schedule, self.part)
        workers = self.recipe.data.workers
        return micro_batches(dataset, self.part.micro_steps, self.state.step, stop, workers)

    def _validation(self, watchdog: Watchdog) -> Validation | None:
        if self.recipe.training.evaluate_every is None:
            return None
        return Validation(
            self.engine, self.recipe, open_validation(self.recipe), self.place, watchdog
        )

    def _step(self, step: int, batches: Iterator[TokenBatch], watchdog: Watchdog) -> bool:
        """Take one optimizer step; returns whether any rank was asked to stop."""
        training = self.recipe.training
        task = self.schedule.task(step)
        rate = learning_rate(self.recipe.optimizer, step, training.steps)
        self.engine.begin_step(rate, task, self.schedule.probabilities[task])
        sources, finite, stopping = [], [], False
        for micro_step in range(self.part.micro_steps):
            watchdog.beat(step, "reading a batch")
            batch = next(batches)
            watchdog.beat(step, "computing")
            torch.manual_seed(
                stable_seed("dropout", training.seed, step, micro_step, self.part.rank)
            )
            loss = self.engine.backward(batch, noise=(training.seed, step))
            self._count(task, loss, batch)
            sources.append(batch.sources)
            finite.append(loss.total.detach().isfinite())  # The host does not wait for it here.
            if micro_step + 1 < self.part.micro_steps:
                self.engine.step()
        watchdog.beat(step, "agreeing with the other ranks")
        finite_M = torch.stack(finite)
        not_finite, stopping = any_rank([~finite_M.all(), stop_requested()], self.place.device)
        if not_finite:
            self._name_sources(step, sources, finite_M)
        with self.gradients.step(step):
            moved = self.engine.step(skip=not_finite)
        self.state.skipped = self.engine.deepspeed.skipped_steps
        if not moved:
            self._skip(step, "loss is" if not_finite else "gradient is zero or")
        self.monitor.step_done(step + 1, task, self.engine.norm, rate)
        return stopping

    def _name_sources(self, step: int, sources: list[tuple[str, ...]], finite_M: Tensor) -> None:
        for of_batch, is_finite in zip(sources, finite_M.tolist(), strict=True):
            if not is_finite:
                note(
                    f"step {step + 1}: the loss is not finite on rank {self.place.rank} "
                    f"in {', '.join(of_batch)}"
                )

    def _count(self, task: str, loss: DecoderLoss, batch: TokenBatch) -> None:
        # Tensor ranks read the same tokens; the first of them counts them.
        counts = self.place.rank % self.recipe.parallel.tp_size == 0
        flops = training_flops(self.recipe.model, self.recipe.vocabulary.size, batch)
        self.monitor.add(task, loss, *((real_tokens(batch), flops) if counts else (0, 0)))

    def _save(self, completed: int) -> bool:
        """Save; returns whether there is a checkpoint of so many steps now."""
        output = Path(self.recipe.training.output)
        keep = self.recipe.training.keep_checkpoints
        if not checkpoint.save(self.engine.deepspeed, output, completed, keep):
            return False
        choices = expert_choices(self.engine.model)
        if choices and self.place.is_main:
            with tolerate_unwritten():
                self._write_experts(output, completed, choices)
        return True

    def _write_experts(self, output: Path, completed: int, choices: list[Choice]) -> None:
        table = choices_table(choices)
        write_whole(output / "experts.txt", f"after {completed} steps\n\n{as_text(table)}\n")
        tensorboard = tensorboard_writer(self.engine.deepspeed)
        if tensorboard is not None:
            tensorboard.add_text(
                "experts", as_markdown(table), completed * self.recipe.training.global_batch
            )

    def _lost(self, saved: int, completed: int) -> str:
        """A message about what is lost if a run ends after `completed` steps and the newest
        checkpoint is that of step `saved`.
        """
        lost = f"what it computed after step {saved}" if saved else "all that it computed"
        return (
            f"training.output: the run ended after step {completed}, of which no checkpoint could "
            f"be saved, for the reason above, so {lost} is lost; once "
            f"{self.recipe.training.output} can be written, the same command "
            f"{'resumes from there' if saved else 'starts from the beginning'}."
        )

    def _skip(self, step: int, what: str) -> None:
        skipped, limit = self.state.skipped, self.recipe.training.skipped_steps
        self._note(
            f"step {step + 1} is skipped, its {what} not finite ({skipped} of at most {limit})"
        )
        if skipped > limit:
            raise InputError(
                f"training.skipped_steps: {skipped} step(s) were skipped, the last of them step "
                f"{step + 1}, because their loss or gradient was not finite; "
                "look at the samples named above, or lower optimizer.learning_rate."
            )

    def _note(self, what: str) -> None:
        if self.place.is_main:
            note(what)
