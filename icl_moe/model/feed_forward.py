"""The feed-forward of a layer, dense or sparse, without DeepSpeed: what inference runs, and the experts that training shares.

Apart from moe.py because inference must not import DeepSpeed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.model.router import AttributeDecision, AttributeGate, RoutingPlan, TokenGate
from icl_moe.recipe import ModelSettings

ExpertRunner = Callable[[list[tuple[int, Tensor]]], list[Tensor]]
"""Computes routes, (global expert id, rows (N, M)) each, and returns the experts' outputs (N, M) in the same order."""


class FeedForward(nn.Module):
    """GPT-2's MLP, M -> 4M -> M with the tanh GELU. It is the dense layer, and each expert of a sparse one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_TM: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_TM), approximate="tanh"))


class SparseFeedForward(nn.Module):
    """Experts and their gate: x_out = sum over i in S of w_i FFN_i(x). The training form is icl_moe.model.moe; both give equal values."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.gate = attribute_gate(settings, layer) if settings.feed_forward == "attributes" else _token_gate(settings)
        self.experts = nn.ModuleList(FeedForward(settings.width) for _ in range(settings.experts))
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> Tensor:
        if isinstance(self.gate, AttributeGate):
            decision = self.gate(plan)
            self.auxiliary_loss = decision.auxiliary_loss
            return mix_by_segments(x_TM, plan, decision, run_here(list(self.experts)))
        experts_TK, weights_TK = self.gate(x_TM)
        out_TM = torch.zeros_like(x_TM)
        for index, expert in enumerate(self.experts):
            token, choice = (experts_TK == index).nonzero(as_tuple=True)
            out_TM.index_add_(0, token, expert(x_TM[token]) * weights_TK[token, choice, None].to(x_TM.dtype))
        return out_TM


def attribute_gate(settings: ModelSettings, layer: int) -> AttributeGate:
    return AttributeGate(settings.width, settings.experts, settings.experts_per_token, layer, settings.gate_noise)


def mix_by_segments(x_TM: Tensor, plan: RoutingPlan, decision: AttributeDecision, run: ExpertRunner) -> Tensor:
    """Each class's tokens through its own experts, found by slices of the stream: no sort, no one-hot, no capacity.

    run: computes the (global expert id, rows) routes. Padding is computed by no expert and comes out as zero.
    """
    lengths = [length for _, length in plan.segments]
    pieces = x_TM.split(lengths)
    members = [[i for i, (index, _) in enumerate(plan.segments) if index == c] for c in range(len(plan.classes))]
    rows = [torch.cat([pieces[i] for i in mine]) if len(mine) > 1 else pieces[mine[0]] for mine in members]
    outputs = iter(run([(expert, rows[c]) for c, experts in enumerate(decision.experts) for expert in experts]))
    placed: dict[int, Tensor] = {}
    for mine, weights_K in zip(members, decision.weights_CK.to(x_TM.dtype), strict=True):
        mixed = sum(next(outputs) * weight for weight in weights_K.unbind())
        placed |= dict(zip(mine, mixed.split([lengths[i] for i in mine]), strict=True))
    return torch.cat([placed[i] if i in placed else torch.zeros_like(piece) for i, piece in enumerate(pieces)])


def run_here(experts: Sequence[nn.Module]) -> ExpertRunner:
    """Runs every route on this process, which holds all experts."""
    return lambda routes: [experts[expert](rows) for expert, rows in routes]


def _token_gate(settings: ModelSettings) -> TokenGate:
    return TokenGate(settings.width, settings.experts, settings.experts_per_token)
