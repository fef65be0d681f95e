"""The episodes of a shard folder as evaluation sees them: examples, a query, and the truth about
it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from icl_moe.data.shards import ShardSet, sample_key
from icl_moe.errors import InputError
from icl_moe.sequence import SequenceCodec
from icl_moe.tasks import TASKS, Task

if TYPE_CHECKING:
    from icl_moe.inference.model import InContextModel


@dataclass(frozen=True, eq=False)
class EvaluationEpisode:
    """One sample. `pairs`: the examples, then the query with its true output as tokens. `meta`: its
    KEY.json.
    """

    key: str
    task: Task
    category: str
    pairs: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def query(self) -> Any:
        """The last pair."""
        return self.pairs[-1]


def check_same_kind(model: "InContextModel", shards: ShardSet) -> None:
    """Raise InputError where shards are not of the model's format, or of other tokenizers."""
    manifest = shards.manifest
    for name, ours, theirs in (
        ("sequence format", model.format, manifest.format),
        ("image size", model.image_size, manifest.image_size),
        ("image tokenizer", model.image_tokenizer.fingerprint, manifest.image_tokenizer),
        ("mask tokenizer", model.decoder.config.mask_tokenizer, manifest.mask_tokenizer),
        ("text tokenizer", model.codec.text.fingerprint, manifest.text_tokenizer),
    ):
        if ours != theirs:
            raise InputError(
                f"The model's {name} is not that of {shards.location}: {ours} and {theirs}; build "
                "the shards with the model's."
            )


class EpisodeSet:
    """The first `limit` episodes of `task` (all by default), read from their shards when asked
    for.
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
        if not 0 <= index < self._count:
            raise IndexError(index)
        sample = self._shards.sample(self.task.name, index)
        pairs = self._codec.decode(sample.sequence, self.task).pairs
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
