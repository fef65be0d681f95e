"""Causal attention: PyTorch's fused kernels or, where those are slow, our own kernel, which
processes a block of queries at a time.

They are slow on a CPU: in bfloat16 most of the time goes outside the matrix products, and with
dropout there is no fused kernel, so the whole (L, L) matrix of every head is held until the
backward pass. Ours holds that of one block, and nothing for the backward pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256
"""Queries at a time: few enough for a block's scores to stay in the cache, enough for its products
to run at full rate.
"""


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the past, with dropout of its weights; all are (.., L, D),
    any number of heads before.
    """
    if queries.device.type == "cpu" and (dropout or queries.dtype == torch.bfloat16):
        return blockwise_attention(
            queries.flatten(0, -3), keys.flatten(0, -3), values.flatten(0, -3), dropout
        ).view(queries.shape)
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, dropout_p=dropout)


def blockwise_attention(
    queries_NLD: Tensor, keys_NLD: Tensor, values_NLD: Tensor, dropout: float
) -> Tensor:
    """`causal_attention` of N heads, by blocks.

    Dropout is drawn from a seed that is itself drawn from torch's generator, so that the backward
    pass finds the same again.
    """
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0
    out: Tensor = _BlockwiseAttention.apply(queries_NLD, keys_NLD, values_NLD, dropout, seed)
    return out


class _BlockwiseAttention(torch.autograd.Function):
    """For each block of queries, with S = q k^T / sqrt(D), P = softmax(S), K the scaled mask of
    dropout and o = (P * K) v:

        dv += (P * K)^T do;      dP = (do v^T) * K;   dS = P * (dP - rowsum(dP * P))
        dq = dS k / sqrt(D);     dk += dS^T q / sqrt(D)

    P is recomputed in the backward pass; dk and dv are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_NLD: Tensor,
        keys_NLD: Tensor,
        values_NLD: Tensor,
        dropout: float,
        seed: int,
    ) -> Tensor:
        queries_NLD, keys_NLD, values_NLD = (
            queries_NLD.contiguous(),
            keys_NLD.contiguous(),
            values_NLD.contiguous(),
        )
        ctx.save_for_backward(queries_NLD, keys_NLD, values_NLD)
        ctx.dropout, ctx.seed = dropout, seed
        out_NLD = torch.empty_like(queries_NLD)
        for start, stop in _blocks(queries_NLD.shape[1]):
            weights_NIJ = _probabilities(queries_NLD[:, start:stop], keys_NLD[:, :stop])
            if dropout:
                weights_NIJ.mul_(_keep(weights_NIJ, dropout, seed + start))
            out_NLD[:, start:stop] = weights_NIJ @ values_NLD[:, :stop]
        return out_NLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries_NLD, keys_NLD, values_NLD = ctx.saved_tensors
        dout_NLD = gradients[0].contiguous()
        dqueries_NLD = torch.empty_like(queries_NLD)
        dkeys_NLD, dvalues_NLD = (
            torch.zeros(x.shape, dtype=torch.float32) for x in (keys_NLD, values_NLD)
        )
        scale = 1 / math.sqrt(queries_NLD.shape[-1])
        for start, stop in _blocks(queries_NLD.shape[1]):
            queries_NID, keys_NJD, values_NJD, dout_NID = (
                queries_NLD[:, start:stop],
                keys_NLD[:, :stop],
                values_NLD[:, :stop],
                dout_NLD[:, start:stop],
            )
            probabilities_NIJ = _probabilities(queries_NID, keys_NJD)
            weights_NIJ, dprobabilities_NIJ = (
                probabilities_NIJ,
                dout_NID @ values_NJD.transpose(1, 2),
            )
            if ctx.dropout:
                keep_NIJ = _keep(probabilities_NIJ, ctx.dropout, ctx.seed + start)
                weights_NIJ = probabilities_NIJ * keep_NIJ
                dprobabilities_NIJ.mul_(keep_NIJ)
            dvalues_NLD[:, :stop] += weights_NIJ.transpose(1, 2) @ dout_NID
            dscores_NIJ = torch._softmax_backward_data(
                dprobabilities_NIJ, probabilities_NIJ, -1, probabilities_NIJ.dtype
            )
            torch.mul(dscores_NIJ @ keys_NJD, scale, out=dqueries_NLD[:, start:stop])
            dkeys_NLD[:, :stop] += dscores_NIJ.transpose(1, 2) @ (queries_NID * scale)
        return (
            dqueries_NLD,
            dkeys_NLD.to(keys_NLD.dtype),
            dvalues_NLD.to(values_NLD.dtype),
            None,
            None,
        )


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _probabilities(queries_NID: Tensor, keys_NJD: Tensor) -> Tensor:
    """softmax of the scores (N, I, J), of which the last I keys belong to the same positions as the
    queries.
    """
    queries, device = queries_NID.shape[1], queries_NID.device
    scores_NIJ = (queries_NID / math.sqrt(queries_NID.shape[-1])) @ keys_NJD.transpose(1, 2)
    future_II = torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)
    scores_NIJ[:, :, -queries:].masked_fill_(future_II, -math.inf)
    return scores_NIJ.softmax(dim=-1)


def _keep(like: Tensor, dropout: float, seed: int) -> Tensor:
    """The mask of dropout, scaled: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
