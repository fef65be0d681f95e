"""The engine on real ranks: the same numbers whatever the number of ranks and the ZeRO stage."""

from typing import Any

import pytest
from toy_model import MANIFEST, VOCABULARY, make_recipe, make_sequences

from icl_moe.data.batch import collate
from icl_moe.data.schedule import RankSlice

STEPS = 4


def run_steps(ranks: Any, feed_forward: str, stage: int, ep_size: int = 1) -> list[dict[str, float]]:
    """Train a toy model on random episodes, tasks in turn; the loss of the global batch and the gradient norm of each step."""
    import torch
    from torch import distributed as dist

    from icl_moe.recipe import ParallelSettings
    from icl_moe.training.trainer import build_engine, step_engine

    recipe = make_recipe(model={"feed_forward": feed_forward, "gate_noise": True})
    recipe = type(recipe)(**{**recipe.__dict__, "parallel": ParallelSettings(ep_size=ep_size)})
    part = RankSlice.of(ranks.rank, ranks.world, recipe.training.global_batch, recipe.training.micro_batch)
    engine = build_engine(recipe, MANIFEST, {"zero_optimization": {"stage": stage, "reduce_scatter": True}}, part, ranks)
    engine.train()
    steps = []
    for step in range(STEPS):
        task = ("segmentation", "captioning")[step % 2]
        sequences = make_sequences(task, recipe.training.global_batch, seed=step)
        scale = ranks.world * part.micro_steps / sum(float(s.loss_weights().sum()) for s in sequences)
        total = torch.zeros(2)
        for micro_step in range(part.micro_steps):
            first = (micro_step * ranks.world + ranks.rank) * part.micro_batch
            batch = collate(sequences[first : first + part.micro_batch], VOCABULARY, task, loss_scale=scale)
            loss = engine(batch, noise=(0, step))
            engine.backward(loss.total)
            norm = step_engine(engine, recipe.optimizer.clip)
            total += torch.stack([loss.total.detach(), loss.auxiliary]) / (ranks.world * part.micro_steps)
        dist.all_reduce(total)
        steps.append({"loss": total[0].item(), "auxiliary": total[1].item(), "norm": norm})
    return steps


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
