"""Which experts a token goes to: gates, and the plan of a batch's attribute classes that
they read.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.seeds import stable_seed
from icl_moe.tasks import ATTRIBUTE_BITS, PADDING, attribute_bits

GATE = r"\.gate\."
"""What is in the names of the parameters of gates, and in no others, in an exported model."""


@dataclass(frozen=True)
class RoutingPlan:
    """Where the attribute classes of a batch lie, worked out once and read by every sparse layer.

    classes: the distinct attribute classes, without padding.
    segments: (index into classes, or -1 for padding; tokens) of each run of equal class, in stream
    order.
    shares_BC: of each episode's tokens that are no padding, the share of each class (float32); rows
    add up to 1.
    noise: (seed, step) of the gate noise, or None for none.
    """

    classes: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    shares_BC: Tensor
    noise: tuple[int, int] | None = None

    @classmethod
    def from_attributes(cls, attributes_T: np.ndarray, lengths: tuple[int, ...]) -> "RoutingPlan":
        """The plan of a stream of episodes of the given lengths, from the attribute class of each
        token.
        """
        attributes_T = np.asarray(attributes_T, dtype=np.uint8)
        classes = np.setdiff1d(attributes_T, [PADDING])
        starts = np.flatnonzero(np.diff(attributes_T, prepend=-1))
        runs = np.diff(starts, append=len(attributes_T))
        values = attributes_T[starts]
        indices = np.where(values == PADDING, -1, np.searchsorted(classes, values))
        counts = [
            np.bincount(
                np.searchsorted(classes, episode[episode != PADDING]), minlength=len(classes)
            )
            for episode in np.split(attributes_T, np.cumsum(lengths)[:-1])
        ]
        counts_BC = torch.from_numpy(np.stack(counts).astype(np.float32))
        return cls(
            tuple(classes.tolist()),
            tuple(zip(indices.tolist(), runs.tolist(), strict=True)),
            counts_BC / counts_BC.sum(dim=1, keepdim=True).clamp(min=1),
        )

    def with_noise(self, noise: tuple[int, int] | None) -> "RoutingPlan":
        return replace(self, noise=noise)

    def to(self, device: torch.device | str) -> "RoutingPlan":
        return replace(self, shares_BC=self.shares_BC.to(device, non_blocking=True))


class AttributeDecision(NamedTuple):
    """For each class c of a plan: its experts, best first, their weights_CK (float32), and the
    auxiliary loss.
    """

    experts: list[list[int]]
    weights_CK: Tensor
    auxiliary_loss: Tensor


class AttributeGate(nn.Module):
    """Routes by the attribute vector alone, so it decides once per distinct vector
    (Uni-Perceiver-MoE).

        h = LayerNorm(W_t a + b_t);  p = softmax(W_g h + noise);  S = top-k(p)
        k = 2: w_i = p_i / (p_1 + p_2);   k = 1: w_1 = p_1, since a weight of 1 would give the gate
        no gradient

    In training noise is N(0, (1/E)^2), drawn from (seed, step, layer, attribute class): equal on
    every rank and under recomputation. All in float32, the weights too (`full_precision`). The
    auxiliary loss is GShard's, E * sum_e (mean p_e) (share of tokens whose first expert is e), per
    episode over its tokens that are no padding, then averaged over the episodes.
    """

    def __init__(
        self, width: int, experts: int, experts_per_token: int, layer: int, noise: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(ATTRIBUTE_BITS, width)
        self.norm = nn.LayerNorm(width)
        self.wg = nn.Linear(width, experts, bias=False)
        self.experts = experts
        self.experts_per_token = experts_per_token
        self.layer = layer
        self.noise = noise

    def forward(self, plan: RoutingPlan) -> AttributeDecision:
        probabilities_CE = self.probabilities(
            plan.classes, plan.noise if self.training and self.noise else None
        )
        top_CK, experts_CK = probabilities_CE.topk(self.experts_per_token, dim=-1)
        weights_CK = (
            top_CK / top_CK.sum(dim=-1, keepdim=True) if self.experts_per_token > 1 else top_CK
        )
        first_CE = F.one_hot(experts_CK[:, 0], self.experts).float()
        shares_BC = plan.shares_BC
        auxiliary_loss = (
            self.experts
            * ((shares_BC @ probabilities_CE) * (shares_BC @ first_CE)).sum(dim=-1).mean()
        )
        return AttributeDecision(experts_CK.tolist(), weights_CK, auxiliary_loss)

    def probabilities(
        self, classes: tuple[int, ...], noise: tuple[int, int] | None = None
    ) -> Tensor:
        """p_CE of the attribute classes, float32; with noise where (seed, step) is given."""
        device = self.wg.weight.device
        with torch.autocast(device.type, enabled=False):
            bits = torch.tensor(
                [attribute_bits(c) for c in classes], dtype=torch.float32, device=device
            ).view(-1, ATTRIBUTE_BITS)
            hidden = _embedded(bits, self.embed, self.norm)
            logits_CE = F.linear(hidden, full_precision(self.wg.weight))
            if noise is not None:
                logits_CE = logits_CE + self._noise(classes, noise).to(device)
            return logits_CE.softmax(dim=-1)

    def _noise(self, classes: tuple[int, ...], noise: tuple[int, int]) -> Tensor:
        rows = []
        for attributes in classes:
            generator = torch.Generator().manual_seed(
                stable_seed("gate noise", *noise, self.layer, attributes)
            )
            rows.append(torch.randn(self.experts, generator=generator))
        return torch.stack(rows) / self.experts


class AttributeEmbedding(nn.Module):
    """h = LayerNorm(W_t a + b_t) of each token's attribute vector, for gates that read it beside
    the token; zero at padding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(ATTRIBUTE_BITS, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, plan: RoutingPlan) -> Tensor:
        """(T, M), float32, over the whole stream of the plan."""
        bits = torch.tensor(
            [attribute_bits(c) for c in plan.classes],
            dtype=torch.float32,
            device=self.embed.weight.device,
        ).view(-1, ATTRIBUTE_BITS)
        rows_CM = _embedded(bits, self.embed, self.norm)
        rows = torch.cat(
            [rows_CM, rows_CM.new_zeros(1, rows_CM.shape[1])]
        )  # The last row, index -1, is padding's.
        indices, lengths = (
            torch.tensor(column, device=rows.device) for column in zip(*plan.segments, strict=True)
        )
        return rows[indices.repeat_interleave(lengths)]


