"""The feed-forward of a layer, dense or sparse, without DeepSpeed: what inference runs, and the
experts that training shares.

Apart from moe.py because inference must not import DeepSpeed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from icl_moe.model.linear import Linear
from icl_moe.model.router import AttributeDecision, AttributeGate, RoutingPlan, TokenGate
from icl_moe.recipe import ModelSettings

ExpertRunner = Callable[[list[tuple[int, Tensor]]], list[Tensor]]
"""Computes routes, (global expert id, rows (N, M)) each, and returns the experts' outputs (N, M) in
the same order.
"""

Mixture = Callable[[list[Tensor]], list[Tensor]]
"""From each class's rows (N, M) to their mixture of experts (N, M)."""


class FeedForward(nn.Module):
    """GPT-2's MLP, M -> 4M -> M with the tanh GELU. It is the dense layer, and each expert of a
    sparse one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x_TM: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_TM), approximate="tanh"))


class SparseFeedForward(nn.Module):
    """Experts and their gate: x_out = sum over i in S of w_i FFN_i(x). The training form is
    icl_moe.model.moe; both give equal values.
    """

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.gate = (
            attribute_gate(settings, layer) if routes_streams(settings) else _token_gate(settings)
        )
        self.experts = nn.ModuleList(FeedForward(settings.width) for _ in range(settings.experts))
        self.combination = settings.combination
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> Tensor:
        if isinstance(self.gate, AttributeGate):
            decision = self.gate(plan)
            self.auxiliary_loss = decision.auxiliary_loss
            mix = merged_weights if self.combination == "weights" else weighted_outputs
            return mix_by_segments(x_TM, plan, mix(decision, list(self.experts)))
        experts_TK, weights_TK, self.auxiliary_loss = self.gate(x_TM, plan)
        out_TM = torch.zeros_like(x_TM)
        for index, expert in enumerate(self.experts):
            token, choice = (experts_TK == index).nonzero(as_tuple=True)
            out_TM.index_add_(
                0, token, expert(x_TM[token]) * weights_TK[token, choice, None].to(x_TM.dtype)
            )
        return out_TM


def routes_streams(settings: ModelSettings) -> bool:
    """Whether whole streams go to the same experts: the gate reads attributes and nothing of the
    token.
    """
    return settings.feed_forward == "attributes" and settings.gate_input == "attributes"


def reads_attributes(settings: ModelSettings) -> bool:
    """Whether the gate of each token reads the token's attributes beside it."""
    return settings.feed_forward == "attributes" and settings.gate_input == "token+attributes"


def attribute_gate(settings: ModelSettings, layer: int) -> AttributeGate:
    return AttributeGate(
        settings.width, settings.experts, settings.experts_per_token, layer, settings.gate_noise
    )


def mix_by_segments(x_TM: Tensor, plan: RoutingPlan, mix: Mixture) -> Tensor:
    """Each class's tokens through its own experts, found by slices of the stream: no sort, no
    one-hot, no capacity.

    Padding is computed by no expert and comes out as zero.
    """
    lengths = [length for _, length in plan.segments]
    pieces = x_TM.split(lengths)
    members = [
        [i for i, (index, _) in enumerate(plan.segments) if index == c]
        for c in range(len(plan.classes))
    ]
    rows = [
        torch.cat([pieces[i] for i in mine]) if len(mine) > 1 else pieces[mine[0]]
        for mine in members
    ]
    placed: dict[int, Tensor] = {}
    for mine, mixed in zip(members, mix(rows), strict=True):
        placed |= dict(zip(mine, mixed.split([lengths[i] for i in mine]), strict=True))
    return torch.cat(
        [placed[i] if i in placed else torch.zeros_like(piece) for i, piece in enumerate(pieces)]
    )


def weighted_outputs(
    decision: AttributeDecision, experts: Sequence[nn.Module], run: ExpertRunner | None = None
) -> Mixture:
    """y = sum of w_i FFN_i(x). run: computes the routes; by default this process does, which then
    holds all experts.
    """

    def here(routes: list[tuple[int, Tensor]]) -> list[Tensor]:
        return [experts[expert](rows) for expert, rows in routes]

    def mix(rows_C: list[Tensor]) -> list[Tensor]:
        outputs = iter(
            (run or here)(
                [
                    (e, rows)
                    for rows, chosen in zip(rows_C, decision.experts, strict=True)
                    for e in chosen
                ]
            )
        )
        weights_CK = decision.weights_CK.to(rows_C[0].dtype)
        return [
            torch.stack([next(outputs) * weight for weight in weights_K]).sum(dim=0)
            for weights_K in weights_CK
        ]

    return mix


def merged_weights(decision: AttributeDecision, experts: Sequence[nn.Module]) -> Mixture:
    """y = FFN(x) with the weights sum of w_i W_i, so the cost is that of one expert."""

    def mix(rows_C: list[Tensor]) -> list[Tensor]:
        mixed = []
        for rows, chosen, weights_K in zip(
            rows_C, decision.experts, decision.weights_CK.to(rows_C[0].dtype), strict=True
        ):
            parameters = [dict(experts[e].named_parameters()) for e in chosen]
            merged = {
                name: sum(w * p[name] for w, p in zip(weights_K, parameters, strict=True))
                for name in parameters[0]
            }
            mixed.append(functional_call(experts[chosen[0]], merged, (rows,)))
        return mixed

    return mix


def _token_gate(settings: ModelSettings) -> TokenGate:
    return TokenGate(
        settings.width, settings.experts, settings.experts_per_token, reads_attributes(settings)
    )
