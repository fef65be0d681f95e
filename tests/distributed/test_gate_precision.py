"""Under bf16 the gates compute with their float32 master weights: in training, after resuming, and
in an exported model.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_model import MANIFEST, make_batch, make_recipe

from icl_moe.data.schedule import RankSlice
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.deepspeed_moe import exported_name
from icl_moe.recipe import ParallelSettings
from icl_moe.training import checkpoint
from icl_moe.training.engine import TrainingEngine

EXPERTS, WIDTH, BITS = 8, 32, 8
BATCH = make_batch("segmentation", 1, seed=7)


@dataclass(frozen=True)
class Case:
    """A layout of two ranks, and settings of the toy model."""

    stage: int = 1
    ep_size: int = 1
    tp_size: int = 1
    model: dict[str, Any] = field(default_factory=lambda: {"feed_forward": "attributes"})

    def __str__(self) -> str:
        spread = f"ZeRO {self.stage}, ep {self.ep_size}, tp {self.tp_size}"
        return ", ".join([spread, *self.model.values()])


BOTH = {"feed_forward": "attributes", "gate_input": "token+attributes"}
CASES = [
    Case(),
    Case(stage=2, ep_size=2),
    Case(stage=3),
    Case(tp_size=2),
    Case(model={"feed_forward": "token"}),
    Case(stage=2, model=BOTH),
]


def train(
    place: Any, case: Case, output: Path, steps: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Resume from the newest checkpoint for some steps, and save. Returns the weights of gates that
    a forward pass then uses, and their gradients, by exported name.
    """
    recipe = make_recipe(model=case.model)
    recipe = replace(recipe, parallel=ParallelSettings(case.ep_size, case.tp_size))
    part = RankSlice.of(place.rank, 2, recipe.training.global_batch, 1, case.tp_size)
    config = {"zero_optimization": {"stage": case.stage}, "bf16": {"enabled": True}}
    engine = TrainingEngine(recipe, MANIFEST, config, part, place)
    start = checkpoint.resume(engine.deepspeed, output)
    for step in range(start, start + steps):
        engine.begin_step(1e-3, "segmentation", 0.5)
        for micro_step in range(part.micro_steps):
            seed = 10 * step + 2 * micro_step + part.rank
            engine.backward(make_batch("segmentation", 1, seed=seed), noise=(0, step))
            engine.step()
    if steps:
        assert checkpoint.save(engine.deepspeed, output, start + steps, keep=1)
        engine.model.config.save_pretrained(output / "model")
    found = used(engine.model), gradients(engine.model) if case.stage < 3 else {}
    engine.deepspeed.destroy()
    return found


def used(model: Any) -> list[Tensor]:
    """The weights in the matrix products of gates, recognised by their shapes. A gate may use its
    weights several times.
    """
    weights: list[Tensor] = []
    linear = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_gates = weight.shape in ((EXPERTS, WIDTH), (WIDTH, BITS))
        if is_gates and not any(seen.equal(weight) for seen in weights):
            weights.append(weight.detach().clone())
        return linear(x, weight, bias)

    model.eval()
    with mock.patch.object(F, "linear", spy), torch.no_grad():
        model(BATCH)
    return weights


def gradients(model: Any) -> dict[str, Tensor]:
    gates = {
        name: parameter
        for path, parameter in model.named_parameters()
        if ".gate." in (name := exported_name(path))
    }
    found = torch.autograd.grad(model(BATCH).total, list(gates.values()))
    return {name: gradient.float() for name, gradient in zip(gates, found, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gates_compute_in_bf16_with_the_weights_that_their_optimizer_keeps(
    rank_group, tmp_path, case
):
    ranks = rank_group(2).run(train, case, tmp_path / "run", 2)
    checkpoint.export(tmp_path / "run", tmp_path / "model")
    exported = InContextDecoder.from_pretrained(tmp_path / "model")
    for name, parameter in exported.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
    expected = used(exported)
    assert len(expected) == (2 if case.model["feed_forward"] == "token" else 4)
    assert all((weight != weight.bfloat16().float()).any() for weight in expected)
    other = replace(case, stage=2, ep_size=2, tp_size=1)
    ranks += rank_group(2).run(train, other, tmp_path / "run", 0)
    exact = gradients(exported)
    for weights, found in ranks:
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        for name, gradient in found.items():
            # In token gates, rounding elsewhere decides between nearly equal experts.
            assert (gradient - exact[name]).norm() < 0.2 * exact[name].norm(), name
