"""The engine on real ranks: the same numbers whatever the number of ranks and the ZeRO stage."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_mt_adamw import plain_step
from torch import distributed as dist
from toy_model import MANIFEST, VOCABULARY, make_config, make_recipe, make_sequences

from icl_moe.data.batch import collate
from icl_moe.data.schedule import RankSlice
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import OptimizerSettings, ParallelSettings

STEPS = 4
TASKS = ("segmentation", "captioning", "segmentation")
PROBABILITIES = {"segmentation": 2 / 3, "captioning": 1 / 3}


def run_steps(ranks: Any, feed_forward: str, stage: int, ep_size: int = 1, optimizer: str = "adamw", steps: int = STEPS) -> list[dict]:
    """Train a toy model on random episodes of two tasks; the loss of the global batch and the gradient norm of each step."""
    from icl_moe.training.engine import TrainingEngine

    recipe = replace(
        make_recipe(model={"feed_forward": feed_forward, "gate_noise": True}),
        parallel=ParallelSettings(ep_size=ep_size),
        optimizer=OptimizerSettings(optimizer, learning_rate=1e-3, clip=0.5 if optimizer == "adamw" else None),
    )
    part = RankSlice.of(ranks.rank, ranks.world, recipe.training.global_batch, recipe.training.micro_batch)
    engine = TrainingEngine(recipe, MANIFEST, {"zero_optimization": {"stage": stage, "reduce_scatter": True}}, part, ranks)
    found = []
    for step in range(steps):
        task = TASKS[step % 3]
        engine.begin_step(1e-3, PROBABILITIES[task])
        sequences = make_sequences(task, recipe.training.global_batch, seed=step)
        scale = ranks.world * part.micro_steps / sum(float(s.loss_weights().sum()) for s in sequences)
        total = torch.zeros(2)
        for micro_step in range(part.micro_steps):
            first = (micro_step * ranks.world + ranks.rank) * part.micro_batch
            batch = collate(sequences[first : first + part.micro_batch], VOCABULARY, task, loss_scale=scale)
            loss = engine.backward(batch, noise=(0, step))
            engine.step()
            total += torch.stack([loss.total.detach(), loss.auxiliary]) / (ranks.world * part.micro_steps)
        dist.all_reduce(total)
        found.append({"loss": total[0].item(), "auxiliary": total[1].item(), "norm": engine.norm})
    return found


def plain_mt_losses(steps: int) -> list[float]:
    """The same training without DeepSpeed: the plain decoder on whole batches, and MT-AdamW's formula on one parameter after another."""
    model = InContextDecoder(make_config(feed_forward="attributes"))
    initialise(model, seed=0)
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    losses = []
    for step in range(steps):
        task = TASKS[step % 3]
        model.zero_grad(set_to_none=False)
        loss = model(collate(make_sequences(task, 4, seed=step), VOCABULARY, task), noise=(0, step)).total
        loss.backward()
        losses.append(loss.item())
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        for name, parameter in parameters.items():
            decay = 0.05 if parameter.dim() >= 2 and "embedding" not in name else 0.0
            values = (parameter.detach(), *moments[name], gradients[name], norm, PROBABILITIES[task])
            theta, *moments[name] = plain_step(*values, step + 1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=decay)
            parameter.data = theta
    return losses


@pytest.fixture(scope="module")
def reference(rank_group):
    """One rank, ZeRO-1: computed once for each kind of feed-forward."""
    return {kind: rank_group(1).run(run_steps, kind, 1)[0] for kind in ("dense", "token", "attributes")}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("feed_forward", "ep_size"), [("dense", 1), ("attributes", 1), ("attributes", 2)])
def test_two_ranks_train_as_one_at_every_zero_stage(rank_group, reference, feed_forward, ep_size, stage):
    for steps in rank_group(2).run(run_steps, feed_forward, stage, ep_size):
        for ours, expected in zip(steps, reference[feed_forward], strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert ours["auxiliary"] == pytest.approx(expected["auxiliary"], abs=1e-5)
            assert ours["norm"] == pytest.approx(expected["norm"], rel=1e-5)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_stock_token_routing_trains_as_on_one_rank(rank_group, reference, ep_size):
    """Only the task's loss can agree: stock defines its auxiliary loss on the tokens of one micro-batch, whatever they are."""
    for steps in rank_group(2).run(run_steps, "token", 1, ep_size):
        for ours, expected in zip(steps, reference["token"], strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def plain_losses():
    return plain_mt_losses(20)


@pytest.mark.parametrize(("stage", "ep_size"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)])
def test_mt_adamw_under_the_engine_equals_the_plain_formula_over_twenty_steps(rank_group, plain_losses, stage, ep_size):
    for steps in rank_group(2).run(run_steps, "attributes", stage, ep_size, "mt_adamw", 20):
        for ours, expected in zip(steps, plain_losses, strict=True):
            assert ours["loss"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
