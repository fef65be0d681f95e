"""Dropout on tensor ranks: different for different heads, equal for values that all ranks hold, and
reproducible from the seed.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_model import MANIFEST, make_batch, make_recipe

from icl_moe.data.schedule import RankSlice
from icl_moe.recipe import ParallelSettings
from icl_moe.training.engine import TrainingEngine


def compute(place: Any, layout: str, checkpointing: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """With seeds 1, 1, 2 and in evaluation: the output of this rank's heads of the first layer (T,
    H, D), the layer's output (T, M), and the gradient of its fused projection.

    All heads of the layer have the same weights.
    """
    recipe = make_recipe(
        model={"dropout": 0.3, "attention_dropout": 0.3}, activation_checkpointing=checkpointing
    )
    recipe = replace(recipe, parallel=ParallelSettings(tp_size=2))
    part = RankSlice.of(place.rank, 2, recipe.training.global_batch, 1, tp_size=2)
    engine = TrainingEngine(recipe, MANIFEST, {"zero_optimization": {"stage": 0}}, part, place)
    layer = engine.model.layers[0]
    weight = layer.attention.qkv.weight
    with torch.no_grad():
        one_head = torch.randn(3, 1, 8, 32, generator=torch.Generator().manual_seed(0))
        weight.copy_(one_head.expand(3, 2, 8, 32).reshape(weight.shape))
    seen: dict[str, Tensor] = {}
    layer.attention.out.register_forward_pre_hook(
        lambda _, inputs: seen.update(heads=inputs[0].detach().unflatten(1, (2, 8)))
    )
    layer.register_forward_hook(lambda _, __, out: seen.update(layer=out.detach()))
    batch = make_batch("captioning", 3, layout)
    found = []
    for seed in (1, 1, 2, None):
        engine.model.train(seed is not None)
        torch.manual_seed(seed or 0)
        (gradient,) = torch.autograd.grad(engine.model(batch).total, [weight])
        found.append((seen["heads"].clone(), seen["layer"].clone(), gradient))
    engine.deepspeed.destroy()
    return found


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_tensor_ranks_drop_different_weights_of_their_heads_and_the_same_of_all_else(
    rank_group, layout
):
    mine, theirs = rank_group(2).run(compute, layout, False)
    for (heads, layer, _), (other_heads, other_layer, _) in zip(mine[:3], theirs[:3], strict=True):
        four = [*heads.unbind(1), *other_heads.unbind(1)]
        assert all(not torch.equal(four[i], four[j]) for i in range(4) for j in range(i)), (
            "of equal heads, each must drop weights of its own"
        )
        assert torch.equal(layer, other_layer)
    for first, again, other, _ in (mine, theirs):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
    evaluated = [*mine[3][0].unbind(1), *theirs[3][0].unbind(1)]
    assert all(torch.equal(evaluated[0], head) for head in evaluated)


def test_what_is_computed_again_drops_the_same(rank_group):
    plain, checkpointed = (rank_group(2).run(compute, "packed", again) for again in (False, True))
    for rank in range(2):
        for (_, _, expected), (_, _, gradient) in zip(
            plain[rank][:3], checkpointed[rank][:3], strict=True
        ):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
