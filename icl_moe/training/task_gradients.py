"""The gradients of a run's tasks at one of its checkpoints: how large each is in each part of the
model, and whether they point the same way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, count, islice, product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from icl_moe.batch import TokenBatch
from icl_moe.data.loader import MicroBatches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.devices import Device, find_device
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.recipe import TrainingRecipe
from icl_moe.training import training_state
from icl_moe.training.gradients import part_of
from icl_moe.training.preflight import make_schedule

WHOLE = "all parameters"
"""The name of the whole model among the parts."""

GROUPS = 4

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class TaskGradients:
    """The gradients of the tasks in a checkpoint after `step` steps, and how far they agree.

    The batches of each task are `GROUPS` groups. norms: task -> part -> L2 norm of the mean
    gradient over all its batches. within: task -> part -> the mean cosine of the gradients of two
    of its groups, over all pairs. between: two tasks -> part -> the mean cosine of a group of the
    one and a group of the other, over all pairs. A part that a task's gradient does not reach has
    no cosine.
    """

    step: int
    episodes: int
    norms: Mapping[str, Mapping[str, float]]
    within: Mapping[str, Mapping[str, float]]
    between: Mapping[tuple[str, str], Mapping[str, float]]


def task_gradients(
    recipe: TrainingRecipe, checkpoint: Path, batches: int = 16, device: Device | None = None
) -> TaskGradients:
    """The gradients at the weights of a checkpoint's folder, of the next `batches` global batches
    (a multiple of `GROUPS`) of each task that training would take after it, without dropout and
    without noise of gates.

    The loss is that of training without the auxiliary loss of gates: that is no task's, hardly
    depends on the batch, and would make any two gradients of a gate agree. The recipe's schedule
    must draw one task a step (training.sampling=unmixed).
    """
    config = DecoderConfig.from_pretrained(checkpoint.parent.parent / "model")
    weights, step = training_state.read_weights(checkpoint, config)
    decoder = InContextDecoder(config, auxiliary_weight=0.0).eval()
    decoder.load_state_dict(weights)
    decoder.float().to(find_device(device))
    shards = ShardSet(recipe.data.shards)
    schedule = make_schedule(recipe, shards.manifest)
    groups = {
        task: _groups(decoder, recipe, shards, schedule, task, step, batches)
        for task in schedule.probabilities
    }
    means = {task: _mean(of_task) for task, of_task in groups.items()}
    return TaskGradients(
        step,
        batches * recipe.training.global_batch,
        {task: _norms(mean) for task, mean in means.items()},
        {task: _cosines(list(combinations(of_task, 2))) for task, of_task in groups.items()},
        {(a, b): _cosines(list(product(groups[a], groups[b]))) for a, b in combinations(groups, 2)},
    )


def _groups(
    decoder: InContextDecoder,
    recipe: TrainingRecipe,
    shards: ShardSet,
    schedule: Schedule,
    task: str,
    start: int,
    batches: int,
) -> list[Gradient]:
    """The mean gradient of each group of a task's next batches, which are dealt out in turns."""
    training = recipe.training
    part = RankSlice.of(0, 1, training.global_batch, training.micro_batch)
    dataset = MicroBatches.of_recipe(recipe, shards, schedule, part)
    steps = list(islice((t for t in count(start) if schedule.task(t) == task), batches))
    return [
        _gradient(decoder, _micro_batches(dataset, steps[group::GROUPS], part.micro_steps, task))
        for group in range(GROUPS)
    ]


def _micro_batches(
    dataset: MicroBatches, steps: list[int], micro_steps: int, task: str
) -> Iterator[TokenBatch]:
    for step in tqdm(steps, f"gradients of {task}", unit="batch", leave=False):
        for micro_step in range(micro_steps):
            yield dataset[step * micro_steps + micro_step]


def _gradient(decoder: InContextDecoder, batches: Iterator[TokenBatch]) -> Gradient:
    """The mean gradient over micro-batches, by parameter, on the host."""
    decoder.zero_grad(set_to_none=True)
    number = 0
    for batch in batches:
        decoder(batch.to(decoder.device)).total.backward()
        number += 1
    return {
        name: parameter.grad.cpu() / number
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }


def _mean(gradients: list[Gradient]) -> Gradient:
    names = dict.fromkeys(name for gradient in gradients for name in gradient)
    return {
        name: torch.stack([g[name] for g in gradients if name in g]).sum(dim=0) / len(gradients)
        for name in names
    }


def _norms(gradient: Gradient) -> dict[str, float]:
    return {part: square**0.5 for part, square in _products(gradient, gradient).items()}


def _cosines(pairs: list[tuple[Gradient, Gradient]]) -> dict[str, float]:
    """Part -> the mean cosine of the pairs; parts that one of them does not reach are left out."""
    found: dict[str, list[float]] = {}
    for a, b in pairs:
        lengths = _norms(a), _norms(b)
        for part, dot in _products(a, b).items():
            length = lengths[0].get(part, 0.0) * lengths[1].get(part, 0.0)
            if length:
                found.setdefault(part, []).append(dot / length)
    return {part: sum(values) / len(values) for part, values in found.items()}


def _products(a: Gradient, b: Gradient) -> dict[str, float]:
    """The inner product in each part of the model and in the whole."""
    found: dict[str, float] = {}
    for name in a:
        if name in b:
            dot = float((a[name].double() * b[name].double()).sum())
            for part in (part_of(name), WHOLE):
                found[part] = found.get(part, 0.0) + dot
    return found
