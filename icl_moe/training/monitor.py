"""What an operator sees: one progress line every few steps, and the same figures to DeepSpeed's monitors."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from icl_moe.data.shards import MANIFEST_FILE
from icl_moe.model.loss import DecoderLoss
from icl_moe.recipe import TrainingRecipe, to_dict
from icl_moe.training.distributed import Ranks

_PACKAGES = ("icl-moe", "torch", "deepspeed", "transformers", "webdataset", "numpy")

# What is summed over micro-steps and ranks between two lines.
_SUMS = ("image_sum", "image_weight", "text_sum", "text_weight", "auxiliary")


class ProgressMonitor:
    """Collects losses on the device and reads them, over all ranks, only when a line is due.

    Modality losses are means in nats a target over the steps since the last line. tokens/s counts real tokens, not padding.
    write_events: the engine's monitor, called on rank 0 with [(name, value, samples seen)].
    """

    def __init__(
        self,
        start: int,
        steps: int,
        every: int,
        global_batch: int,
        is_main: bool,
        device: torch.device,
        write_events: Callable[[list], None],
    ) -> None:
        self._steps = steps
        self._every = every
        self._global_batch = global_batch
        self._is_main = is_main
        self._write_events = write_events
        self._sums = torch.zeros(len(_SUMS) + 2, dtype=torch.float64, device=device)
        self._since = time.monotonic()
        self._done = start
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None if is_main else True, dynamic_ncols=True)

    def add(self, loss: DecoderLoss, tokens: int) -> None:
        """Count one micro-step."""
        values = [getattr(loss, name).double() for name in _SUMS]
        self._sums += torch.stack([*values, values[0].new_tensor(1.0), values[0].new_tensor(float(tokens))])

    def forget(self) -> None:
        """Drop what was counted since the last line: a loss that is not finite would spoil its means."""
        self._sums.zero_()

    def step_done(self, step: int, task: str, norm: float | None, rate: float) -> None:
        """Count one optimizer step, the `step`-th (from 1), and print the line where it is due."""
        self._bar.update(1)
        if step % self._every and step != self._steps:
            return
        sums = self._sums.clone()
        dist.all_reduce(sums)
        self._sums.zero_()
        now = time.monotonic()
        if self._is_main:
            self._report(step, task, sums, norm, rate, seconds=now - self._since)
        self._since = now
        self._done = step

    def close(self) -> None:
        self._bar.close()

    def _report(self, step: int, task: str, sums: Tensor, norm: float | None, rate: float, seconds: float) -> None:
        image_sum, image_weight, text_sum, text_weight, auxiliary, micro_steps, tokens = sums.tolist()
        figures = {
            "image_loss": image_sum / image_weight if image_weight else None,
            "text_loss": text_sum / text_weight if text_weight else None,
            "auxiliary_loss": auxiliary / micro_steps if micro_steps else None,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
        }
        remaining = (self._steps - step) * seconds / max(step - self._done, 1)
        parts = [f"step {step}/{self._steps}", task]
        parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items() if value is not None]
        tqdm.write("  ".join([*parts, f"ETA {_clock(remaining)}"]))
        events = [(f"train/{name}", value, step * self._global_batch) for name, value in figures.items() if value is not None]
        self._write_events(events)


def write_run_description(output: Path, recipe: TrainingRecipe, shards: Path, engine_config: dict[str, Any], ranks: Ranks) -> None:
    """Write run.json: all that decides what this run computes, and what it ran on."""
    description = {
        "recipe": to_dict(recipe),
        "engine": engine_config,
        "shards": {"folder": str(shards.resolve()), "manifest_sha256": sha256((shards / MANIFEST_FILE).read_bytes()).hexdigest()},
        "revision": _git_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "ranks": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or platform.machine(),
    }
    (output / "run.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _git_revision() -> str | None:
    """The commit that this code is at, with a + where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
