"""The products that take most of the time, each behind a plain function with torch's meaning.

    linear(x, W, b)                      torch.nn.functional.linear
    causal_attention(q, k, v, dropout)   scaled_dot_product_attention with is_causal
    varlen_attention(q, k, v, offsets)   the same of episodes of any lengths, on a GPU
    cross_entropy(h, E, labels, weights) the weighted cross-entropy of h E^T, and each loss

Where torch's own kernel is the fastest, it is called; on CPUs ours are, and docs/performance.md has
the figures. tests/model/test_kernels.py holds each to torch's values and gradients.
"""

from icl_moe.model.kernels.blockwise_attention import causal_attention
from icl_moe.model.kernels.chunked_cross_entropy import cross_entropy
from icl_moe.model.kernels.onednn_linear import Linear, linear
from icl_moe.model.kernels.varlen_attention import has_varlen, varlen_attention

__all__ = [
    "Linear",
    "causal_attention",
    "cross_entropy",
    "has_varlen",
    "linear",
    "varlen_attention",
]
