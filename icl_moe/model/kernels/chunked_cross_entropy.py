"""Cross-entropy over a large vocabulary, without ever holding the logits of many targets."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icl_moe.model.kernels.onednn_linear import product

CHUNK = 1024
"""Targets whose logits exist at a time: each chunk costs a pass over the whole embedding's
gradient, and each target V logits.
"""
ROWS = 64
"""Targets whose softmax is computed at a time, in float32: few enough for a processor's cache."""
GPU_CHUNK = 4096
"""The value of both `CHUNK` and `ROWS` on a GPU: with fewer targets, most of its time would go into
launching kernels. With 50,000 ids a chunk takes 1.2 GB in bfloat16.
"""


def cross_entropy(
    hidden_PM: Tensor, embedding_VM: Tensor, labels_P: Tensor, weights_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets in nats, float32: sum(weights * losses), to be differentiated,
    and losses_P, not to be.

    Logits exist at these P positions only, and at a chunk of them at a time.
    """
    total, losses_P = _ChunkedCrossEntropy.apply(hidden_PM, embedding_VM, labels_P, weights_P)
    return total, losses_P


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum over p of w_p (log sum_v exp z_pv - z_py) with z = h E^T, whose gradient is found in the
    forward pass, chunk by chunk:

        dz = w (softmax(z) - onehot(y));   dh = dz E;   dE = sum over chunks of dz^T h

    so that no logits wait for the backward pass, which only multiplies by the gradient of the sum
    (as Liger Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_PM: Tensor, embedding_VM: Tensor, labels_P: Tensor, weights_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:2])
        losses_P = torch.empty(len(labels_P), device=hidden_PM.device)
        dhidden_PM, dembedding_VM = torch.empty_like(hidden_PM), None
        chunk, rows = (CHUNK, ROWS) if hidden_PM.device.type == "cpu" else (GPU_CHUNK, GPU_CHUNK)
        for start in range(0, len(labels_P), chunk):
            part = slice(start, start + chunk)
            logits_NV = product(hidden_PM[part], embedding_VM.t())
            losses_P[part] = _losses_and_gradient(
                logits_NV, labels_P[part], weights_P[part], wanted, rows
            )
            if wanted:
                dhidden_PM[part] = product(logits_NV, embedding_VM)
                dchunk_VM = product(logits_NV.t(), hidden_PM[part])
                # Several chunks are added up in float32, whatever the precision of the model.
                dembedding_VM = (
                    dchunk_VM if dembedding_VM is None else dembedding_VM.float().add_(dchunk_VM)
                )
        if dembedding_VM is not None:
            ctx.save_for_backward(dhidden_PM, dembedding_VM.to(embedding_VM.dtype))
        ctx.mark_non_differentiable(losses_P)
        return (losses_P * weights_P).sum(), losses_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden_PM, dembedding_VM = ctx.saved_tensors
        scale = gradients[0]
        return (
            dhidden_PM * scale.to(dhidden_PM.dtype),
            dembedding_VM * scale.to(dembedding_VM.dtype),
            None,
            None,
        )


def _losses_and_gradient(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor, wanted: bool, rows: int
) -> Tensor:
    """The cross-entropy of each target, float32 (N,), `rows` at a time. Where `wanted`, the logits
    are overwritten by the gradient w (softmax - onehot).

    log sum exp z is computed at the most probable id m, as z_m - log softmax(z)_m, which saves a
    pass over the logits.
    """
    losses = []
    for logits_RV, labels_R, weights_R in zip(
        *(x.split(rows) for x in (logits_NV, labels_N, weights_N)), strict=True
    ):
        probabilities_RV = torch.softmax(logits_RV, dim=-1, dtype=torch.float32)
        target_R = logits_RV.gather(1, labels_R[:, None]).squeeze(1).float()
        losses.append(
            logits_RV.amax(dim=-1).float() - probabilities_RV.amax(dim=-1).log() - target_R
        )
        if wanted:
            rows_R = torch.arange(len(labels_R), device=labels_R.device)
            probabilities_RV[rows_R, labels_R] -= 1.0
            torch.mul(probabilities_RV, weights_R[:, None], out=logits_RV)
    return torch.cat(losses)
