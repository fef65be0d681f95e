"""Experts spread over real ranks, moving rows or weights, compared with all experts on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from icl_moe.model import expert_parallel
from icl_moe.model.feed_forward import FeedForward

WIDTH, EXPERTS = 8, 4

ROUTES = {
    "spread": [[(0, 5), (3, 5), (1, 2), (2, 2)], [(0, 1), (3, 1), (1, 7), (2, 7)]],
    "one rank's experts": [[(0, 4), (1, 4)], [(0, 6), (1, 6)]],
    "other classes on each rank": [[(0, 3), (2, 3)], [(1, 5), (3, 5)]],
    "no rows on a rank": [[(0, 3), (2, 3)], [(0, 0), (2, 0)]],
    "no rows anywhere for an expert": [[(0, 3), (1, 0)], [(0, 2), (1, 0)]],
}
"""(expert, rows) of each route of each rank."""


def whole_experts() -> list[FeedForward]:
    torch.manual_seed(0)
    return [FeedForward(WIDTH) for _ in range(EXPERTS)]


def rows_of(rank: int, route: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + route)
    return torch.randn(count, WIDTH, generator=generator).requires_grad_()


def gradients(experts: list[FeedForward]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad
        for expert in experts
        for p in expert.parameters()
    ]


def run_here(place: Any, way: str, case: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients of this rank's rows, and gradients of its experts."""
    local = EXPERTS // place.world
    mine = whole_experts()[place.rank * local : (place.rank + 1) * local]
    routes = [
        (expert, rows_of(place.rank, i, count))
        for i, (expert, count) in enumerate(ROUTES[case][place.rank])
    ]
    counts_RE = expert_parallel.rows_by_rank(routes, local, dist.group.WORLD, place.world)
    outputs = getattr(expert_parallel, way)(
        routes, nn.ModuleList(mine), dist.group.WORLD, counts_RE
    )
    sum(output.sin().sum() for output in outputs).backward()
    dx = [torch.zeros_like(rows) if rows.grad is None else rows.grad for _, rows in routes]
    return [output.detach() for output in outputs], dx, gradients(mine)


@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("way", ["run_exchanged", "run_gathered"])
def test_spread_experts_give_what_all_experts_in_one_place_do(rank_group, way, case):
    found = rank_group(2).run(run_here, way, case)
    experts = whole_experts()
    for rank, (outputs, dx, _) in enumerate(found):
        for i, (expert, count) in enumerate(ROUTES[case][rank]):
            rows = rows_of(rank, i, count)
            expected = experts[expert](rows)
            expected.sin().sum().backward()
            torch.testing.assert_close(outputs[i], expected.detach(), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(dx[i], rows.grad, atol=1e-6, rtol=1e-5)
    spread = [gradient for _, _, mine in found for gradient in mine]
    for ours, expected in zip(spread, gradients(experts), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def choose(place: Any, rows: int) -> str:
    """The way that `run_spread` takes if each rank has `rows` rows for each of two experts of rank
    0.
    """
    chosen = []
    for way in ("run_exchanged", "run_gathered"):
        setattr(expert_parallel, way, lambda routes, *_, way=way: chosen.append(way))
    experts = [FeedForward(WIDTH) for _ in range(EXPERTS // place.world)]
    routes = [(e, torch.zeros(rows, WIDTH)) for e in (0, 1)]
    expert_parallel.run_spread(routes, experts, dist.group.WORLD, place.world)
    return chosen[0]


def choose_and_restore(place: Any, rows: int) -> str:
    before = expert_parallel.run_exchanged, expert_parallel.run_gathered
    try:
        return choose(place, rows)
    finally:
        expert_parallel.run_exchanged, expert_parallel.run_gathered = before


@pytest.mark.parametrize(("rows", "way"), [(30, "run_exchanged"), (40, "run_gathered")])
def test_whichever_moves_fewer_bytes_is_chosen_alike_on_every_rank(rank_group, rows, way):
    """Rank 1's 2 x rows rows of 8 numbers cross 4 times; two experts of 2 x 8 x 32 + 32 + 8 = 552
    numbers cross twice: equal at 34.5.
    """
    assert rank_group(2).run(choose_and_restore, rows) == [way, way]
