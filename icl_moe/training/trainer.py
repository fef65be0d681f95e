"""The training loop: recipe, shards, engine, steps, checkpoints."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import Manifest
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.moe import exported_name, sparse_layer_factory
from icl_moe.optim import gradient_norm
from icl_moe.optim.learning_rate import learning_rate
from icl_moe.optim.parameter_groups import parameter_groups
from icl_moe.recipe import TrainingRecipe, to_dict
from icl_moe.seeds import stable_seed
from icl_moe.training import checkpoint
from icl_moe.training.distributed import Ranks, process_group
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
        engine = build_engine(recipe, shards.manifest, engine_config, part, ranks)
        output = Path(settings.output)
        start = checkpoint.resume(engine, output)
        if ranks.is_main:
            checkpoint.write_model_folder(output, engine.module.config, shards)
            (output / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n", encoding="utf-8")
        stop = min(settings.steps, settings.stop_after or settings.steps)
        _run_steps(engine, recipe, dataset, schedule, part, ranks, start, stop)


def build_engine(recipe: TrainingRecipe, manifest: Manifest, engine_config: dict[str, Any], part: RankSlice, ranks: Ranks) -> Any:
    """The DeepSpeed engine around a freshly initialised decoder."""
    config = DecoderConfig.from_recipe(
        recipe,
        format=to_dict(manifest.format),
        image_size=manifest.image_size,
        examples=manifest.examples,
        image_tokenizer=manifest.image_tokenizer,
    )
    model = InContextDecoder(config, sparse_layer_factory(recipe.parallel.ep_size), recipe.training.auxiliary_loss_weight)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    ep_size = recipe.parallel.ep_size
    # DeepSpeed spreads a layer's experts over ep_size consecutive ranks.
    first_expert = ranks.rank % ep_size * (recipe.model.experts // ep_size)
    initialise(model, recipe.training.seed, partial(exported_name, first_expert=first_expert))
    optimizer_settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optimizer_settings.weight_decay),
        lr=optimizer_settings.learning_rate,
        betas=(optimizer_settings.betas[0], optimizer_settings.betas[1]),
        eps=optimizer_settings.epsilon,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # A line a rank and layer group about process groups being made.
        engine, *_ = deepspeed.initialize(
            model=nn.Module.to(model, ranks.device),
            optimizer=optimizer,
            config=_engine_config(recipe, engine_config, part),
            dist_init_required=False,
        )
    return engine


def step_engine(engine: Any, clip: float | None) -> float | None:
    """`engine.step()` after a micro-step's backward; at the last one of a step, the global gradient norm (before clipping)."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)
    norm = None
    if engine.is_gradient_accumulation_boundary():
        norm = gradient_norm.global_norm(engine.module)
        if clip is not None:
            gradient_norm.clip(engine.module, norm, clip)
    engine.step()
    return None if norm is None else float(norm)


def _run_steps(
    engine: Any, recipe: TrainingRecipe, dataset: MicroBatches, schedule: Schedule, part: RankSlice, ranks: Ranks, start: int, stop: int
) -> None:
    settings = recipe.training
    monitor = ProgressMonitor(
        start, stop, settings.log_every, settings.global_batch, ranks.is_main, ranks.device, engine.monitor.write_events
    )
    batches = micro_batches(dataset, part.micro_steps, start, stop, recipe.data.workers)
    engine.train()
    for step in range(start, stop):
        rate = learning_rate(recipe.optimizer, step, settings.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        for micro_step in range(part.micro_steps):
            batch = next(batches)
            torch.manual_seed(stable_seed("dropout", settings.seed, step, micro_step, ranks.rank))
            loss = engine(batch.to(ranks.device), noise=(settings.seed, step))
            engine.backward(loss.total)
            norm = step_engine(engine, recipe.optimizer.clip)
            monitor.add(loss, tokens=len(batch.tokens_T) if batch.real_T is None else int(batch.real_T.sum()))
        monitor.step_done(step + 1, schedule.task(step), norm, rate)
        if (step + 1) % settings.save_every == 0 or step + 1 == stop:
            checkpoint.save(engine, Path(settings.output), step + 1, settings.keep_checkpoints)
    monitor.close()


def _engine_config(recipe: TrainingRecipe, engine_config: dict[str, Any], part: RankSlice) -> dict[str, Any]:
    stage = engine_config.get("zero_optimization", {}).get("stage", 0)
    bf16 = engine_config.get("bf16", {}).get("enabled", False)
    config = {
        **engine_config,
        "train_batch_size": recipe.training.global_batch,
        "train_micro_batch_size_per_gpu": recipe.training.micro_batch,
        "gradient_accumulation_steps": part.micro_steps,
        # At ZeRO stage 0 in fp32 we clip ourselves, see optim/gradient_norm.py.
        "gradient_clipping": (recipe.optimizer.clip or 0.0) if stage or bf16 else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for section in ("tensorboard", "csv_monitor"):
        if section in config:
            config[section] = {"output_path": recipe.training.output, "job_name": section, **config[section]}
    return config
