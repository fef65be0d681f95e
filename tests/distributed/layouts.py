"""A few steps of a toy decoder in any parallel layout, and the same steps without ranks or engine,
for the parity tests.

Most use SGD, because its parameters reveal the gradients; Adam would amplify the rounding errors of
zero gradients to full steps.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import deepspeed
import numpy as np
import torch
from plain_mt_adamw import plain_step
from torch import distributed as dist
from toy_model import MANIFEST, VOCABULARY, make_recipe, make_sequences

from icl_moe.batch import TokenBatch, collate
from icl_moe.data.corruption import hide_query_mask
from icl_moe.data.schedule import RankSlice
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise, start_from_codebook
from icl_moe.model.deepspeed_moe import exported_name, first_expert
from icl_moe.model.router import AttributeGate
from icl_moe.model.tensor_parallel import is_split, join
from icl_moe.optim import muon
from icl_moe.recipe import OptimizerSettings, ParallelSettings
from icl_moe.training.codebook import Codebook

GLOBAL_BATCH = 4
CLIP = 0.5
RATES = {"sgd": 0.5, "mt_adamw": 1e-3, "muon": 1e-3}
TASKS = ("segmentation", "captioning", "segmentation", "captioning")
CODEBOOK = Codebook(torch.arange(32 * 6).view(32, 6).float().sin(), torch.arange(1.0, 33.0))
PROBABILITIES = {"segmentation": 2 / 3, "captioning": 1 / 3, "mixed": 1.0}


@dataclass(frozen=True)
class Layout:
    """The layout of a toy run, and what it trains. mixed: a global batch has episodes of both
    tasks, so that ranks route differently. collapsed: token gates send all tokens to one expert.
    parts: with the link, fan-in and codebook initialisation, mask corruption, and the loss on the
    query.
    """

    feed_forward: str = "attributes"
    world: int = 2
    stage: int = 1
    ep_size: int = 1
    tp_size: int = 1
    bf16: bool = False
    micro_batch: int = 1
    activation_checkpointing: bool = False
    combination: str = "outputs"
    experts_per_token: int = 2
    mixed: bool = False
    collapsed: bool = False
    parts: bool = False
    optimizer: Literal["sgd", "mt_adamw", "muon"] = "sgd"
    steps: int = 6

    def __str__(self) -> str:
        """The settings that differ from the default layout."""
        return (
            " ".join(
                f"{name}={value}"
                for name, value in vars(self).items()
                if value != vars(Layout())[name]
            )
            or "plain"
        )


@dataclass(frozen=True)
class Trajectory:
    """losses, auxiliary, norms: the value of each step, over the global batch. parameters: the
    parameters after the last step, by exported name.

    choices: for each step, the experts that each attribute gate chose for each class.
    """

    losses: list[float]
    auxiliary: list[float]
    norms: list[float]
    parameters: dict[str, np.ndarray]
    choices: list[list[list[list[int]]]]


def _computes_in_float32(device: torch.device) -> bool:
    return False


_muon_in_float32 = mock.patch.object(muon, "computes_in_bf16", _computes_in_float32)
"""On a processor with bfloat16 the iteration would turn rounding errors of gradients into other
roundings of the steps, a hundred times as large.
"""


def plain_trajectory(layout: Layout) -> Trajectory:
    """The run of `layout` in float32 without ranks, DeepSpeed and megatron-core: with the decoder
    for inference and autograd.
    """
    return _plain_trajectory(
        replace(
            layout,
            world=1,
            stage=0,
            ep_size=1,
            tp_size=1,
            bf16=False,
            activation_checkpointing=False,
        )
    )


@functools.cache
@_muon_in_float32
def _plain_trajectory(layout: Layout) -> Trajectory:
    recipe = _recipe(layout)
    decoder = InContextDecoder(
        DecoderConfig.from_recipe(recipe), auxiliary_weight=recipe.training.auxiliary_loss_weight
    )
    _draw(layout)(decoder, seed=0)
    if layout.parts:
        start_from_codebook(
            decoder,
            CODEBOOK.vectors_KC,
            CODEBOOK.frequencies_K,
            VOCABULARY.image_range.start,
            seed=0,
        )
    update = {"sgd": _plain_sgd, "mt_adamw": _plain_mt_adamw, "muon": _plain_muon}[
        layout.optimizer
    ](decoder)
    losses, auxiliary, norms, choices = [], [], [], []
    chosen = _choices(decoder)
    for step in range(layout.steps):
        decoder.zero_grad(set_to_none=False)
        parts = [decoder(batch, noise=(0, step)) for batch in _micro_batches(layout, step)]
        torch.stack([part.total for part in parts]).mean().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in decoder.named_parameters()
        }
        norms.append(
            torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
        )
        losses.append(torch.stack([part.total for part in parts]).mean().item())
        auxiliary.append(torch.stack([part.auxiliary for part in parts]).mean().item())
        choices.append(list(chosen.values()))
        update(step, _task(layout, step), gradients, norms[-1])
    return Trajectory(
        losses,
        auxiliary,
        norms,
        {name: p.detach().numpy().copy() for name, p in decoder.named_parameters()},
        choices,
    )


@_muon_in_float32
def rank_trajectory(place: Any, layout: Layout) -> Trajectory:
    """The same under the engine, on this rank of the layout; `parameters` are this rank's parts."""
    from icl_moe.training import engine as engine_module

    recipe = _recipe(layout)
    part = RankSlice.of(place.rank, place.world, GLOBAL_BATCH, layout.micro_batch, layout.tp_size)
    # Without this threshold stage 3 would not partition parameters as small as these.
    zero = {"stage": layout.stage, "reduce_scatter": True, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "bf16": {"enabled": layout.bf16}}
    with (
        mock.patch.object(engine_module, "initialise", _draw(layout)),
        mock.patch.object(engine_module, "_build_optimizer", _sgd)
        if layout.optimizer == "sgd"
        else nullcontext(),
    ):
        engine = engine_module.TrainingEngine(recipe, MANIFEST, config, part, place, CODEBOOK)
    losses, auxiliary, norms, choices = [], [], [], []
    chosen = _choices(engine.model)
    for step in range(layout.steps):
        task = _task(layout, step)
        engine.begin_step(RATES[layout.optimizer], task, PROBABILITIES[task])
        total = torch.zeros(2)
        for batch in _micro_batches(layout, step)[part.rank :: part.ranks]:
            loss = engine.backward(batch, noise=(0, step))
            engine.step()
            total += torch.stack([loss.total.detach().float(), loss.auxiliary.float()])
        dist.all_reduce(total)
        total /= place.world * part.micro_steps
        losses.append(total[0].item())
        auxiliary.append(total[1].item())
        norms.append(engine.norm)
        choices.append(list(chosen.values()))
    parameters = dict(engine.model.named_parameters())
    first = first_expert(place.rank, layout.ep_size, recipe.model.experts)
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=layout.stage == 3):
        held = {
            exported_name(name, first): p.detach().float().cpu().numpy().copy()
            for name, p in parameters.items()
        }
    engine.deepspeed.destroy()
    return Trajectory(losses, auxiliary, norms, held, choices)


