"""The feed-forward of a layer, dense or sparse, without DeepSpeed: what inference runs, and the
experts that training shares.

The training form is deepspeed_moe.py; both give equal values. Inference must not import DeepSpeed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.batch import RoutingPlan
from icl_moe.model.kernels import Linear
from icl_moe.model.moe import Decision, Route, combine, dispatch, mix_outputs, mix_weights
from icl_moe.model.router import AttributeGate, TokenGate
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

    At ZeRO stage 3 their weights are whole only within `forward`, and gradients are reduced after
    its backward pass. DeepSpeed's hooks see tensors that are arguments or results by themselves,
    but none within a list: hence the signature.
    """

    def forward(
        self,
        compute: Callable[[list[nn.Module], Sequence[Tensor]], list[Tensor]],
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        """The outputs (N, M) of compute(experts, rows), with rows (N, M)."""
        return tuple(compute(list(self), rows))

    def run(self, routes: Sequence[Route]) -> list[Tensor]:
        """The outputs (N, M) of routes (expert, rows (N, M)), in the same order."""

        def each(experts: list[nn.Module], rows: Sequence[Tensor]) -> list[Tensor]:
            return [experts[number](part) for (number, _), part in zip(routes, rows, strict=True)]

        return list(self(each, *(rows for _, rows in routes)))

    def merge(self, rows_C: Sequence[Tensor], decision: Decision) -> list[Tensor]:
        """`mix_weights` of these experts."""

        def merged(experts: list[nn.Module], rows: Sequence[Tensor]) -> list[Tensor]:
            return mix_weights(rows, decision, experts)

        return list(self(merged, *rows_C))


class SparseFeedForward(nn.Module):
    """Experts and their gate: y = sum over i in S of w_i FFN_i(x)."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.gate = (
            attribute_gate(settings, layer) if routes_streams(settings) else _token_gate(settings)
        )
        self.experts = Experts(FeedForward(settings.width) for _ in range(settings.experts))
        self.combination = settings.combination
        self.auxiliary_loss: Tensor | None = None

    @property
    def stream_gate(self) -> AttributeGate | None:
        """The gate, where it decides for whole streams, so that the decoder asks it beforehand."""
        return self.gate if isinstance(self.gate, AttributeGate) else None

    def forward(self, x_TM: Tensor, plan: RoutingPlan, decision: Decision | None) -> Tensor:
        """decision: of `stream_gate`, where there is one."""
        if decision is not None:
            rows_C = dispatch(x_TM, plan)
            if self.combination == "weights":
                mixed_C = self.experts.merge(rows_C, decision)
            else:
                mixed_C = mix_outputs(rows_C, decision, self.experts.run)
            return combine(mixed_C, x_TM, plan)
        experts_TK, weights_TK, self.auxiliary_loss = self.gate(x_TM, plan)
        numbers = range(len(self.experts))
        routes = [(experts_TK == number).nonzero(as_tuple=True) for number in numbers]
        outputs = self.experts.run(
            [(expert, x_TM[token]) for expert, (token, _) in enumerate(routes)]
        )
        out_TM = torch.zeros_like(x_TM)
        for (token, choice), output in zip(routes, outputs, strict=True):
            out_TM.index_add_(0, token, output * weights_TK[token, choice, None].to(x_TM.dtype))
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


def _token_gate(settings: ModelSettings) -> TokenGate:
    return TokenGate(
        settings.width, settings.experts, settings.experts_per_token, reads_attributes(settings)
    )
