"""The engine on real ranks: in every layout it trains like a plain loop without ranks."""

from dataclasses import replace

import numpy as np
import pytest
from distributed.layouts import Layout, Trajectory, plain_trajectory, rank_trajectory, whole

FEED_FORWARDS = ("dense", "token", "attributes")

# With gradient accumulation over 4 micro-steps, and without it.
ONE_RANK = [Layout(world=1, micro_batch=size) for size in (1, 4)]
TWO_RANKS = [
    *(Layout(kind, stage=stage) for kind in FEED_FORWARDS for stage in (0, 1, 2, 3)),
    *(Layout(kind, stage=stage, ep_size=2) for kind in FEED_FORWARDS[1:] for stage in (0, 1, 2)),
    *(Layout(kind, stage=stage, tp_size=2) for kind in FEED_FORWARDS for stage in (0, 1, 2)),
    Layout(tp_size=2, ep_size=2),
    Layout(micro_batch=2),
    *(
        Layout(**spread, activation_checkpointing=True)
        for spread in ({"stage": 1}, {"stage": 3}, {"ep_size": 2}, {"tp_size": 2})
    ),
    *(Layout(**spread, combination="weights") for spread in ({"stage": 3}, {"tp_size": 2})),
    *(Layout("token", **spread, experts_per_token=1) for spread in ({}, {"stage": 3})),
    *(
        Layout("token", **spread, experts_per_token=1, collapsed=True)
        for spread in ({"ep_size": 2}, {"tp_size": 2})
    ),
    *(
        Layout(**spread, mixed=True)
        for spread in ({"stage": 2}, {"stage": 3}, {"ep_size": 2}, {"tp_size": 2, "ep_size": 2})
    ),
    *(
        Layout(**spread, parts=True)
        for spread in (
            {"stage": 0},
            {"stage": 2, "mixed": True},
            {"stage": 3, "mixed": True},
            {"stage": 1, "tp_size": 2},
            {"ep_size": 2, "activation_checkpointing": True},
            {"optimizer": "mt_adamw", "micro_batch": 2},
            {"optimizer": "muon", "stage": 0},
            {"optimizer": "muon", "stage": 0, "ep_size": 2, "mixed": True},
        )
    ),
]
FOUR_RANKS = [
    Layout(world=4),
    Layout(world=4, stage=2, ep_size=2),
    *(Layout(kind, world=4, ep_size=4) for kind in FEED_FORWARDS[1:]),
    Layout("dense", world=4, tp_size=2),
    *(Layout(world=4, tp_size=2, ep_size=2, stage=stage) for stage in (0, 1, 2)),
    Layout("token", world=4, tp_size=2, ep_size=2),
    Layout(world=4, tp_size=2, ep_size=4),
    Layout(world=4, tp_size=2, ep_size=2, mixed=True, parts=True),
]


def check(layout: Layout, parts: list[Trajectory]) -> None:
    """Losses and norms agree within 1e-5; parameters within the effect of gradients that agree
    within 1e-5.
    """
    expected = plain_trajectory(layout)
    for part in parts:
        assert part.losses == pytest.approx(expected.losses, rel=1e-5)
        assert part.auxiliary == pytest.approx(expected.auxiliary, rel=1e-5)
        assert part.norms == pytest.approx(expected.norms, rel=1e-5)
    parameters = whole(parts, layout.tp_size)
    assert parameters.keys() == expected.parameters.keys()
    for name, values in expected.parameters.items():
        found = parameters[name]
        if layout.optimizer != "sgd" and name.endswith("attention.qkv.bias"):
            # The bias of keys does not affect attention: its gradient is only rounding errors,
            # which Adam amplifies to full steps.
            found, values = (np.delete(each, _keys_of(each)) for each in (found, values))
        np.testing.assert_allclose(found, values, atol=2e-6, err_msg=name)


def _keys_of(bias: np.ndarray) -> slice:
    """The keys' part of a fused bias of queries, keys and values."""
    return slice(len(bias) // 3, 2 * len(bias) // 3)


@pytest.mark.parametrize("layout", [*ONE_RANK, *TWO_RANKS, *FOUR_RANKS], ids=str)
def test_every_layout_trains_as_a_plain_loop(rank_group, layout):
    check(layout, rank_group(layout.world).run(rank_trajectory, layout))


TASK_BALANCED = Layout(optimizer="mt_adamw", steps=20, micro_batch=2)


@pytest.mark.parametrize(
    "layout",
    [
        *(
            replace(TASK_BALANCED, stage=stage, **spread)
            for stage in (0, 1, 2)
            for spread in ({}, {"ep_size": 2}, {"tp_size": 2})
        ),
        replace(TASK_BALANCED, stage=3),
    ],
    ids=str,
)
def test_mt_adamw_under_the_engine_equals_the_plain_formula_over_twenty_steps(rank_group, layout):
    for part in rank_group(layout.world).run(rank_trajectory, layout):
        assert part.losses == pytest.approx(plain_trajectory(layout).losses, rel=1e-6, abs=1e-6)


BF16 = [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 1, "tp_size": 2}]


@pytest.mark.parametrize("spread", BF16, ids=str)
def test_mt_adamw_in_bf16_stays_near_float32_over_twenty_steps(rank_group, spread):
    layout = replace(TASK_BALANCED, feed_forward="dense", bf16=True, **spread)
    expected = plain_trajectory(layout)
    for part in rank_group(layout.world).run(rank_trajectory, layout):
        assert part.losses == pytest.approx(expected.losses, rel=5e-3)
        assert part.norms == pytest.approx(expected.norms, rel=3e-2)


@pytest.mark.parametrize("spread", BF16, ids=str)
def test_so_does_it_with_experts_while_the_gates_choose_alike(rank_group, spread):
    """If a gate's second and third choices are nearly equal, rounding can swap them; then other
    experts learn, and only the loss stays close.
    """
    layout = replace(TASK_BALANCED, bf16=True, **spread)
    expected = plain_trajectory(layout)
    for part in rank_group(layout.world).run(rank_trajectory, layout):
        alike = [
            mine == theirs for mine, theirs in zip(part.choices, expected.choices, strict=True)
        ]
        steps = alike.index(False) if False in alike else len(alike)
        assert steps >= 4
        assert part.norms[:steps] == pytest.approx(expected.norms[:steps], rel=1e-2)
        assert part.losses == pytest.approx(expected.losses, rel=5e-3)
