"""The gradients of a run's tasks at one of its checkpoints: how large each is in each part of the
model, and whether they point the same way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, count, islice, product
from pathlib import Path

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

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class TaskGradients:
    """Of a checkpoint after `step` steps.

    norms: task -> part -> L2 norm of the mean gradient over all its batches. within: task -> part
    -> cosine of the gradients of the two halves of its batches. between: two tasks -> part -> the
    mean cosine of a half of the one and a half of the other, four pairs. A part that a task's
    gradient does not reach has no cosine.
    """

    step: int
    episodes: int
    norms: Mapping[str, Mapping[str, float]]
    within: Mapping[str, Mapping[str, float]]
    between: Mapping[tuple[str, str], Mapping[str, float]]


def task_gradients(
    recipe: TrainingRecipe, checkpoint: Path, batches: int = 8, device: Device | None = None
) -> TaskGradients:
    """The gradients at the weights of a checkpoint's folder, of the next `batches` global batches
    (an even number) of each task that training would take after it, with the loss of training,
    without dropout and without noise of gates.

    The recipe's schedule must draw one task a step (training.sampling=unmixed).
    """
    config = DecoderConfig.from_pretrained(checkpoint.parent.parent / "model")
    weights, step = training_state.read_weights(checkpoint, config)
    decoder = InContextDecoder(
        config, auxiliary_weight=recipe.training.auxiliary_loss_weight
    ).eval()
    decoder.load_state_dict(weights)
    decoder.float().to(find_device(device))
    shards = ShardSet(recipe.data.shards)
    schedule = make_schedule(recipe, shards.manifest)
    halves = {
        task: _halves(decoder, recipe, shards, schedule, task, step, batches)
        for task in schedule.probabilities
    }
    means = {task: _mean(*of_task) for task, of_task in halves.items()}
    return TaskGradients(
        step,
        batches * recipe.training.global_batch,
        {task: _norms(mean) for task, mean in means.items()},
        {task: _cosines([of_task]) for task, of_task in halves.items()},
        {(a, b): _cosines(list(product(halves[a], halves[b]))) for a, b in combinations(halves, 2)},
    )


def _halves(
    decoder: InContextDecoder,
    recipe: TrainingRecipe,
    shards: ShardSet,
    schedule: Schedule,
    task: str,
    start: int,
    batches: int,
) -> tuple[Gradient, Gradient]:
    """The mean gradients of a task over its next batches, every other one."""
    training = recipe.training
    part = RankSlice.of(0, 1, training.global_batch, training.micro_batch)
    dataset = MicroBatches(
        shards,
        schedule,
        part,
        recipe.data.layout,
        training.input_loss_weight,
        training.loss_on,
        training.mask_corruption,
        training.input_loss,
    )
    steps = list(islice((t for t in count(start) if schedule.task(t) == task), batches))
    first, second = (
        _gradient(decoder, _micro_batches(dataset, steps[half::2], part.micro_steps, task))
        for half in (0, 1)
    )
    return first, second


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


def _mean(a: Gradient, b: Gradient) -> Gradient:
    names = dict.fromkeys([*a, *b])
    return {name: sum(g[name] for g in (a, b) if name in g) / 2 for name in names}  # type: ignore[misc]


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
