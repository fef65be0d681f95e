"""A training run on ranks that are there already, as tests/distributed/rank_group.py keeps them:
nothing to launch or to import.
"""

import contextlib
import hashlib
import io
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_run import SETTINGS

from icl_moe.errors import InputError
from icl_moe.model.decoder import InContextDecoder
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.training import trainer
from icl_moe.training.faults import Watchdog
from icl_moe.training.partitions import held_ranges
from icl_moe.training.preflight import check


def load(shards: Path, output: Path, *settings: str) -> TrainingRecipe:
    return load_recipe(
        TrainingRecipe,
        "demo",
        [f"data.shards={shards}", f"training.output={output}", *SETTINGS, *settings],
    )


def run(
    ranks: Any,
    shards: Path,
    output: Path,
    settings: tuple[str, ...],
    episodes_that_fit: int | None = None,
) -> dict[str, str]:
    """Trains. What this rank printed, how it ended, a digest of the weights and optimizer state
    that it holds, and whether torch was told to be deterministic.

    episodes_that_fit: a forward pass of more of them runs out of memory, as on a GPU.
    """
    recipe = load(shards, output, *settings)
    printed, ended, engines, deterministic = io.StringIO(), "well", [], set()
    build, forward = trainer.TrainingEngine.__init__, InContextDecoder.forward

    def keep(engine: Any, *args: Any) -> None:
        build(engine, *args)
        engines.append(engine)

    def limited(decoder: InContextDecoder, batch: Any, noise: Any = None) -> Any:
        if episodes_that_fit is not None and len(batch.lengths) > episodes_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        deterministic.add(torch.are_deterministic_algorithms_enabled())
        return forward(decoder, batch, noise)

    with (
        mock.patch.object(trainer.TrainingEngine, "__init__", keep),
        mock.patch.object(InContextDecoder, "forward", limited),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            trainer.train_on(ranks, recipe, *check(recipe, ranks.world))
        except InputError as error:
            ended = str(error)
        except SystemExit as error:
            ended = f"exit code {error.code}"
    digest = _digest(engines[0])
    engines[0].deepspeed.destroy()
    return {
        "printed": printed.getvalue(),
        "ended": ended,
        "state": digest,
        "deterministic": str(deterministic),
    }


def _digest(engine: Any) -> str:
    digest = hashlib.sha256()
    for held in held_ranges(engine.deepspeed):
        state = engine.deepspeed.basic_optimizer.state[held.master]
        for value in (held.master, *(state[kind] for kind in sorted(state))):
            whole = held.of(value) if value.shape == held.master.shape else value
            digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


def beats_while_rank_0_works(ranks: Any, beats: int) -> int:
    """How often this rank beat while rank 0 did so `beats` times in its work."""
    watchdog = Watchdog(ranks, seconds=1000.0)
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
