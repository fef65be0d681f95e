"""Causal attention of episodes of different lengths in one stream, by one FlashAttention kernel on
a GPU, where a loop over the episodes would launch a kernel for each.
"""

from functools import cache

import torch
from torch import Tensor


def has_varlen(queries_THD: Tensor) -> bool:
    """Whether `varlen_attention` works for such queries: half precision on a CUDA device with
    FlashAttention (compute capability 8.0 and above), heads of at most 256 numbers, in eights.
    """
    return (
        queries_THD.dtype in (torch.bfloat16, torch.float16)
        and queries_THD.device.type == "cuda"
        and queries_THD.shape[-1] % 8 == 0
        and queries_THD.shape[-1] <= 256
        and _has_flash(queries_THD.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    queries_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    offsets: Tensor,
    longest: int,
    dropout: float = 0.0,
) -> Tensor:
    """Each episode attends to its own past, (T, H, D).

    offsets: where each episode begins, and T at the end, int32 on the device. longest: tokens of
    the longest one. It is the operator below torch.nn.attention.varlen, which has no dropout.
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        queries_THD, keys_THD, values_THD, offsets, offsets, longest, longest, dropout, True, False
    )[0]
    return out
