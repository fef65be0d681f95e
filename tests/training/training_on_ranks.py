"""A training run on ranks that are already running (see tests/distributed/rank_group.py), without
launching or importing anything.
"""

import contextlib
import hashlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_run import SETTINGS

from icl_moe.errors import InputError, UnsavedError
from icl_moe.model.decoder import InContextDecoder
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.signals import listening, meeting
from icl_moe.training import trainer
from icl_moe.training.faults import Watchdog
from icl_moe.training.partitions import held_ranges
from icl_moe.training.preflight import open_checked

Fault = Callable[[Any, Any, int, int], None]
"""A fault, applied to (engine, batch, step, rank); steps are counted from 1."""


def load(shards: Path, output: Path, *settings: str) -> TrainingRecipe:
    return load_recipe(
        TrainingRecipe,
        "demo",
        [f"data.shards={shards}", f"training.output={output}", *SETTINGS, *settings],
    )


def on_two_ranks(
    rank_group: Any, shards: Path, plain: tuple[str, ...]
) -> Callable[..., list[dict[str, str]]]:
    """A function that trains with the settings `plain` and its own arguments, and returns the
    result of `run` on each rank.
    """

    def train(output: Path, *settings: str, fault: Fault | None = None) -> list[dict[str, str]]:
        return rank_group(2).run(run, shards, output, (*plain, *settings), None, fault)

    return train


def run(
    place: Any,
    shards: Path,
    output: Path,
    settings: tuple[str, ...],
    episodes_that_fit: int | None = None,
    fault: Fault | None = None,
) -> dict[str, str]:
    """Train. Returns this rank's output, how it ended, a digest of its weights and optimizer state,
    and whether torch was set to be deterministic.

    episodes_that_fit: a forward pass with more episodes runs out of memory, as on a GPU.
    fault: called before each micro-step of training.
    """
    recipe = load(shards, output, *settings)
    printed, errors, ended, engines, deterministic = io.StringIO(), io.StringIO(), "well", [], set()
    build, forward = trainer.TrainingEngine.__init__, InContextDecoder.forward
    backward = trainer.TrainingEngine.backward

    def keep(engine: Any, *args: Any) -> None:
        build(engine, *args)
        engines.append(engine)

    def limited(decoder: InContextDecoder, batch: Any, noise: Any = None) -> Any:
        if episodes_that_fit is not None and len(batch.lengths) > episodes_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        deterministic.add(torch.are_deterministic_algorithms_enabled())
        return forward(decoder, batch, noise)

    def disturbed(engine: Any, batch: Any, noise: Any) -> Any:
        if fault is not None:
            fault(engine, batch, noise[1] + 1, place.rank)
        return backward(engine, batch, noise)

    with (
        mock.patch.object(trainer.TrainingEngine, "__init__", keep),
        mock.patch.object(trainer.TrainingEngine, "backward", disturbed),
        mock.patch.object(InContextDecoder, "forward", limited),
        _heeding_signals(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        try:
            trainer.Trainer(recipe, open_checked(recipe, place.world)).fit_on(place)
        except (InputError, UnsavedError) as error:
            ended = str(error)
        except SystemExit as error:
            ended = f"exit code {error.code}"
    digest = _digest(engines[0])
    engines[0].deepspeed.destroy()
    return {
        "printed": printed.getvalue(),
        "said": errors.getvalue(),
        "ended": ended,
        "state": digest,
        "deterministic": str(deterministic),
    }


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    """Handle signals as a rank's program does once the ranks are connected."""
    with listening():
        with meeting():
            pass
        yield


def _digest(engine: Any) -> str:
    digest = hashlib.sha256()
    for held in held_ranges(engine.deepspeed):
        state = engine.deepspeed.basic_optimizer.state[held.master]
        for value in (held.master, *(state[kind] for kind in sorted(state))):
            whole = held.of(value) if value.shape == held.master.shape else value
            digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


def beats_while_rank_0_works(place: Any, beats: int) -> int:
    """The number of heartbeats of this rank while rank 0 makes `beats` of them during its work."""
    watchdog = Watchdog(place, seconds=1000.0)
    counted = []

    def work() -> None:
        for _ in range(beats):
            time.sleep(1)
            watchdog.beat(1, "working")
        time.sleep(1)

    with mock.patch.object(
        watchdog, "beat", lambda *args: (counted.append(args), Watchdog.beat(watchdog, *args))
    ):
        watchdog.on_main(1, "working", work)
    return len(counted)


def terminated(at: int, engine: Any, batch: Any, step: int, rank: int) -> None:
    """Rank 1 gets one request to stop, in step `at`."""
    if (step, rank) == (at, 1) and engine.deepspeed.is_gradient_accumulation_boundary():
        os.kill(os.getpid(), signal.SIGTERM)


def loss_spoilt(at: int, engine: Any, batch: Any, step: int, rank: int) -> None:
    """Rank 1's losses of step `at` are not finite."""
    if (step, rank) == (at, 1):
        batch.weights_P.fill_(float("nan"))


def gradient_spoilt(at: int, engine: Any, batch: Any, step: int, rank: int) -> None:
    """Rank 1's losses of step `at` are finite, but not the gradient of one parameter."""
    if step == at and rank == 1:
        parameter = engine.model.position_embedding.weight

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            hook.remove()
            return gradient * float("inf")

        hook = parameter.register_hook(spoil)


def disk_filled(at: int, file: Path, engine: Any, batch: Any, step: int, rank: int) -> None:
    """From step `at` on, the disk of `file` is full."""
    if (step, rank) == (at, 0) and not file.exists():
        with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
