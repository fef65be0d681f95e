"""The norm of each task's gradient in each part of the model, for the paper's comparison of
gradients between tasks (its figure 6).
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from icl_moe.data.schedule import Schedule
from icl_moe.files import write_whole
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.monitor import EventWriter, tolerate_unwritten
from icl_moe.training.partitions import HeldRange, ranges_to_write

_FILE = "gradients.csv"
_HEADS = ["step", "task", "part", "norm", "normalised"]


class GradientReport:
    """Writes, for the first step of each task in every `every` steps, one row for each part of the
    model to gradients.csv and the monitors.

    norm: the L2 norm ||G_i|| of the gradient of the part's parameters, averaged over the global
    batch, before clipping.
    normalised: ||G_i|| / ||G|| with G the gradient of all parameters, each expert once: what
    task-balanced AdamW works with, whatever the optimizer of this run. Their squares sum to 1 in
    each step, so tasks can be compared whose losses differ in size.

    start: the number of completed steps of the run.

    Parts are the embeddings, the last norm, and in each layer the attention, the feed-forward (gate
    and experts too) and their norms.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        schedule: Schedule,
        every: int | None,
        output: Path,
        start: int,
        samples_per_step: int,
        events: EventWriter,
    ) -> None:
        self._engine = engine
        self._schedule = schedule
        self._every = every
        self._path = output / _FILE
        self._samples_per_step = samples_per_step
        self._events = events
        if dist.get_rank() == 0 and self._path.is_file():
            self._keep_rows(start)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The context of the optimizer's part of step t (counted from 0). Every rank enters it; in
        a step that is due, the ranks reduce together.
        """
        if not self._is_due(step):
            yield
            return
        squares: dict[str, Tensor] = {}
        optimizer: torch.optim.Optimizer = self._engine.deepspeed.basic_optimizer
        ranges = ranges_to_write(self._engine.deepspeed)
        # At every ZeRO stage each master weight has its gradient only between the reduction of
        # gradients and the optimizer's step.
        hook = optimizer.register_step_pre_hook(lambda *_: _add_squares(ranges, squares))
        try:
            yield
        finally:
            hook.remove()
        self._report(step, _sum_over_ranks(squares, self._engine))

    def _is_due(self, step: int) -> bool:
        """A function of the step only, so that ranks agree and a resumed run behaves the same."""
        if self._every is None:
            return False
        first = step // self._every * self._every
        return all(
            self._schedule.task(earlier) != self._schedule.task(step)
            for earlier in range(first, step)
        )

    def _keep_rows(self, steps: int) -> None:
        """Drop the rows of steps after the first `steps`: an interrupted run wrote them, and this
        run takes these steps again.
        """
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line
            for line in lines[1:]
            if line.endswith("\n") and int(line.partition(",")[0]) <= steps
        ]
        write_whole(self._path, "".join([*lines[:1], *kept]))

    def _report(self, step: int, squares: dict[str, float]) -> None:
        total = sum(squares.values())
        if dist.get_rank() or not total or self._engine.norm is None:
            return  # A skipped step has no gradient.
        task = self._schedule.task(step)
        shares = {part: (value / total) ** 0.5 for part, value in squares.items()}
        rows = [
            [step + 1, task, part, f"{self._engine.norm * share:.6g}", f"{share:.6g}"]
            for part, share in shares.items()
        ]
        samples = (step + 1) * self._samples_per_step
        with tolerate_unwritten():
            self._write(rows)
            self._events.write_events(
                [
                    (f"train/{task}/gradient/{part}", share, samples)
                    for part, share in shares.items()
                ]
            )

    def _write(self, rows: list[list[object]]) -> None:
        with self._path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(_HEADS)
            writer.writerows(rows)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its exported name: layers.3.attention,
    token_embedding, and so on.
    """
    pieces = name.split(".")
    return ".".join(pieces[:3] if pieces[0] == "layers" else pieces[:1])


@torch.no_grad()
def _add_squares(ranges: list[HeldRange], squares: dict[str, Tensor]) -> None:
    """Add the squares of the gradients that the optimizer is about to read; ranges: what this rank
    holds and no other rank counts.

    DeepSpeed calls the optimizer group by group, and only that group's master weights have a
    gradient then.
    """
    for held in ranges:
        if held.master.grad is not None:
            square = held.of(held.master.grad).float().square().sum()
            part = part_of(held.name)
            squares[part] = squares[part] + square if part in squares else square


def _sum_over_ranks(squares: dict[str, Tensor], engine: TrainingEngine) -> dict[str, float]:
    """The sums over all ranks, by part of the model, in the model's order. Every rank calls it."""
    parts = list(dict.fromkeys(part_of(name) for name, _ in engine.model.named_parameters()))
    sums = torch.stack(
        [
            squares.get(part, torch.zeros((), device=engine.deepspeed.device)).float()
            for part in parts
        ]
    )
    dist.all_reduce(sums)
    return dict(zip(parts, sums.tolist(), strict=True))
