"""The episodes of a shard folder as evaluation sees them: examples, a query, and the truth about
it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from icl_moe.data.shards import ShardSet, sample_key
from icl_moe.sequence import CaptionPair, SegmentationPair, SequenceCodec
from icl_moe.tasks import TASKS, Task
from icl_moe.tokenizers.boxes import Box


@dataclass(frozen=True, eq=False)
class EvaluationEpisode:
    """One sample. `pairs`: the examples, then the query with its true output as tokens. `meta`: its
    KEY.json.
    """

    key: str
    task: Task
    category: str
    pairs: tuple[SegmentationPair, ...] | tuple[CaptionPair, ...]
    meta: dict[str, Any]

    @property
    def query(self) -> SegmentationPair | CaptionPair:
        return self.pairs[-1]

    def true_mask(self, pair: int = -1) -> np.ndarray:
        """The mask of a pair (by default the query's) as annotated, boolean (image_size,
        image_size).
        """
        return decode_rle(self.meta["masks"][pair])

    @property
    def references(self) -> list[str]:
        """All captions that are right for the query."""
        return list(self.meta["references"][0])

    def true_box(self, pair: int = -1) -> Box | None:
        """The box of a pair (by default the query's)."""
        box = self.meta["boxes"][pair]
        return None if box is None else (box[0], box[1], box[2], box[3])


class EpisodeSet:
    """The first `limit` episodes of `task` (all by default), read from their shards when
    asked for.
    """

    def __init__(
        self, shards: ShardSet, codec: SequenceCodec, task: str, limit: int | None = None
    ) -> None:
        self.task = TASKS[task]
        self.examples = shards.manifest.examples
        self._shards, self._codec = shards, codec
        self._count = min(shards.count(task), limit or shards.count(task))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> EvaluationEpisode:
        sample = self._shards.sample(self.task.name, index)
        pairs = self._codec.decode(sample.sequence).pairs
        return EvaluationEpisode(sample.key, self.task, sample.category, pairs, sample.meta)

    @property
    def keys(self) -> list[str]:
        """The episodes' keys, in order."""
        return [sample_key(self.task.name, index) for index in range(len(self))]

    def of_another_class(self, index: int) -> EvaluationEpisode | None:
        """An episode whose class is another than that of episode `index`, always the same one; None
        where all are of one class.
        """
        count = len(self)
        for step in range(count):
            other = (index + count // 2 + step) % count
            if self._categories[other] != self._categories[index]:
                return self[other]
        return None

    @cached_property
    def _categories(self) -> list[str]:
        return [self._shards.sample(self.task.name, index).category for index in range(len(self))]


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """The boolean mask (H, W) of COCO's compressed run lengths, {"size": [h, w], "counts":
    text}.
    """
    return rle_tools.decode(rle).astype(bool)


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """The inverse of `decode_rle`."""
    rle = rle_tools.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": list(mask_HW.shape), "counts": rle["counts"].decode("ascii")}
