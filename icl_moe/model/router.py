"""The gates, which decide which experts a token goes to, and their auxiliary loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.attributes import ATTRIBUTE_BITS, attribute_bits, own_stream
from icl_moe.batch import RoutingPlan
from icl_moe.model.moe import Decision
from icl_moe.seeds import stable_seed

GATE = r"\.gate\."
"""A pattern that the names of gates' parameters match in an exported model, and no others."""


class StreamChoice(NamedTuple):
    """For each class c of a plan: its experts_CK (int64), best first, their weights_CK (float32),
    and the auxiliary loss.
    """

    experts_CK: Tensor
    weights_CK: Tensor
    auxiliary_loss: Tensor


def decide(
    gates: Mapping[int, "StreamGate"], plan: RoutingPlan
) -> tuple[dict[int, Decision], list[Tensor]]:
    """The decision of each layer whose gate reads attributes alone, and the auxiliary losses.

    These gates do not read the tokens, so all of them decide before the first layer runs, and the
    numbers of the experts are copied to the host in one transfer.
    """
    choices = [gate(plan) for gate in gates.values()]
    if not choices:
        return {}, []
    experts_GCK = torch.stack([choice.experts_CK for choice in choices]).tolist()
    decisions = {
        layer: Decision(experts_CK, choice.weights_CK)
        for layer, experts_CK, choice in zip(gates, experts_GCK, choices, strict=True)
    }
    return decisions, [choice.auxiliary_loss for choice in choices]


class StreamGate(nn.Module):
    """A gate that reads the attribute vector alone, so that whole streams go to the same experts.

    Its `forward` gives the `StreamChoice` of a plan.
    """


class FixedGate(StreamGate):
    """Gives each stream of a task one expert of its own (`own_stream`, modulo the number of
    experts), with weight 1. It has no parameters and no auxiliary loss.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, plan: RoutingPlan) -> StreamChoice:
        device = plan.shares_BC.device
        own_C = torch.tensor([own_stream(c) % self.experts for c in plan.classes]).long()
        own_C = own_C.to(device, non_blocking=True)
        weights_C = torch.ones(len(own_C), device=device)
        return StreamChoice(own_C[:, None], weights_C[:, None], torch.zeros((), device=device))


class AttributeGate(StreamGate):
    """Routes by the attribute vector alone, so it decides once per distinct vector
    (Uni-Perceiver-MoE).

        h = LayerNorm(W_t a + b_t);  p = softmax(W_g h + noise);  S = top-k(p)
        k = 2: w_i = p_i / (p_1 + p_2);   k = 1: w_1 = p_1, since a weight of 1 would give the gate
        no gradient

    In training noise is N(0, (1/E)^2), drawn from (seed, step, layer, attribute class): equal on
    every rank and under recomputation. Everything is in float32, the weights too
    (`full_precision`). The auxiliary loss is GShard's, E * sum_e (mean p_e) (share of tokens whose
    first expert is e), per episode over its tokens without padding, then averaged over the
    episodes.
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

    def forward(self, plan: RoutingPlan) -> StreamChoice:
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
        return StreamChoice(experts_CK, weights_CK, auxiliary_loss)

    def probabilities(
        self, classes: tuple[int, ...], noise: tuple[int, int] | None = None
    ) -> Tensor:
        """The probabilities p_CE of the experts for each attribute class, float32; with noise if
        (seed, step) is given.
        """
        device = self.wg.weight.device
        with torch.autocast(device.type, enabled=False):
            bits = _bits(classes, device)
            hidden = _embedded(bits, self.embed, self.norm)
            logits_CE = F.linear(hidden, full_precision(self.wg.weight))
            if noise is not None:
                noise_CE = self._noise(classes, noise)
                logits_CE = logits_CE + noise_CE.to(device, non_blocking=True)
            return logits_CE.softmax(dim=-1)

    def _noise(self, classes: tuple[int, ...], noise: tuple[int, int]) -> Tensor:
        rows = []
        for attributes in classes:
            generator = torch.Generator().manual_seed(
                stable_seed("gate noise", *noise, self.layer, attributes)
            )
            rows.append(torch.randn(self.experts, generator=generator))
        return torch.stack(rows) / self.experts