def _draw(layout: Layout) -> Callable[..., None]:
    """A function that draws the initial weights."""

    def draw(decoder: InContextDecoder, *args: Any, **options: Any) -> None:
        initialise(decoder, *args, **options)
        for name, parameter in decoder.named_parameters() if layout.collapsed else ():
            if name.endswith("feed_forward_norm.bias"):
                parameter.data.fill_(1.0)
            elif name.endswith("gate.wg.weight"):
                parameter.data.fill_(-0.1)[0] = 0.1

    return draw


def _choices(decoder: InContextDecoder) -> dict[int, list[list[int]]]:
    """Number of an attribute gate -> its last choice, updated while the decoder computes."""
    chosen: dict[int, list[list[int]]] = {}
    for number, gate in enumerate(
        module for module in decoder.modules() if isinstance(module, AttributeGate)
    ):
        gate.register_forward_hook(
            lambda _, __, choice, number=number: chosen.update({number: choice.experts_CK.tolist()})
        )
    return chosen


def whole(parts: Sequence[Trajectory], tp_size: int) -> dict[str, np.ndarray]:
    """The whole parameters, joined from the ranks' parts; ranks with the same parts must agree."""
    found: dict[str, np.ndarray] = {}
    for first in range(0, len(parts), tp_size):
        tensor_ranks = [part.parameters for part in parts[first : first + tp_size]]
        for name in {name for held in tensor_ranks for name in held}:
            pieces = [torch.from_numpy(held[name]) for held in tensor_ranks if name in held]
            for one in [join(name, pieces, VOCABULARY.size)] if is_split(name) else pieces:
                np.testing.assert_allclose(
                    found.setdefault(name, one.numpy()), one.numpy(), atol=1e-7
                )
    return found


