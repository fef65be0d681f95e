"""A gradient that is not finite, with a finite loss, changes nothing on any rank, in any layout."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from toy_model import MANIFEST, make_batch, make_recipe

from icl_moe.data.schedule import RankSlice
from icl_moe.recipe import OptimizerSettings, ParallelSettings
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.partitions import held_ranges


@dataclass(frozen=True)
class Case:
    """A layout of two ranks, and the parameters whose gradients become `value` on rank 1."""

    stage: int
    bf16: bool = False
    optimizer: str = "adamw"
    ep_size: int = 1
    tp_size: int = 1
    checks: bool = True
    part: str = "layers.0.attention.qkv.weight"
    value: float = float("nan")

    def __str__(self) -> str:
        differences = {k: v for k, v in vars(self).items() if str(v) != str(vars(Case(0))[k])}
        return " ".join(f"{k}={v}" for k, v in {"stage": self.stage, **differences}.items())


CASES = [
    Case(0),
    Case(0, optimizer="mt_adamw", value=float("inf")),
    Case(1, optimizer="mt_adamw"),
    Case(1, bf16=True, value=float("-inf")),
    Case(1, bf16=True, optimizer="mt_adamw"),
    Case(2),
    Case(2, bf16=True, optimizer="mt_adamw"),
    Case(3),
    Case(3, bf16=True, optimizer="mt_adamw"),
    # Without DeepSpeed's own check of the gradients.
    Case(1, bf16=True, checks=False),
    Case(2, bf16=True, checks=False, optimizer="mt_adamw"),
    # Parameters that only one rank holds.
    *(Case(stage, ep_size=2, part=".deepspeed_experts.") for stage in (0, 1)),
    *(Case(stage, tp_size=2, part="layers.0.feed_forward.up.weight") for stage in (0, 1)),
]
OTHERS = [
    Case(1),
    Case(2, optimizer="mt_adamw"),
    Case(2, bf16=True),
    Case(3, optimizer="mt_adamw"),
    Case(3, bf16=True),
]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in OTHERS]


def train(place: Any, case: Case) -> dict[str, Any]:
    """Three steps of several micro-steps; the last gradient of the second step is spoilt on rank
    1.
    """
    recipe = make_recipe(model={"feed_forward": "attributes"})
    recipe = replace(
        recipe,
        parallel=ParallelSettings(case.ep_size, case.tp_size),
        optimizer=OptimizerSettings(
            case.optimizer, clip=0.5 if case.optimizer == "adamw" else None
        ),
    )
    part = RankSlice.of(place.rank, 2, recipe.training.global_batch, 1, case.tp_size)
    config = {
        "zero_optimization": {"stage": case.stage, "reduce_scatter": True},
        "bf16": {"enabled": case.bf16, "check_grad_overflow": case.checks},
    }
    engine = TrainingEngine(recipe, MANIFEST, config, part, place)
    try:
        states, moved = [], []
        for step in range(3):
            engine.begin_step(1e-3, "segmentation", 0.5)
            for micro_step in range(part.micro_steps):
                spoilt = (place.rank, step, micro_step) == (1, 1, part.micro_steps - 1)
                hooks = [
                    parameter.register_hook(lambda gradient: gradient * case.value)
                    for name, parameter in engine.model.named_parameters()
                    if spoilt and case.part in name
                ]
                seed = 10 * step + 2 * micro_step + part.rank
                batch = make_batch("segmentation", 1, seed=seed)
                loss = engine.backward(batch, noise=(0, step))
                assert loss.total.isfinite()
                done = engine.step()
                for hook in hooks:
                    hook.remove()
            moved.append(done)
            states.append(state_of(engine))
        same = [
            all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in pairwise(states)
        ]
        finite = all(value.isfinite().all() for state in states for value in state)
        norm, skipped = engine.norm, engine.deepspeed.skipped_steps
        return dict(moved=moved, same=same, finite=finite, norm=norm, skipped=skipped)
    finally:
        engine.deepspeed.destroy()


def state_of(engine: TrainingEngine) -> list[torch.Tensor]:
    """Copies of this rank's working weights, master weights and optimizer state."""
    values = [p.detach() for p in engine.model.parameters() if not hasattr(p, "ds_id")]
    for master in {id(held.master): held.master for held in held_ranges(engine.deepspeed)}.values():
        values += [master.detach(), *engine.deepspeed.basic_optimizer.state[master].values()]
    return [value.clone() for value in values]


@pytest.mark.parametrize("case", [*CASES, *SLOW], ids=str)
def test_a_gradient_that_is_not_finite_is_a_step_left_out_on_every_rank(rank_group, case):
    for rank in rank_group(2).run(train, case):
        assert rank.pop("norm") > 0
        expected = dict(moved=[True, False, True], same=[True, False], finite=True, skipped=1)
        assert rank == expected
