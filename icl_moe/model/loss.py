"""The training loss: cross-entropy at target positions, and the experts' auxiliary loss."""

from typing import NamedTuple

import torch
from torch import Tensor


class DecoderLoss(NamedTuple):
    """The loss of a micro-batch and its parts, each a scalar tensor.

    total: what is differentiated. auxiliary: the mean of the layers' auxiliary losses, before its
    weight. image_sum, text_sum: weighted sums of the cross-entropy (nats) over targets of that
    modality; image_weight, text_weight: the sums of their weights.
    """

    total: Tensor
    auxiliary: Tensor
    image_sum: Tensor
    image_weight: Tensor
    text_sum: Tensor
    text_weight: Tensor


def combine(
    weighted_sum: Tensor,
    losses_P: Tensor,
    weights_P: Tensor,
    visual_P: Tensor,
    scale: float,
    auxiliary_losses: list[Tensor],
    auxiliary_weight: float,
) -> DecoderLoss:
    """total = scale * weighted_sum + auxiliary_weight * mean over layers of the auxiliary loss.

    weighted_sum, losses_P: the results of `icl_moe.model.kernels.cross_entropy`. scale: for one
    batch alone, 1 / (sum of weights); under the engine, which averages over ranks and micro-steps,
    (ranks x micro-steps) / (sum of weights over the global batch).
    """
    weighted_P = losses_P * weights_P
    auxiliary = torch.stack(auxiliary_losses).mean() if auxiliary_losses else losses_P.new_zeros(())
    image, text = visual_P.to(weights_P.dtype), (~visual_P).to(weights_P.dtype)
    return DecoderLoss(
        total=weighted_sum * scale + auxiliary_weight * auxiliary,
        auxiliary=auxiliary.detach(),
        image_sum=(weighted_P * image).sum(),
        image_weight=(weights_P * image).sum(),
        text_sum=(weighted_P * text).sum(),
        text_weight=(weights_P * text).sum(),
    )