def _recipe(layout: Layout) -> Any:
    model = {
        "feed_forward": layout.feed_forward,
        "combination": layout.combination,
        "experts_per_token": layout.experts_per_token,
        "gate_noise": layout.optimizer == "mt_adamw",
        "link": layout.parts,
        "initialisation": "fan_in" if layout.parts else "gpt2",
        "codebook_init": layout.parts,
    }
    training = {"micro_batch": layout.micro_batch, "global_batch": GLOBAL_BATCH}
    return replace(
        make_recipe(
            model=model, activation_checkpointing=layout.activation_checkpointing, **training
        ),
        parallel=ParallelSettings(layout.ep_size, layout.tp_size),
        optimizer=OptimizerSettings(
            "adamw" if layout.optimizer == "sgd" else layout.optimizer,
            RATES[layout.optimizer],
            clip=_clip(layout),
        ),
    )


def _clip(layout: Layout) -> float | None:
    return CLIP if layout.optimizer == "sgd" else None


def _task(layout: Layout, step: int) -> str:
    return "mixed" if layout.mixed else TASKS[step % len(TASKS)]


def _micro_batches(layout: Layout, step: int) -> list[TokenBatch]:
    """All micro-batches of the global batch of a step, in the order in which RankSlice distributes
    them.
    """
    task, size = _task(layout, step), layout.micro_batch
    tasks = TASKS[:GLOBAL_BATCH] if layout.mixed else (task,) * GLOBAL_BATCH
    sequences = [
        make_sequences(one, 1, seed=GLOBAL_BATCH * step + i)[0] for i, one in enumerate(tasks)
    ]
    loss_on = "query" if layout.parts else "all"
    scale = GLOBAL_BATCH / size / sum(float(s.loss_weights(0, loss_on).sum()) for s in sequences)
    if layout.parts:
        sequences = [
            hide_query_mask(sequence, VOCABULARY, 0, step, i)
            for i, sequence in enumerate(sequences)
        ]
    return [
        collate(sequences[i : i + size], VOCABULARY, task, loss_scale=scale, loss_on=loss_on)
        for i in range(0, GLOBAL_BATCH, size)
    ]


Update = Callable[[int, str, dict[str, torch.Tensor], float], None]
"""Updates the parameters, given (step, task, gradients by name, their norm)."""


def _plain_sgd(decoder: InContextDecoder) -> Update:
    def update(step: int, task: str, gradients: dict[str, torch.Tensor], norm: float) -> None:
        for name, parameter in decoder.named_parameters():
            parameter.data -= RATES["sgd"] * min(1.0, CLIP / norm) * gradients[name]

    return update


def _plain_mt_adamw(decoder: InContextDecoder) -> Update:
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in decoder.named_parameters()
    }

    def update(step: int, task: str, gradients: dict[str, torch.Tensor], norm: float) -> None:
        for name, parameter in decoder.named_parameters():
            decay = 0.05 if parameter.dim() >= 2 and "embedding" not in name else 0.0
            values = (
                parameter.detach(),
                *moments[name],
                gradients[name],
                norm,
                PROBABILITIES[task],
            )
            parameter.data, *moments[name] = plain_step(
                *values, step + 1, lr=RATES["mt_adamw"], betas=(0.9, 0.999), eps=1e-8, decay=decay
            )

    return update


def _plain_muon(decoder: InContextDecoder) -> Update:
    """Muon's formula for each matrix; torch's AdamW for the rest."""
    momenta = {name: torch.zeros_like(p) for name, p in decoder.named_parameters()}
    matrices = {
        name
        for name, p in decoder.named_parameters()
        if p.dim() == 2 and "embedding" not in name and "gate" not in name
    }
    rest = {name: p for name, p in decoder.named_parameters() if name not in matrices}
    gates = ("gate.wg.weight", "gate.embed.weight")
    decayed = [p for name, p in rest.items() if name.endswith(gates)]
    plain = [p for name, p in rest.items() if not name.endswith(gates)]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=RATES["muon"],
    )

    def update(step: int, task: str, gradients: dict[str, torch.Tensor], norm: float) -> None:
        for name, parameter in decoder.named_parameters():
            gradient = gradients[name]
            if name in rest:
                parameter.grad = gradient
                continue
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
            ahead = 0.95 * momenta[name] + 0.05 * gradient
            parts = 3 if "qkv" in name else 1
            moved = [
                matrix * (1 - 0.02 * 0.05)
                - 0.02 * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5 * muon.orthogonal(towards)
                for matrix, towards in zip(
                    parameter.data.chunk(parts), ahead.chunk(parts), strict=True
                )
            ]
            parameter.data = torch.cat(moved)
        adamw.step()

    return update


def _sgd(recipe: Any, model: torch.nn.Module, norm: Any) -> torch.optim.Optimizer:
    from icl_moe.optim.parameter_groups import parameter_groups

    return torch.optim.SGD(parameter_groups(model, 0.0), lr=RATES["sgd"])
