"""What an operator sees: one progress line every few steps, and the same figures to DeepSpeed's
monitors.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from icl_moe.model.loss import DecoderLoss
from icl_moe.training.distributed import Ranks

# What is summed over micro-steps and ranks between two lines, of each task; the first five are
# parts of a DecoderLoss.
_SUMS = (
    "image_sum",
    "image_weight",
    "text_sum",
    "text_weight",
    "auxiliary",
    "micro_steps",
    "tokens",
    "flops",
)
_LOSS_PARTS = _SUMS[:5]


class ProgressMonitor:
    """Collects losses on the device and reads them, over all ranks, only when a line is due.

    Modality losses are means in nats a target over the steps since the last line. tokens/s counts
    real tokens, not padding, over all the time since the last line, evaluation and saving included.

    tasks: of the schedule. peak_flops: what all devices together could do in a second, None where
    that is not known (then there is no MFU). write_events: the engine's monitor, called on rank 0
    with [(name, value, samples seen)].
    """

    def __init__(
        self,
        start: int,
        steps: int,
        every: int,
        global_batch: int,
        tasks: Sequence[str],
        ranks: Ranks,
        peak_flops: float | None,
        write_events: Callable[[list], None],
    ) -> None:
        self._steps = steps
        self._every = every
        self._global_batch = global_batch
        self._tasks = list(tasks)
        self._is_main = ranks.is_main
        self._peak_flops = peak_flops
        self._write_events = write_events
        self._sums_KS = torch.zeros(
            len(self._tasks), len(_SUMS), dtype=torch.float64, device=ranks.device
        )
        self._norms: dict[str, list[float]] = {}
        self._since = time.monotonic()
        self._done = start
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=None if ranks.is_main else True,
            dynamic_ncols=True,
        )

    def add(self, task: str, loss: DecoderLoss, tokens: int, flops: int) -> None:
        """Count one micro-step; tokens, flops: of this rank's batch, 0 on a rank that shares it
        with one that counts them.
        """
        values = [getattr(loss, name).double() for name in _LOSS_PARTS]
        self._sums_KS[self._tasks.index(task)] += torch.stack(
            [*values, *values[0].new_tensor([1.0, tokens, flops])]
        )

    def forget(self) -> None:
        """Drop what was counted since the last line: a loss that is not finite would spoil its
        means.
        """
        self._sums_KS.zero_()
        self._norms.clear()

    def step_done(self, step: int, task: str, norm: float | None, rate: float) -> None:
        """Count one optimizer step, the `step`-th (from 1), and print the line where it is due."""
        self._bar.update(1)
        if norm is not None:
            self._norms.setdefault(task, []).append(norm)
        if step % self._every and step != self._steps:
            return
        sums_KS = self._sums_KS.clone()
        dist.all_reduce(sums_KS)
        now = time.monotonic()
        if self._is_main:
            self._report(step, task, sums_KS, norm, rate, seconds=now - self._since)
        self.forget()
        self._since = now
        self._done = step

    def close(self) -> None:
        self._bar.close()

    def _report(
        self, step: int, task: str, sums_KS: Tensor, norm: float | None, rate: float, seconds: float
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
        self._write_events(
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


def _named(sums_S: Tensor) -> dict[str, float]:
    return dict(zip(_SUMS, sums_S.tolist(), strict=True))


def _losses(sums: dict[str, float]) -> dict[str, float | None]:
    """The mean losses that sums over micro-steps make; None where there were no targets."""
    return {
        "image_loss": sums["image_sum"] / sums["image_weight"] if sums["image_weight"] else None,
        "text_loss": sums["text_sum"] / sums["text_weight"] if sums["text_weight"] else None,
        "auxiliary_loss": sums["auxiliary"] / sums["micro_steps"] if sums["micro_steps"] else None,
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
