"""The dry run: the largest batches are computed first, so that one that is too large for the memory
of the device is detected in the first minute.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icl_moe.batch import TokenBatch, collate
from icl_moe.data.schedule import MIXED
from icl_moe.data.shards import ShardSet
from icl_moe.deepspeed_internals import counters, set_counters
from icl_moe.errors import RankError
from icl_moe.recipe import TrainingRecipe
from icl_moe.training.distributed import Place, generators_kept, is_first
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.faults import Watchdog
from icl_moe.training.partitions import held_ranges

_NO_STEP = -1


def dry_run(
    engine: TrainingEngine,
    recipe: TrainingRecipe,
    shards: ShardSet,
    place: Place,
    watchdog: Watchdog,
) -> None:
    """Compute one step on the largest batch of every task, the same on every rank, without changing
    any weights.

    The run that follows is bit for bit the same as without it. Raises RankError, with a micro-batch
    that would fit, if the memory of the device does not suffice; the first rank that finds this
    reports it, and the others end without a message.
    """
    size = recipe.training.micro_batch
    for task, members in _pools(recipe, shards).items():
        watchdog.beat(_NO_STEP, f"trying the largest {task} batch")
        if not _fits(partial(_whole_step, engine), _largest(recipe, shards, members, size), engine):
            advice = _advice(engine, recipe, shards, members)
            if not is_first(f"dry run of {recipe.training.output}"):
                raise SystemExit(2)
            raise RankError(
                f"training.micro_batch: {size} of the longest {task} episodes do not fit into the "
                f"memory of {_device(place)} "
                f"(rank {place.rank}); {advice}."
            )


def _pools(recipe: TrainingRecipe, shards: ShardSet) -> dict[str, list[str]]:
    """The tasks whose samples share a batch, by the name of such a batch."""
    tasks = recipe.training.tasks_of(shards.manifest.samples)
    return (
        {MIXED: tasks} if recipe.training.sampling == "mixed" else {task: [task] for task in tasks}
    )


def _largest(
    recipe: TrainingRecipe, shards: ShardSet, tasks: Sequence[str], size: int
) -> TokenBatch:
    """The `size` longest samples of some tasks as one batch."""
    candidates = []
    for task in tasks:
        lengths = shards.lengths(task)
        candidates += [
            (int(lengths[index]), task, int(index))
            for index in np.argsort(-lengths, kind="stable")[:size]
        ]
    longest = sorted(candidates, reverse=True)[:size]
    sequences = [shards.sample(task, index).sequence for _, task, index in longest]
    training = recipe.training
    return collate(
        sequences,
        shards.manifest.format.vocabulary,
        tasks[0],
        recipe.data.layout,
        training.input_loss_weight,
        loss_on=training.loss_on,
    )


def _fits(compute: Any, batch: TokenBatch, engine: TrainingEngine) -> bool:
    """Whether the memory suffices to compute a batch in addition to what the optimizer will hold
    from its first step on.
    """
    try:
        room = _coming_state(engine)
        with generators_kept(engine.deepspeed.device):
            # Tensor ranks must drop out alike: tokens' routes would differ otherwise, and with them
            # what the ranks send each other.
            torch.manual_seed(0)
            compute(batch)
        del room
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    # Only here is the exception freed, which held the tensors of all its frames.
    if not fitted:
        for parameter in engine.model.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return fitted


def _coming_state(engine: TrainingEngine) -> list[Tensor]:
    """Tensors that need as much memory as the two moments of AdamW, if these do not exist yet."""
    state = engine.deepspeed.basic_optimizer.state
    masters = {id(held.master): held.master for held in held_ranges(engine.deepspeed)}
    return [
        torch.empty(2, *master.shape, dtype=master.dtype, device=master.device)
        for master in masters.values()
        if not state.get(master)
    ]


def _whole_step(engine: TrainingEngine, batch: TokenBatch) -> None:
    """Everything that a step does except changing the weights; with accumulation, its last two
    micro-steps, since gradients are held between them.
    """
    deepspeed = engine.deepspeed
    before = counters(deepspeed)
    micro_steps = min(2, deepspeed.gradient_accumulation_steps())
    set_counters(deepspeed, micro_steps=deepspeed.gradient_accumulation_steps() - micro_steps)
    for _ in range(micro_steps):
        engine.backward(batch, noise=(0, _NO_STEP))
        engine.step(skip=True)
    set_counters(deepspeed, **before)


def _advice(
    engine: TrainingEngine, recipe: TrainingRecipe, shards: ShardSet, tasks: Sequence[str]
) -> str:
    """A sentence that says what to change. If this rank can compute alone, the advised size was
    tried; if ranks compute together, half of the size is advised without a trial.
    """
    compute = partial(_gradients, engine)
    alone = engine.computes_alone
    fitting = (
        size
        for size in _smaller(recipe)
        if not alone or _fits(compute, _largest(recipe, shards, tasks, size), engine)
    )
    size = next(fitting, None)
    if size is None:
        return (
            "no smaller one does: set training.activation_checkpointing=true, or engine to a file "
            "with a higher ZeRO stage"
        )
    return f"set training.micro_batch={size}{', which was tried and fits' if alone else ''}"


def _smaller(recipe: TrainingRecipe) -> list[int]:
    """Smaller micro-batches, each at most half of the one before, that also divide the global
    batch.
    """
    sizes, size = [], recipe.training.micro_batch
    while size > 1:
        size = max(
            divisor
            for divisor in range(1, size // 2 + 1)
            if recipe.training.micro_batch % divisor == 0
        )
        sizes.append(size)
    return sizes


def _gradients(engine: TrainingEngine, batch: TokenBatch) -> None:
    """Forward and backward on this rank alone: `autograd.grad` does not trigger the hooks with
    which DeepSpeed reduces gradients.
    """
    loss = engine.model(batch.to(engine.deepspeed.device), noise=(0, _NO_STEP))
    torch.autograd.grad(
        loss.total,
        [parameter for parameter in engine.model.parameters() if parameter.requires_grad],
        allow_unused=True,
    )


def _device(place: Place) -> str:
    if place.device.type != "cuda":
        return "this machine"
    properties = torch.cuda.get_device_properties(place.device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
