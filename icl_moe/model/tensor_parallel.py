"""Tensor parallelism: which part of each exported parameter a tensor rank holds, and a decoder
spread over tensor ranks.

`split` returns a tensor rank's part of a parameter, or of a moment of its shape; `join` assembles
the whole from the parts of all tensor ranks. Both use the name that a parameter has in an exported
model (`icl_moe.model.deepspeed_moe.exported_name`), and are plain functions of tensors.

The vocabulary embedding is split by rows, attention by heads, and dense feed-forwards by hidden
units. Everything else, including experts, is whole on every tensor rank.

megatron-core is imported only if there is more than one tensor rank: inference and training on one
device do not need it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.model.decoder import DecoderLayer, InContextDecoder
from icl_moe.model.feed_forward import FeedForward
from icl_moe.seeds import stable_seed

_VOCABULARY = "token_embedding.weight"
_QKV = re.compile(r"layers\.\d+\.attention\.qkv\.(weight|bias)")
_COLUMNS = re.compile(r"layers\.\d+\.feed_forward\.up\.(weight|bias)")
"""ColumnParallelLinear: output features, which are dimension 0 of torch's (out, in) weights, are
spread.
"""
_ROWS = re.compile(r"layers\.\d+\.(attention\.out|feed_forward\.down)\.weight")
"""RowParallelLinear: input features, dimension 1, are spread; the bias is added once, after the sum
over the ranks.
"""


def is_split(name: str) -> bool:
    """Whether the tensor ranks hold different parts of a parameter."""
    return name == _VOCABULARY or any(
        pattern.fullmatch(name) for pattern in (_QKV, _COLUMNS, _ROWS)
    )


def split(name: str, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a parameter that tensor rank `tp_rank` of `tp_size` holds; a view if possible.

    The vocabulary is padded with rows of zeros to a multiple of `tp_size`. Each rank holds the
    queries, keys and values of its own heads from the fused (3M, ..) projection.
    """
    if not is_split(name):
        return whole
    if name == _VOCABULARY:
        padding = -whole.shape[0] % tp_size
        whole = F.pad(whole, (0, 0, 0, padding)) if padding else whole
    if _QKV.fullmatch(name):
        return whole.unflatten(0, (3, tp_size, -1))[:, tp_rank].flatten(0, 1)
    return whole.chunk(tp_size, dim=1 if _ROWS.fullmatch(name) else 0)[tp_rank]


def join(name: str, parts: Sequence[Tensor], vocabulary_size: int) -> Tensor:
    """The inverse of `split`, from the parts by tensor rank: the vocabulary is cut to its
    `vocabulary_size` rows.
    """
    if not is_split(name):
        return parts[0]
    if _QKV.fullmatch(name):
        return torch.cat([part.unflatten(0, (3, 1, -1)) for part in parts], dim=1).flatten(0, 2)
    whole = torch.cat(list(parts), dim=1 if _ROWS.fullmatch(name) else 0)
    return whole[:vocabulary_size] if name == _VOCABULARY else whole


