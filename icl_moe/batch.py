"""A micro-batch: concatenated episodes of one step, as tensors that the decoder reads.

The loader makes batches and the decoder reads them, so that neither needs the other. Besides the
tokens, a batch contains the positions of each attribute class. For one segmentation episode of one
example, with 4 codes per image, in the packed layout:

    spans     [BOI] i i i i [BOI] m m m m [EOC] [BOI] i i i i [BOI] m m m m [EOC]
    classes   input side is class 0, target side is class 1
    segments  (0, 5) (1, 6) (0, 5) (1, 6)
    shares    0.45 0.55
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from icl_moe.attributes import PADDING
from icl_moe.sequence import LossOn, TokenSequence
from icl_moe.vocabulary import Vocabulary

Layout = Literal["packed", "padded"]


Run = tuple[int, int]
"""(attribute class, number of tokens) of consecutive tokens of one class."""


@dataclass(frozen=True)
class RoutingPlan:
    """The positions of the attribute classes in a batch, computed once and read by every sparse
    layer.

    classes: the distinct attribute classes, without padding.
    segments: (index into classes, or -1 for padding; number of tokens) of each run of equal class,
    in stream order. lengths: tokens of each episode, padding included.
    shares_BC: the share of each class among the tokens of each episode, without padding (float32);
    each row sums to 1.
    noise: (seed, step) of the gate noise, or None for none.
    """

    classes: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    shares_BC: Tensor
    noise: tuple[int, int] | None = None

    @classmethod
    def of_runs(cls, episodes: Sequence[Sequence[Run]]) -> "RoutingPlan":
        """The plan of a stream of episodes, from the runs of each episode."""
        counts = [_tokens_of_classes(runs) for runs in episodes]
        classes = sorted({attributes for of_episode in counts for attributes in of_episode})
        place = {attributes: number for number, attributes in enumerate(classes)} | {PADDING: -1}
        joined = groupby((run for runs in episodes for run in runs), key=lambda run: run[0])
        segments = tuple(
            (place[attributes], sum(tokens for _, tokens in runs)) for attributes, runs in joined
        )
        counts_BC = torch.tensor(
            [[of_episode[attributes] for attributes in classes] for of_episode in counts],
            dtype=torch.float32,
        ).view(len(counts), len(classes))
        shares_BC = counts_BC / counts_BC.sum(dim=1, keepdim=True).clamp(min=1)
        lengths = tuple(sum(tokens for _, tokens in runs) for runs in episodes)
        return cls(tuple(classes), segments, lengths, shares_BC)

    @classmethod
    def of_rows(cls, attributes_BL: np.ndarray) -> "RoutingPlan":
        """The plan of B consecutive rows of L tokens, from the class of each token."""
        return cls.of_runs([_runs(attributes_L) for attributes_L in attributes_BL])

    def episode_means(self, values_TE: Tensor) -> Tensor:
        """(B, E): the means over the tokens of each episode, without padding."""
        episodes_T, counts_B1 = self._episodes
        sums_BE = values_TE.new_zeros(len(self.lengths) + 1, values_TE.shape[1])
        return sums_BE.index_add(0, episodes_T, values_TE)[:-1] / counts_B1

    @cached_property
    def _episodes(self) -> tuple[Tensor, Tensor]:
        """The episode number of each token (T,), B for padding; and how many tokens each episode
        has, (B, 1), at least 1. Both are computed on the host, so that a GPU need not be waited
        for.
        """
        lengths = np.asarray(self.lengths)
        episodes_T = np.repeat(np.arange(len(lengths)), lengths)
        indices, runs = np.asarray(self.segments).T
        episodes_T[np.repeat(indices, runs) < 0] = len(lengths)
        counts_B = np.bincount(episodes_T, minlength=len(lengths) + 1)[:-1].clip(min=1)
        found_T, found_B1 = (
            torch.from_numpy(x).to(self.shares_BC.device, non_blocking=True)
            for x in (episodes_T, counts_B[:, None])
        )
        return found_T, found_B1

    def with_noise(self, noise: tuple[int, int] | None) -> "RoutingPlan":
        return replace(self, noise=noise)

    def to(self, device: torch.device | str) -> "RoutingPlan":
        return replace(self, shares_BC=self.shares_BC.to(device, non_blocking=True))


def _tokens_of_classes(runs: Iterable[Run]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for attributes, tokens in runs:
        if attributes != PADDING:
            counts[attributes] += tokens
    return counts


def _runs(attributes_L: np.ndarray) -> list[Run]:
    starts = np.flatnonzero(np.diff(attributes_L, prepend=-1))
    lengths = np.diff(starts, append=len(attributes_L))
    return list(zip(attributes_L[starts].tolist(), lengths.tolist(), strict=True))


@dataclass(frozen=True)
class TokenBatch:
    """B episodes as one stream of T tokens with P targets.

    tokens_T: the tokens that the model reads, with [MASK] for hidden ones; positions_T; links_T2:
    see `TokenSequence.links`; all int64. lengths: tokens of each episode. real_T: False at padding,
    None without padding.
    routing: the plan of attribute classes. predictors_P: the place in the stream that predicts each
    target (the token before it);
    labels_P: the target's id; weights_P: its loss weight (float32); visual_P: whether it is an
    image code or a features code.
    loss_scale: see `icl_moe.model.loss.combine`. task: the task of its episodes, or "mixed".
    sources: the name of each episode, for messages.
    """

    tokens_T: Tensor
    positions_T: Tensor
    links_T2: Tensor
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
        """A batch is sent between processes as one tensor, because each tensor costs a file and a
        handshake, which take longer than its content.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)} | {
            "shares_BC": self.routing.shares_BC
        }
        # The widest elements come first, so that each part is aligned for its type.
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
    """The inverse of `TokenBatch.__reduce__`; the tensors are views of `content`."""
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
    loss_on: LossOn = "all",
) -> TokenBatch:
    """Concatenate sequences of the padded layout, in the requested layout. loss_scale: None means 1
    / (sum of this batch's weights).
    """
    if layout == "packed":
        sequences = [sequence.unpadded() for sequence in sequences]
    lengths = tuple(len(sequence) for sequence in sequences)
    tokens_T = np.concatenate([sequence.tokens_L for sequence in sequences])
    weights_T = np.concatenate(
        [sequence.loss_weights(input_weight, loss_on) for sequence in sequences]
    )
    targets = np.flatnonzero(weights_T > 0)
    real_T = np.concatenate([sequence.attributes() for sequence in sequences]) != PADDING
    labels = tokens_T[targets]
    total = float(weights_T.sum())
    return TokenBatch(
        tokens_T=torch.from_numpy(
            np.concatenate([sequence.read_L for sequence in sequences]).astype(np.int64)
        ),
        positions_T=torch.from_numpy(
            np.concatenate([sequence.positions_L for sequence in sequences]).astype(np.int64)
        ),
        links_T2=torch.from_numpy(np.concatenate([sequence.links() for sequence in sequences])),
        lengths=lengths,
        real_T=None if real_T.all() else torch.from_numpy(real_T),
        routing=RoutingPlan.of_runs(
            [[(span.attributes, span.length) for span in sequence.spans] for sequence in sequences]
        ),
        predictors_P=torch.from_numpy(targets - 1),
        labels_P=torch.from_numpy(labels.astype(np.int64)),
        weights_P=torch.from_numpy(weights_T[targets]),
        visual_P=torch.from_numpy(vocabulary.are_codes(labels)),
        loss_scale=1.0 / max(total, 1.0) if loss_scale is None else loss_scale,
        task=task,
        sources=tuple(sources),
    )
