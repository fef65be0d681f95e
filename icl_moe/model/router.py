"""Which experts a token goes to: gates, and the plan of a batch's attribute classes that
they read.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.seeds import stable_seed
from icl_moe.tasks import ATTRIBUTE_BITS, PADDING, attribute_bits


@dataclass(frozen=True)
class RoutingPlan:
    """Where the attribute classes of a batch lie, worked out once and read by every sparse layer.

    classes: the distinct attribute classes, without padding.
    segments: (index into classes, or -1 for padding; tokens) of each run of equal class, in stream
    order. lengths: tokens of each episode, padding included.
    shares_BC: of each episode's tokens that are no padding, the share of each class (float32); rows
    add up to 1.
    noise: (seed, step) of the gate noise, or None for none.
    """

    classes: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
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
            lengths,
            counts_BC / counts_BC.sum(dim=1, keepdim=True).clamp(min=1),
        )

    def episode_means(self, values_TE: Tensor) -> Tensor:
        """(B, E): the means over each episode's tokens that are no padding."""
        sums_BE = values_TE.new_zeros(len(self.lengths) + 1, values_TE.shape[1])
        sums_BE = sums_BE.index_add(0, self._episodes_T, values_TE)[:-1]
        counts_B = self._episodes_T.bincount(minlength=len(self.lengths) + 1)[:-1]
        return sums_BE / counts_B.clamp(min=1)[:, None]

    @cached_property
    def _episodes_T(self) -> Tensor:
        """The number of each token's episode, and one past the last at padding."""
        lengths = np.asarray(self.lengths)
        episodes_T = np.repeat(np.arange(len(lengths)), lengths)
        indices, runs = np.asarray(self.segments).T
        episodes_T[np.repeat(indices, runs) < 0] = len(lengths)
        return torch.from_numpy(episodes_T).to(self.shares_BC.device)

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
    every rank and under recomputation. All in float32. The auxiliary loss is GShard's, E * sum_e
    (mean p_e) (share of tokens whose first expert is e), per episode over its tokens that are no
    padding, then averaged over the episodes.
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
            hidden = F.linear(bits, self.embed.weight.float(), self.embed.bias.float())
            hidden = F.layer_norm(
                hidden,
                self.norm.normalized_shape,
                self.norm.weight.float(),
                self.norm.bias.float(),
                self.norm.eps,
            )
            logits_CE = F.linear(hidden, self.wg.weight.float())
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


def balancing_loss(probabilities_TE: Tensor, first_T: Tensor, plan: RoutingPlan) -> Tensor:
    """GShard's auxiliary loss of gates that decide for each token, per episode over its tokens that
    are no padding, then averaged over the episodes, so that neither the layout nor the division
    into micro-batches changes it:

        E * sum_e (mean p_e) (share of tokens whose first expert is e)

    probabilities_TE: p of each token. first_T: the expert that each token has chosen first.
    """
    experts = probabilities_TE.shape[1]
    first_BE = plan.episode_means(F.one_hot(first_T, experts).to(probabilities_TE.dtype))
    return experts * (plan.episode_means(probabilities_TE) * first_BE).sum(dim=-1).mean()


class AttributeEmbedding(nn.Module):
    """h = LayerNorm(W_t a + b_t) of each token's attribute vector, for gates that read it beside
    the token; zero at padding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(ATTRIBUTE_BITS, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, plan: RoutingPlan) -> Tensor:
        """(T, M) over the whole stream of the plan."""
        bits = self.embed.weight.new_tensor([attribute_bits(c) for c in plan.classes]).view(
            -1, ATTRIBUTE_BITS
        )
        rows_CM = self.norm(self.embed(bits))
        rows = torch.cat(
            [rows_CM, rows_CM.new_zeros(1, rows_CM.shape[1])]
        )  # The last row, index -1, is padding's.
        indices, lengths = (
            torch.tensor(column, device=rows.device) for column in zip(*plan.segments, strict=True)
        )
        return rows[indices.repeat_interleave(lengths)]


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
        """experts_TK (int64), weights_TK (float32) and the auxiliary loss."""
        if hasattr(self, "attributes"):
            x_TM = x_TM + self.attributes(plan)
        probabilities_TE = F.linear(x_TM.float(), self.wg.weight.float()).softmax(dim=-1)
        top_TK, experts_TK = probabilities_TE.topk(self.experts_per_token, dim=-1)
        weights_TK = (
            top_TK / top_TK.sum(dim=-1, keepdim=True) if self.experts_per_token > 1 else top_TK
        )
        return experts_TK, weights_TK, balancing_loss(probabilities_TE, experts_TK[:, 0], plan)