def spread(model: InContextDecoder) -> None:
    """Cut a whole decoder, in place, to this tensor rank's part, on megatron-core's layers; its
    expert layers do not change.

    The whole weights are drawn first and then split, so they do not depend on the layout.
    megatron-core's groups must exist.
    """
    from megatron.core import parallel_state

    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    whole = dict(model.named_parameters())
    padded_vocabulary = -(-model.config.vocabulary_size // size) * size
    model.add_module(
        "token_embedding", _vocabulary_embedding(padded_vocabulary, model.settings.width)
    )
    for layer in model.get_submodule("layers").children():
        assert isinstance(layer, DecoderLayer)
        layer.attention.heads //= size
        layer.attention.dropout_draws = partial(own_draws, rank)
        _spread_linears(layer.attention, "qkv", "out")
        if isinstance(layer.feed_forward, FeedForward):
            _spread_linears(layer.feed_forward, "up", "down")
    model.target_losses = partial(
        vocabulary_parallel_losses, vocabulary_size=model.config.vocabulary_size
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is not whole[name]:
                parameter.copy_(split(name, whole[name], rank, size))


def vocabulary_parallel_losses(
    hidden_PM: Tensor,
    embedding_VM: Tensor,
    labels_P: Tensor,
    weights_P: Tensor,
    vocabulary_size: int,
) -> tuple[Tensor, Tensor]:
    """`icl_moe.model.kernels.cross_entropy` where each tensor rank holds its rows V of the
    embedding, with padding in the last ones'.
    """
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_PV = F.linear(enter(hidden_PM), embedding_VM).float()
    real = max(0, vocabulary_size - get_tensor_model_parallel_rank() * embedding_VM.shape[0])
    if real < embedding_VM.shape[0]:
        # Padding is not a token: it takes no part in the softmax and gets no gradient.
        logits_PV[:, real:] = -torch.inf
    losses_P: Tensor = vocab_parallel_cross_entropy(logits_PV, labels_P)
    return (losses_P * weights_P).sum(), losses_P.detach()


def enter(x: Tensor) -> Tensor:
    """The beginning of divided work on a value that all tensor ranks have: the identity, whose
    gradient is summed over the ranks.
    """
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    entered: Tensor = copy_to_tensor_model_parallel_region(x)
    return entered


def leave(x: Tensor) -> Tensor:
    """The end of divided work: the sum over the tensor ranks, whose gradient is the identity."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    # Contiguous, since megatron-core would reduce a copy of anything else, and drop it.
    left: Tensor = reduce_from_tensor_model_parallel_region(x.contiguous())
    return left


@contextmanager
def own_draws(tp_rank: int, device: torch.device) -> Iterator[None]:
    """Within this context, torch's generators on the host and on `device` are seeded by the host's
    generator and the tensor rank, so that the draws for the ranks' different heads differ.
    Afterwards both are in the same state on every tensor rank, so that the draws for values that
    all of them have are equal.
    """
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stable_seed("tensor rank", seed, tp_rank))
        yield


def share_of_rows(rows: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """This tensor rank's share, about N / tp_size, of rows (N, M)."""
    return rows[len(rows) * tp_rank // tp_size : len(rows) * (tp_rank + 1) // tp_size]


def place_share(share: Tensor, rows: int, tp_rank: int, tp_size: int) -> Tensor:
    """A share of `rows` rows at its place among them, (rows, M); the rows of the other ranks are
    zero.
    """
    start = rows * tp_rank // tp_size
    return F.pad(share, (0, 0, start, rows - start - len(share)))


def _vocabulary_embedding(padded_size: int, width: int) -> nn.Module:
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    embedding: nn.Module = VocabParallelEmbedding(
        padded_size, width, init_method=nn.init.zeros_, config=_megatron_config()
    )
    return embedding


def _spread_linears(module: nn.Module, first: str, second: str) -> None:
    """Replace two linear layers, with something elementwise or headwise between them, by a column-
    and a row-parallel one.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def sizes(name: str) -> tuple[int, int]:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.in_features, linear.out_features

    options: dict[str, Any] = dict(
        config=_megatron_config(), init_method=nn.init.zeros_, bias=True, skip_bias_add=False
    )
    columns = ColumnParallelLinear(*sizes(first), gather_output=False, **options)
    rows = RowParallelLinear(*sizes(second), input_is_parallel=True, **options)
    for name, linear in ((first, columns), (second, rows)):
        linear.register_forward_hook(_output_only)
        setattr(module, name, linear)


def _output_only(
    _: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]
) -> Tensor:
    """megatron-core's linear layers also return a bias for the caller to add; it is None here."""
    return outputs[0]


def _megatron_config() -> object:
    """A configuration without megatron-core's initialisation. It says "on the CPU" because the
    weights are drawn there for any training device.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size

    return ModelParallelConfig(
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
    )
