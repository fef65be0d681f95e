"""A micro-batch: episodes of one step, laid end to end, as tensors that the decoder reads.

A room of its own because the loader makes batches, the decoder reads them and the benchmarks need
both without any files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from icl_moe.model.router import RoutingPlan
from icl_moe.sequence import TokenSequence
from icl_moe.tasks import PADDING
from icl_moe.vocabulary import Vocabulary

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class TokenBatch:
    """B episodes as one stream of T tokens with P targets.

    tokens_T, positions_T: int64. lengths: tokens of each episode. real_T: False at padding, None
    where there is none.
    routing: the plan of attribute classes. predictors_P: where in the stream each target is
    predicted (the token before it);
    labels_P: the target's id; weights_P: its loss weight (float32); visual_P: whether it is an
    image code.
    loss_scale: see `icl_moe.model.loss.combine`. task: the task of its episodes, or "mixed".
    sources: a name of each episode, for messages.
    """

    tokens_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    real_T: Tensor | None
    routing: RoutingPlan
    predictors_P: Tensor
    labels_P: Tensor
    weights_P: Tensor
    visual_P: Tensor
    loss_scale: float
    task: str
    sources: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """A batch travels between processes as one tensor: each tensor that does costs a file and a
        handshake, more than its content.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)} | {
            "shares_BC": self.routing.shares_BC
        }
        # The widest elements first, so that each part begins where its type may.
        parts = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        content = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in parts])
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in parts]
        rest = {name: value for name, value in values.items() if name not in tensors}
        return _unpack, (
            content,
            layout,
            {**rest, "routing": replace(self.routing, shares_BC=torch.empty(0))},
        )

    def to(self, device: torch.device | str) -> "TokenBatch":
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
            elif isinstance(value, RoutingPlan):
                moved[field.name] = value.to(device)
        return replace(self, **moved)


def _unpack(
    content: Tensor, layout: list[tuple[str, torch.dtype, torch.Size]], rest: dict[str, Any]
) -> TokenBatch:
    """The inverse of `TokenBatch.__reduce__`; its tensors are views of `content`."""
    tensors: dict[str, Any] = {}
    start = 0
    for name, dtype, shape in layout:
        stop = start + shape.numel() * dtype.itemsize
        tensors[name] = content[start:stop].view(dtype).view(shape)
        start = stop
    routing = replace(rest.pop("routing"), shares_BC=tensors.pop("shares_BC"))
    return TokenBatch(**tensors, **rest, routing=routing)


def collate(
    sequences: Sequence[TokenSequence],
    vocabulary: Vocabulary,
    task: str,
    layout: Layout = "packed",
    input_weight: float = 0.0,
    loss_scale: float | None = None,
    sources: Sequence[str] = (),
) -> TokenBatch:
    """Lay sequences of the padded layout end to end, in the layout asked for. `loss_scale` None: 1
    / (sum of this batch's weights).
    """
    if layout == "packed":
        sequences = [sequence.unpadded() for sequence in sequences]
    lengths = tuple(len(sequence) for sequence in sequences)
    tokens_T = np.concatenate([sequence.tokens_L for sequence in sequences])
    attributes_T = np.concatenate([sequence.attributes() for sequence in sequences])
    weights_T = np.concatenate([sequence.loss_weights(input_weight) for sequence in sequences])
    targets = np.flatnonzero(weights_T > 0)
    real_T = attributes_T != PADDING
    labels = tokens_T[targets]
    image = vocabulary.image_range
    total = float(weights_T.sum())
    return TokenBatch(
        tokens_T=torch.from_numpy(tokens_T.astype(np.int64)),
        positions_T=torch.from_numpy(
            np.concatenate([sequence.positions_L for sequence in sequences]).astype(np.int64)
        ),
        lengths=lengths,
        real_T=None if real_T.all() else torch.from_numpy(real_T),
        routing=RoutingPlan.from_attributes(attributes_T, lengths),
        predictors_P=torch.from_numpy(targets - 1),
        labels_P=torch.from_numpy(labels.astype(np.int64)),
        weights_P=torch.from_numpy(weights_T[targets]),
        visual_P=torch.from_numpy((labels >= image.start) & (labels < image.stop)),
        loss_scale=1.0 / max(total, 1.0) if loss_scale is None else loss_scale,
        task=task,
        sources=tuple(sources),
    )
