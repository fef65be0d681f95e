"""Progress of a run: one line every few steps, and the same figures for DeepSpeed's monitors."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from icl_moe.messages import note
from icl_moe.model.loss import DecoderLoss
from icl_moe.training.distributed import Place
from icl_moe.training.expert_table import Choice

# Per-task quantities, summed over micro-steps and ranks since the last progress line: parts of a
# DecoderLoss, which lie on the device, and counts that the host knows.
_LOSS_PARTS = ("image_sum", "image_weight", "text_sum", "text_weight", "auxiliary")
_COUNTS = ("micro_steps", "tokens", "flops")


class EventWriter(Protocol):
    """A receiver of figures: DeepSpeed's monitor, or anything with the same method."""

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
        """Write (name, value, samples seen) of each figure; called on rank 0."""
        ...


class ProgressMonitor:
    """Collects losses on the device and reads them, over all ranks, only when a line is due.

    Modality losses are means in nats per target over the steps since the last line. tokens/s counts
    real tokens, not padding, over all the time since the last line, evaluation and saving included.

    tasks: the schedule's tasks. peak_flops: the peak FLOP/s of all devices together, None if it is
    unknown (then there is no MFU). events: the receiver of figures, on rank 0, with [(name, value,
    samples seen)]. choices: returns the present experts of every stream. Every rank calls it at
    each line, which counts the sets of experts that have changed since the line before.
    """

    def __init__(
        self,
        start: int,
        steps: int,
        every: int,
        global_batch: int,
        tasks: Sequence[str],
        place: Place,
        peak_flops: float | None,
        events: EventWriter,
        choices: Callable[[], list[Choice]],
    ) -> None:
        self._steps = steps
        self._every = every
        self._global_batch = global_batch
        self._tasks = list(tasks)
        self._is_main = place.is_main
        self._peak_flops = peak_flops
        self._events = events
        self._choices = choices
        self._chosen: list[set[int]] = []
        self._losses_KS = torch.zeros(
            len(self._tasks), len(_LOSS_PARTS), dtype=torch.float64, device=place.device
        )
        self._counts_KS = torch.zeros(len(self._tasks), len(_COUNTS), dtype=torch.float64)
        self._step: list[Tensor] = []  # the losses of the present step's micro-steps
        self._norms: dict[str, list[float]] = {}
        self._since = time.monotonic()
        self._done = start
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=None if place.is_main else True,
            dynamic_ncols=True,
        )

    def add(self, task: str, loss: DecoderLoss, tokens: int, flops: int) -> None:
        """Count one micro-step; tokens, flops: of this rank's batch, 0 on a rank that shares it
        with one that counts them.
        """
        self._step.append(torch.stack([getattr(loss, name).double() for name in _LOSS_PARTS]))
        # Summed on the host, so that it does not wait for the device at every micro-step.
        self._counts_KS[self._tasks.index(task), 1:] += torch.tensor([tokens, flops])

    def step_done(self, step: int, task: str, norm: float | None, rate: float) -> None:
        """Count one optimizer step, the `step`-th (from 1), and print the line if it is due.

        norm: the norm of the gradient; None for a skipped step. The losses of a skipped step do not
        count, since they may not be finite. Its tokens do, since they took time to compute.
        """
        self._bar.update(1)
        row = self._tasks.index(task)
        if norm is not None:
            self._norms.setdefault(task, []).append(norm)
            self._losses_KS[row] += torch.stack(self._step).sum(dim=0)
            self._counts_KS[row, 0] += len(self._step)
        self._step.clear()
        if step % self._every and step != self._steps:
            return
        sums_KS = torch.cat([self._losses_KS, self._counts_KS.to(self._losses_KS.device)], dim=1)
        dist.all_reduce(sums_KS)
        changes = self._expert_changes()
        now = time.monotonic()
        if self._is_main:
            self._report(step, task, sums_KS, norm, rate, now - self._since, changes)
        self._losses_KS.zero_()
        self._counts_KS.zero_()
        self._norms.clear()
        self._since = now
        self._done = step

    def close(self) -> None:
        self._bar.close()

    def _expert_changes(self) -> int | None:
        """How many streams of all layers go to another set of experts than at the last line; None
        for the first line, and for a model without such experts.
        """
        chosen = [set(choice.experts) for choice in self._choices()]
        before, self._chosen = self._chosen, chosen
        if not before:
            return None
        return sum(old != new for old, new in zip(before, chosen, strict=True))

    def _report(
        self,
        step: int,
        task: str,
        sums_KS: Tensor,
        norm: float | None,
        rate: float,
        seconds: float,
        changes: int | None,
    ) -> None:
        steps, total = step - self._done, _named(sums_KS.sum(dim=0))
        figures = _losses(total) | {
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": total["tokens"] / seconds,
            "episodes_per_second": steps * self._global_batch / seconds,
            "model_flops_utilisation": total["flops"] / seconds / self._peak_flops
            if self._peak_flops
            else None,
            "expert_changes": changes,
        }
        parts = [f"step {step}/{self._steps}", task]
        parts += [
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in figures.items()
            if value is not None
        ]
        tqdm.write(
            "  ".join([*parts, f"ETA {_clock((self._steps - step) * seconds / max(steps, 1))}"])
        )
        by_task = {
            f"{name}/{key}": value
            for name, of_task in self._task_figures(sums_KS).items()
            for key, value in of_task.items()
        }
        samples = step * self._global_batch
        with tolerate_unwritten():
            self._events.write_events(
                [
                    (f"train/{name}", value, samples)
                    for name, value in (figures | by_task).items()
                    if value is not None
                ]
            )

    def _task_figures(self, sums_KS: Tensor) -> dict[str, dict[str, float | None]]:
        """The same losses of each task that had steps since the last line, and the mean of its
        gradient norms.
        """
        of_tasks = {name: _named(sums_S) for name, sums_S in zip(self._tasks, sums_KS, strict=True)}
        norms = {name: sum(norms) / len(norms) for name, norms in self._norms.items()}
        return {
            name: _losses(sums) | {"gradient_norm": norms.get(name)}
            for name, sums in of_tasks.items()
            if sums["micro_steps"]
        }


@contextmanager
def tolerate_unwritten() -> Iterator[None]:
    """Within this context figures for an operator are written; if they cannot be, that is reported
    and the run continues. A full disk must not end a run that may still be able to save later.
    """
    try:
        yield
    except OSError as error:
        note(f"warning: {error}; the run continues.")


def _named(sums_S: Tensor) -> dict[str, float]:
    return dict(zip(_LOSS_PARTS + _COUNTS, sums_S.tolist(), strict=True))


def _losses(sums: dict[str, float]) -> dict[str, float | None]:
    """The mean losses from sums over micro-steps; None if there were no targets."""
    return {
        "image_loss": sums["image_sum"] / sums["image_weight"] if sums["image_weight"] else None,
        "text_loss": sums["text_sum"] / sums["text_weight"] if sums["text_weight"] else None,
        "auxiliary_loss": sums["auxiliary"] / sums["micro_steps"] if sums["micro_steps"] else None,
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
