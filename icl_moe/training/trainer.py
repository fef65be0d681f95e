"""The training loop: recipe, shards, engine, steps, checkpoints."""

import json
from pathlib import Path

import torch

from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.optim.learning_rate import learning_rate
from icl_moe.recipe import TrainingRecipe, to_dict
from icl_moe.seeds import stable_seed
from icl_moe.training import checkpoint
from icl_moe.training.distributed import Ranks, process_group
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.monitor import ProgressMonitor
from icl_moe.training.preflight import check


def train(recipe: TrainingRecipe) -> None:
    """Train until training.steps, or stop_after, resuming from the newest checkpoint in training.output where there is one."""
    with process_group() as ranks:
        shards, engine_config = check(recipe, ranks.world)
        settings = recipe.training
        part = RankSlice.of(ranks.rank, ranks.world, settings.global_batch, settings.micro_batch)
        schedule = Schedule(shards.manifest.samples, settings.global_batch, settings.seed, settings.sampling)
        dataset = MicroBatches(shards, schedule, part, recipe.data.layout, settings.input_loss_weight)
        engine = TrainingEngine(recipe, shards.manifest, engine_config, part, ranks)
        output = Path(settings.output)
        start = checkpoint.resume(engine.deepspeed, output)
        if ranks.is_main:
            checkpoint.write_model_folder(output, engine.model.config, shards)
            (output / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n", encoding="utf-8")
        stop = min(settings.steps, settings.stop_after or settings.steps)
        _run_steps(engine, recipe, dataset, schedule, part, ranks, start, stop)


def _run_steps(
    engine: TrainingEngine,
    recipe: TrainingRecipe,
    dataset: MicroBatches,
    schedule: Schedule,
    part: RankSlice,
    ranks: Ranks,
    start: int,
    stop: int,
) -> None:
    settings = recipe.training
    monitor = ProgressMonitor(
        start, stop, settings.log_every, settings.global_batch, ranks.is_main, ranks.device, engine.deepspeed.monitor.write_events
    )
    batches = micro_batches(dataset, part.micro_steps, start, stop, recipe.data.workers)
    for step in range(start, stop):
        task = schedule.task(step)
        rate = learning_rate(recipe.optimizer, step, settings.steps)
        engine.begin_step(rate, schedule.probabilities[task])
        for micro_step in range(part.micro_steps):
            batch = next(batches)
            torch.manual_seed(stable_seed("dropout", settings.seed, step, micro_step, ranks.rank))
            loss = engine.micro_step(batch, noise=(settings.seed, step))
            monitor.add(loss, tokens=len(batch.tokens_T) if batch.real_T is None else int(batch.real_T.sum()))
        monitor.step_done(step + 1, task, engine.norm, rate)
        if (step + 1) % settings.save_every == 0 or step + 1 == stop:
            checkpoint.save(engine.deepspeed, Path(settings.output), step + 1, settings.keep_checkpoints)
    monitor.close()
