"""The feed-forward of a layer, dense or sparse, without DeepSpeed: what inference runs, and the
experts that training shares.

The training form is deepspeed_moe.py; both give equal values. Inference must not import DeepSpeed.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.batch import RoutingPlan
from icl_moe.model.kernels import Linear
from icl_moe.model.moe import Decision, Route, combine, dispatch, mix_outputs, mix_weights
from icl_moe.model.router import AttributeGate, FixedGate, StreamGate, TokenGate
from icl_moe.recipe import ModelSettings


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


class Experts(nn.ModuleList):
    """The experts of a layer, all of them in this process.

    At ZeRO stage 3 their weights are whole only within `forward`, and its backward pass ends with
    the reduction of their gradients. All ranks must do both equally often, whatever the
    routes of their tokens, so a layer calls it once, with one tensor.
    """

    def forward(self, compute: Callable[[list[nn.Module], Tensor], Tensor], x_TM: Tensor) -> Tensor:
        """The result of `compute(experts, x_TM)`."""
        return compute(list(self), x_TM)


class SparseFeedForward(nn.Module):
    """Experts and their gate: y = sum over i in S of w_i FFN_i(x)."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.gate = (
            stream_gate(settings, layer) if routes_streams(settings) else _token_gate(settings)
        )
        self.experts = Experts(FeedForward(settings.width) for _ in range(settings.experts))
        self.combination = settings.combination
        self.auxiliary_loss: Tensor | None = None

    @property
    def stream_gate(self) -> StreamGate | None:
        """The gate, if it decides for whole streams, so that the decoder can ask it in advance."""
        return self.gate if isinstance(self.gate, StreamGate) else None

    def forward(self, x_TM: Tensor, plan: RoutingPlan, decision: Decision | None) -> Tensor:
        """decision: the decision of `stream_gate`, if there is one."""
        if decision is not None:
            return self.experts(partial(self._mix_by_class, plan, decision), x_TM)
        experts_TK, weights_TK, self.auxiliary_loss = self.gate(x_TM, plan)
        return self.experts(partial(_mix_by_token, experts_TK, weights_TK), x_TM)

    def _mix_by_class(
        self, plan: RoutingPlan, decision: Decision, experts: list[nn.Module], x_TM: Tensor
    ) -> Tensor:
        rows_C = dispatch(x_TM, plan)
        if self.combination == "weights":
            mixed_C = mix_weights(rows_C, decision, experts)
        else:
            mixed_C = mix_outputs(rows_C, decision, partial(_run_here, experts))
        return combine(mixed_C, x_TM, plan)


def _run_here(experts: list[nn.Module], routes: list[Route]) -> list[Tensor]:
    return [experts[expert](rows) for expert, rows in routes]


def _mix_by_token(
    experts_TK: Tensor, weights_TK: Tensor, experts: list[nn.Module], x_TM: Tensor
) -> Tensor:
    out_TM = torch.zeros_like(x_TM)
    for number, expert in enumerate(experts):
        token, choice = (experts_TK == number).nonzero(as_tuple=True)
        weights = weights_TK[token, choice, None].to(x_TM.dtype)
        out_TM.index_add_(0, token, expert(x_TM[token]) * weights)
    return out_TM


def routes_streams(settings: ModelSettings) -> bool:
    """Whether whole streams go to the same experts: the gate reads nothing of the token."""
    return settings.feed_forward == "attributes" and settings.gate_input in ("attributes", "none")


def reads_attributes(settings: ModelSettings) -> bool:
    """Whether the gate of each token reads the token's attributes beside it."""
    return settings.feed_forward == "attributes" and settings.gate_input == "token+attributes"


def stream_gate(settings: ModelSettings, layer: int) -> StreamGate:
    if settings.gate_input == "none":
        return FixedGate(settings.experts)
    return AttributeGate(
        settings.width, settings.experts, settings.experts_per_token, layer, settings.gate_noise
    )


def _token_gate(settings: ModelSettings) -> TokenGate:
    return TokenGate(
        settings.width, settings.experts, settings.experts_per_token, reads_attributes(settings)
    )
