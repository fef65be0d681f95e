"""Linear layers, with the products of float32 on a CPU done by oneDNN.

PyTorch passes products in bfloat16 to oneDNN, which chooses its kernel by the processor's
instructions, but those in float32 to MKL, which chooses by the processor's vendor: on an AMD
processor with AVX-512 that halves the rate (docs/performance.md has the figures).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
"""Whether this build of PyTorch has MKL and oneDNN; asked once, since torch.compile cannot ask."""


class Linear(nn.Linear):
    """nn.Linear, faster in float32 on CPUs that MKL does not favour."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, as torch.nn.functional.linear: x (.., I) to (.., O)."""
    if not _goes_to_onednn(x):
        return F.linear(x, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return _onednn_linear(x, weight_OI, bias_O)
    out: Tensor = _OneDNNLinear.apply(x, weight_OI, bias_O)
    return out


def product(a_IK: Tensor, b_KJ: Tensor) -> Tensor:
    """The matrix product (I, J), without a gradient."""
    return _onednn_linear(a_IK, b_KJ.t(), None) if _goes_to_onednn(a_IK) else a_IK @ b_KJ


def _goes_to_onednn(x: Tensor) -> bool:
    plain = (
        x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    )
    # oneDNN supports neither empty products, such as the rows of an idle expert, nor vectors.
    matrix = x.dim() > 1 and x.numel() > 0
    return plain and matrix and _HAS_BOTH


def _onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    # The operator that torch.compile's CPU backend emits for a linear layer; its last three
    # arguments fuse no function into it.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return out


class _OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b;  dx = dy W,  dW = dy^T x,  db = sum of the rows of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _onednn_linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        (dy,) = gradients
        dy_NO = dy.flatten(0, -2)
        return (
            _onednn_linear(dy, weight_OI.t(), None) if needs_x else None,
            _onednn_linear(dy_NO.t(), x.flatten(0, -2).t(), None) if needs_weight else None,
            dy_NO.sum(dim=0) if needs_bias else None,
        )