def balancing_loss(probabilities_TE: Tensor, first_T: Tensor, plan: RoutingPlan) -> Tensor:
    """GShard's auxiliary loss of gates that decide for each token, per episode over its tokens
    without padding, then averaged over the episodes, so that neither the layout nor the division
    into micro-batches changes it:

        E * sum_e (mean p_e) (share of tokens whose first expert is e)

    probabilities_TE: p of each token. first_T: the expert that each token has chosen first.
    """
    experts = probabilities_TE.shape[1]
    first_BE = plan.episode_means(F.one_hot(first_T, experts).to(probabilities_TE.dtype))
    return experts * (plan.episode_means(probabilities_TE) * first_BE).sum(dim=-1).mean()


class AttributeEmbedding(nn.Module):
    """h = LayerNorm(W_t a + b_t) of each token's attribute vector, for gates that read it besides
    the token; zero at padding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(ATTRIBUTE_BITS, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, plan: RoutingPlan) -> Tensor:
        """(T, M), float32, over the whole stream of the plan."""
        device = self.embed.weight.device
        rows_CM = _embedded(_bits(plan.classes, device), self.embed, self.norm)
        # The last row, index -1, is that of padding.
        rows = torch.cat([rows_CM, rows_CM.new_zeros(1, rows_CM.shape[1])])
        indices, lengths = np.asarray(plan.segments).T
        indices_T = torch.from_numpy(np.repeat(indices, lengths))
        return rows[indices_T.to(device, non_blocking=True)]


class TokenGate(nn.Module):
    """GShard's gate, a decision per token: p = softmax(W_g x), the top k, weights as in
    `AttributeGate`, without noise. Its auxiliary loss is `balancing_loss`.

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
        """Returns experts_TK (int64), weights_TK (float32) and the auxiliary loss."""
        if hasattr(self, "attributes"):
            x_TM = x_TM + self.attributes(plan)
        probabilities_TE = F.linear(x_TM.float(), full_precision(self.wg.weight)).softmax(dim=-1)
        top_TK, experts_TK = probabilities_TE.topk(self.experts_per_token, dim=-1)
        weights_TK = (
            top_TK / top_TK.sum(dim=-1, keepdim=True) if self.experts_per_token > 1 else top_TK
        )
        return experts_TK, weights_TK, balancing_loss(probabilities_TE, experts_TK[:, 0], plan)


def keep_full_precision(parameter: Tensor, values: Tensor) -> None:
    """Let a gate compute with `values` (float32) instead of its parameter, which holds them
    rounded.
    """
    vars(parameter)["full_precision"] = values


def full_precision(parameter: Tensor) -> Tensor:
    """The weights that a gate computes with, float32: the master weights if training in bfloat16
    keeps them (`keep_full_precision`), otherwise the parameter. The gradient is the
    parameter's.

    If the probabilities of two experts are nearly equal, the rounding of the gate's weights must
    not decide between them. These weights are few, so full precision costs little.
    """
    values = vars(parameter).get("full_precision")
    if values is None:
        return parameter.float()
    exact: Tensor = _InPlaceOf.apply(parameter, values)
    return exact


class _InPlaceOf(torch.autograd.Function):
    """Values that replace a parameter, which receives their gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _bits(classes: Sequence[int], device: torch.device) -> Tensor:
    """The attribute vectors of classes, (C, A), float32. The copy to a GPU does not wait for it."""
    bits = torch.tensor([attribute_bits(c) for c in classes], dtype=torch.float32)
    return bits.view(-1, ATTRIBUTE_BITS).to(device, non_blocking=True)


def _embedded(bits_CA: Tensor, embed: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(W_t a + b_t) of attribute vectors, float32."""
    hidden_CM = F.linear(bits_CA, full_precision(embed.weight), full_precision(embed.bias))
    scale, shift = full_precision(norm.weight), full_precision(norm.bias)
    return F.layer_norm(hidden_CM, norm.normalized_shape, scale, shift, norm.eps)
