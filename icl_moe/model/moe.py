"""The mixture of experts of attribute routing, in three steps: dispatch, experts, combine.

    y = sum over i in S(c) of w_i(c) FFN_i(x),    x a token of attribute class c

The gate decides once for each attribute class, so all tokens of a class go to the same experts. The
stream is cut into the rows of each class by slices: no sort, no one-hot, no capacity. With two
classes, of which the first goes to experts 3 and 5, and the second to 0 and 3:

    stream     a a a b b a b b b           tokens by class, padding aside
    dispatch   [a a a a] [b b b b b]       the rows of each class
    experts    3(a) 5(a) 0(b) 3(b)         a route for each class and each of its experts
    combine    w3 3(a) + w5 5(a), ...      weighted, and back to their places in the stream

This module does not use ranks; expert_parallel.py runs routes on experts of other ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from icl_moe.batch import RoutingPlan


class Decision(NamedTuple):
    """What the gate of one layer decides for each attribute class c of a plan: its experts (global
    ids), best first, and their weights_CK (float32).
    """

    experts: list[list[int]]
    weights_CK: Tensor


Route = tuple[int, Tensor]
"""An expert's global id, and the rows (N, M) that it computes."""

RunRoutes = Callable[[list[Route]], list[Tensor]]
"""Computes the experts' outputs (N, M) of routes, in the same order."""


def dispatch(x_TM: Tensor, plan: RoutingPlan) -> list[Tensor]:
    """The rows (N, M) of each attribute class of the plan, in stream order."""
    pieces = x_TM.split([length for _, length in plan.segments])
    return [_join([pieces[i] for i in mine]) for mine in _members(plan)]


def mix_outputs(rows_C: Sequence[Tensor], decision: Decision, run: RunRoutes) -> list[Tensor]:
    """Each class's rows through its experts: sum of w_i FFN_i(x)."""
    chosen_C = zip(rows_C, decision.experts, strict=True)
    outputs = iter(run([(expert, rows) for rows, chosen in chosen_C for expert in chosen]))
    weights_CK = decision.weights_CK.to(rows_C[0].dtype)
    mixed = []
    for first, *others in (weights_K.unbind() for weights_K in weights_CK):
        total = next(outputs) * first
        for weight in others:
            total = torch.addcmul(total, next(outputs), weight)
        mixed.append(total)
    return mixed


def mix_weights(
    rows_C: Sequence[Tensor],
    decision: Decision,
    experts: Sequence[nn.Module],
    weights: Sequence[dict[str, Tensor]] | None = None,
) -> list[Tensor]:
    """Each class's rows through one expert whose weights are the sum of w_i W_i, at the cost of one
    expert (Uni-Perceiver-MoE's code). weights: the experts' parameters by name, if they should not
    be taken from the experts themselves.
    """
    weights = weights or [dict(expert.named_parameters()) for expert in experts]
    mixed = []
    weights_CK = decision.weights_CK.to(rows_C[0].dtype)
    for rows, chosen, weights_K in zip(rows_C, decision.experts, weights_CK, strict=True):
        parameters = [weights[expert] for expert in chosen]
        merged = {
            name: sum(w * p[name] for w, p in zip(weights_K, parameters, strict=True))
            for name in parameters[0]
        }
        mixed.append(functional_call(experts[chosen[0]], merged, (rows,)))
    return mixed


def with_gradients_together(experts: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """The experts' parameters by name, so that the gradients of all come at once: in one order, and
    zero where no row went to an expert.

    ZeRO reduces gradients as soon as they are ready, so all ranks must have those of the same
    parameters in the same order, independently of their tokens' attribute classes.
    """
    named = [dict(expert.named_parameters()) for expert in experts]
    passed = iter(_Together.apply(*(weight for weights in named for weight in weights.values())))
    return [{name: next(passed) for name in weights} for weights in named]


class _Together(torch.autograd.Function):
    """Returns its tensors unchanged; autograd gives zeros for those that were not used."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def combine(mixed_C: Sequence[Tensor], x_TM: Tensor, plan: RoutingPlan) -> Tensor:
    """The inverse of `dispatch`: each row at its place in the stream (T, M), zero at padding."""
    lengths = [length for _, length in plan.segments]
    pieces = x_TM.split(lengths)
    placed: dict[int, Tensor] = {}
    for mine, mixed in zip(_members(plan), mixed_C, strict=True):
        placed |= dict(zip(mine, mixed.split([lengths[i] for i in mine]), strict=True))
    return torch.cat(
        [placed[i] if i in placed else torch.zeros_like(piece) for i, piece in enumerate(pieces)]
    )


def _members(plan: RoutingPlan) -> list[list[int]]:
    """The numbers of the segments of each class."""
    members: list[list[int]] = [[] for _ in plan.classes]
    for number, (index, _) in enumerate(plan.segments):
        if index >= 0:
            members[index].append(number)
    return members


def _join(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
