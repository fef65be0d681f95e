"""The FLOPs of a batch and the peak FLOP/s of a device, which give the model FLOPs utilisation
(MFU).
"""

import re
from typing import Any, NamedTuple

import torch

from icl_moe.batch import TokenBatch
from icl_moe.model.feed_forward import routes_streams
from icl_moe.recipe import ModelSettings

_TERA = 1e12


class _Peak(NamedTuple):
    """Dense matrix products in TFLOP/s; None if the device lacks the format."""

    bf16: float | None
    tf32: float | None
    fp32: float


_PEAKS = {
    "B200": _Peak(2250, 1125, 75),
    "GH200": _Peak(989.4, 494.7, 66.9),
    "H200 NVL": _Peak(835.5, 417.5, 60),
    "H200": _Peak(989.4, 494.7, 66.9),
    "H100 PCIe": _Peak(756.5, 378, 51.2),
    "H100 NVL": _Peak(835.5, 417.5, 60),
    "H100": _Peak(989.4, 494.7, 66.9),
    "A100": _Peak(312, 156, 19.5),
    "A40": _Peak(149.7, 74.8, 37.4),
    "A10": _Peak(125, 62.5, 31.2),
    "RTX A6000": _Peak(154.8, 77.4, 38.7),
    "L40S": _Peak(362, 183, 91.6),
    "L4": _Peak(121, 60, 30.3),
    "V100-PCIE": _Peak(None, None, 14),
    "V100": _Peak(None, None, 15.7),
}
"""A word in the name of the device -> its peak, the more specific words first. Figures are from
NVIDIA's data sheets; those with sparsity are halved. H100 without a suffix is the SXM module, whose
name is "NVIDIA H100 80GB HBM3".
"""


def training_flops(settings: ModelSettings, vocabulary_size: int, batch: TokenBatch) -> int:
    """Floating-point operations of the matrix products of a forward and backward pass over a batch.

    With T tokens, R of them without padding, P targets, episodes of L tokens, width M, V rows of
    the vocabulary, k experts per token and two operations per multiplication and addition, a
    forward pass takes

        attention, per layer             8 T M^2 + sum over episodes of 2 L (L + 1) M
        dense feed-forward, per layer   16 T M^2
        experts, per layer              16 k R M^2, or 16 R M^2 with merged weights
        token gates, per layer           2 T M E
        link                             2 C M^2, C the distinct codes in the links
        logits                           2 P M V

    and a backward pass twice as much. Attention counts a token's own past and itself; logits are
    made at targets only. This counts only what the model needs, as Chowdhery et al. 2022 (PaLM,
    appendix B) define MFU: neither recomputation by activation checkpointing, nor padded buffers of
    experts, nor attribute gates, whose cost is negligible.
    """
    tokens, width = len(batch.tokens_T), settings.width
    attention = 8 * tokens * width**2 + sum(
        2 * length * (length + 1) * width for length in batch.lengths
    )
    dense, sparse = 16 * tokens * width**2, _expert_flops(settings, batch)
    sparse_layers = len(settings.sparse_layers)
    layers = (
        settings.layers * attention
        + (settings.layers - sparse_layers) * dense
        + sparse_layers * sparse
    )
    linked = len(batch.links_T2.unique()) if settings.link else 0
    link = 2 * linked * width**2
    return 3 * (layers + link + 2 * len(batch.labels_P) * width * vocabulary_size)


def _expert_flops(settings: ModelSettings, batch: TokenBatch) -> int:
    """FLOPs of the forward pass of one sparse layer."""
    tokens, real, width = len(batch.tokens_T), real_tokens(batch), settings.width
    experts = 1 if settings.combination == "weights" else settings.experts_per_token
    if routes_streams(settings):
        return 16 * experts * real * width**2
    # Stock layers do not skip padding.
    return 16 * experts * tokens * width**2 + 2 * tokens * width * settings.experts


def real_tokens(batch: TokenBatch) -> int:
    """The number of tokens without padding."""
    return sum(length for index, length in batch.routing.segments if index >= 0)


def peak_flops(device: torch.device, engine_config: dict[str, Any]) -> float | None:
    """The peak FLOP/s of `device` in the precision of the training; None if it is unknown, as on a
    CPU.
    """
    if device.type != "cuda":
        return None
    bf16 = engine_config.get("bf16", {}).get("enabled", False)
    precision = "bf16" if bf16 else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(device_name: str, precision: str) -> float | None:
    """FLOP/s by the table above; precision is bf16, tf32 or fp32."""
    for name, peak in _PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            tera = getattr(peak, precision)
            return None if tera is None else tera * _TERA
    return None
