"""Causal self-attention that stays inside an episode, over a flat stream of tokens.

The decoder works on tokens_T, the concatenation of a batch's episodes, in every layout. What
differs between training, the padded layout and decoding with a cache is only how keys are reached,
which an `AttentionScope` knows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.model.kernels import Linear, causal_attention, has_varlen, varlen_attention
from icl_moe.recipe import ModelSettings


class AttentionScope(Protocol):
    """Which tokens attend to which. `attend` does so for one layer: queries, keys and values
    (T, H, D) in, values (T, H, D) out.
    """

    def attend(
        self, layer: int, queries_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, dropout: float
    ) -> Tensor: ...


class AttentionCache(Protocol):
    """What decoding needs of a key-value cache; see icl_moe.inference.cache."""

    @property
    def length(self) -> int: ...

    def append_attributes(self, attributes_BL: Tensor) -> Tensor: ...

    def update(
        self, layer: int, keys_BHLD: Tensor, values_BHLD: Tensor
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class EpisodeAttention:
    """Whole episodes, one after the other.

    lengths: tokens of each episode, padding included; they add up to T.
    real_T: False at padding, to which no token attends; None without padding. Episodes can be
    padded only if all have the same length.
    """

    lengths: tuple[int, ...]
    real_T: Tensor | None = None

    def attend(
        self, layer: int, queries_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, dropout: float
    ) -> Tensor:
        if len(set(self.lengths)) == 1:
            q, k, v = (
                x.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
                for x in (queries_THD, keys_THD, values_THD)
            )
            if self._mask_B1LL is None:
                out = causal_attention(q, k, v, dropout)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=self._mask_B1LL, dropout_p=dropout
                )
            return out.transpose(1, 2).flatten(0, 1)
        if has_varlen(queries_THD):
            longest = max(self.lengths)
            return varlen_attention(
                queries_THD,
                keys_THD,
                values_THD,
                _offsets(self.lengths, queries_THD.device),
                longest,
                dropout,
            )
        # An explicit mask over the whole stream would cost T x T; one episode at a time needs none.
        pieces = [
            x.transpose(0, 1).split(list(self.lengths), dim=1)
            for x in (queries_THD, keys_THD, values_THD)
        ]
        attended = [causal_attention(q, k, v, dropout) for q, k, v in zip(*pieces, strict=True)]
        return torch.cat(attended, dim=1).transpose(0, 1)

    @cached_property
    def _mask_B1LL(self) -> Tensor | None:
        if self.real_T is None:
            return None
        real_BL = self.real_T.unflatten(0, (len(self.lengths), -1))
        return _causal_mask(real_BL, queries=real_BL.shape[1])


class CachedAttention:
    """The newest tokens of B rows, which attend to all tokens before them through a cache.

    attributes_BL: attribute classes of the new tokens; where they are 0 (padding, on the left) a
    token is never attended to. They are read on the host, so that a GPU need not be waited for.
    """

    def __init__(
        self, cache: AttentionCache, attributes_BL: Tensor, device: torch.device | str
    ) -> None:
        self._cache = cache
        self._rows, self._new = attributes_BL.shape
        real_BL = cache.append_attributes(attributes_BL) != 0
        padded = not bool(real_BL.all())
        self._first = cache.length == self._new and not padded
        # A single token may attend to everything, and the first tokens need no mask of their own.
        self._mask_B1LL: Tensor | None = None
        if padded:
            self._mask_B1LL = _causal_mask(real_BL, self._new).to(device)
        elif self._new > 1 and not self._first:
            self._mask_B1LL = _causal_mask(real_BL[:1].to(device), self._new)

    def attend(
        self, layer: int, queries_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, dropout: float
    ) -> Tensor:
        q, k, v = (
            x.unflatten(0, (self._rows, self._new)).transpose(1, 2)
            for x in (queries_THD, keys_THD, values_THD)
        )
        k, v = self._cache.update(layer, k, v)
        if self._first:
            out = causal_attention(q, k, v, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._mask_B1LL, dropout_p=dropout
            )
        return out.transpose(1, 2).flatten(0, 1)


class SelfAttention(nn.Module):
    """GPT-2's multi-head attention: one fused projection in, one out."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = settings.heads
        self.dropout = settings.attention_dropout
        # Tensor-parallel training replaces this, for heads that are spread over ranks.
        self.dropout_draws: Callable[[torch.device], AbstractContextManager[None]] = _shared_draws
        self.qkv = Linear(settings.width, 3 * settings.width)
        self.out = Linear(settings.width, settings.width)

    def forward(self, x_TM: Tensor, scope: AttentionScope) -> Tensor:
        q, k, v = self.qkv(x_TM).unflatten(-1, (3, self.heads, -1)).unbind(1)
        dropout = self.dropout if self.training else 0.0
        with self.dropout_draws(x_TM.device) if dropout else nullcontext():
            attended_THD = scope.attend(self.layer, q, k, v, dropout)
        return self.out(attended_THD.flatten(1))


def _shared_draws(_: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


def _causal_mask(real_BL: Tensor, queries: int) -> Tensor:
    """Which tokens each query may attend to, (B, 1, queries, L): those before it and itself, but no
    padding. Padding attends to itself, so that its softmax is not empty.
    """
    length = real_BL.shape[1]
    positions = torch.arange(length, device=real_BL.device)
    rows = positions[length - queries :, None]
    causal = positions <= rows
    return ((causal & real_BL[:, None, :]) | (positions == rows))[:, None]


@lru_cache(maxsize=4)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The place of each episode in the stream, and its end, int32; every layer asks for them."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return offsets.to(device, non_blocking=True)