class TokenGate(nn.Module):
    """GShard's gate, a decision per token: p = softmax(W_g x), the top k, weights as in
    `AttributeGate`, without noise.

    Its auxiliary loss is E * sum_e (mean p_e) (share of tokens whose first expert is e) over all
    tokens of the stream.
    with_attributes: the gate reads the sum of the token and of its attributes' embedding.
    """

    def __init__(
        self, width: int, experts: int, experts_per_token: int, with_attributes: bool = False
    ) -> None:
        super().__init__()
        if with_attributes:
            self.attributes = AttributeEmbedding(width)
        self.wg = nn.Linear(width, experts, bias=False)
        self.experts_per_token = experts_per_token

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, Tensor]:
        """experts_TK (int64), weights_TK (float32) and the auxiliary loss."""
        if hasattr(self, "attributes"):
            x_TM = x_TM + self.attributes(plan)
        probabilities_TE = F.linear(x_TM.float(), full_precision(self.wg.weight)).softmax(dim=-1)
        top_TK, experts_TK = probabilities_TE.topk(self.experts_per_token, dim=-1)
        weights_TK = (
            top_TK / top_TK.sum(dim=-1, keepdim=True) if self.experts_per_token > 1 else top_TK
        )
        experts = probabilities_TE.shape[1]
        first_TE = F.one_hot(experts_TK[:, 0], experts).float()
        return (
            experts_TK,
            weights_TK,
            experts * (probabilities_TE.mean(dim=0) * first_TE.mean(dim=0)).sum(),
        )


def keep_full_precision(parameter: Tensor, values: Tensor) -> None:
    """Let a gate compute with `values` (float32) in the place of its parameter, which holds them
    rounded.
    """
    vars(parameter)["full_precision"] = values


def full_precision(parameter: Tensor) -> Tensor:
    """The weights that a gate computes with, float32: where training in bfloat16 keeps them
    (`keep_full_precision`) its master weights, else the parameter. The gradient is the
    parameter's.

    Experts whose probabilities are nearly equal must not be told apart by the rounding of a gate's
    weights, which are few.
    """
    values = vars(parameter).get("full_precision")
    if values is None:
        return parameter.float()
    exact: Tensor = _InPlaceOf.apply(parameter, values)
    return exact


class _InPlaceOf(torch.autograd.Function):
    """Values in the place of a parameter, to which their gradient goes."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _embedded(bits_CA: Tensor, embed: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(W_t a + b_t) of attribute vectors, float32."""
    hidden_CM = F.linear(bits_CA, full_precision(embed.weight), full_precision(embed.bias))
    scale, shift = full_precision(norm.weight), full_precision(norm.bias)
    return F.layer_norm(hidden_CM, norm.normalized_shape, scale, shift, norm.eps)
