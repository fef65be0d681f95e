"""The episodes of a shard folder for evaluation: examples, a query, and its true output."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from icl_moe.data.shards import ShardSet, sample_key
from icl_moe.errors import InputError
from icl_moe.seeds import stable_seed
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
    """Raise InputError if the shards' format or tokenizers differ from the model's."""
    manifest = shards.manifest
    for name, ours, theirs in (
        ("sequence format", model.format, manifest.format),
        ("image size", model.image_size, manifest.image_size),
        *(
            (name.replace("_", " "), found, getattr(manifest, name))
            for name, found in model.tokenizers.fingerprints.items()
        ),
        ("text tokenizer", model.codec.text.fingerprint, manifest.text_tokenizer),
    ):
        if ours != theirs:
            raise InputError(
                f"The model's {name} differs from that of {shards.location}: {ours} and {theirs}; "
                "build the shards with the model's."
            )


class Swap(NamedTuple):
    """What a query can be asked for instead of its class: another class `shown` in it, with the
    examples of the episode `source`.
    """

    shown: str
    source: EvaluationEpisode


class EpisodeSet:
    """The first `limit` episodes of `task` (all by default), read from their shards on access."""

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
        return self.read(index)

    def read(self, index: int) -> EvaluationEpisode:
        """Any episode of the folder, including those beyond the limit."""
        sample = self._shards.sample(self.task.name, index)
        pairs = self._codec.decode(sample.sequence, self.task).pairs
        return EvaluationEpisode(sample.key, self.task, sample.category, pairs, sample.meta)

    @property
    def keys(self) -> list[str]:
        """The episodes' keys, in order."""
        return [sample_key(self.task.name, index) for index in range(len(self))]

    def of_another_class(self, index: int) -> EvaluationEpisode | None:
        """An episode of another class than episode `index`, always the same one; None if all have
        the same class.
        """
        count = len(self)
        for step in range(count):
            other = (index + count // 2 + step) % count
            if self._categories[other] != self._categories[index]:
                return self[other]
        return None

    @cached_property
    def keep_objects(self) -> bool:
        """Whether the shards record what else the queries show."""
        return any("objects" in self[index].meta for index in range(len(self)))

    @cached_property
    def swaps(self) -> dict[int, Swap]:
        """Episode number -> what its query can be asked for instead; deterministic.

        It lacks episodes whose query shows no other class at sufficient size for which the shards
        have examples from other images.
        """
        found = (
            {index: self._swap(index) for index in range(len(self))} if self.keep_objects else {}
        )
        return {index: swap for index, swap in found.items() if swap is not None}

    def _swap(self, index: int) -> Swap | None:
        episode = self[index]
        objects = self.task.objects(episode)
        large = {name for name, right in objects.items() if self.task.can_be_shown(right)}
        if episode.category not in large:
            return None
        others = sorted(large - {episode.category}, key=lambda name: stable_seed(episode.key, name))
        sources = ((name, self._source(episode, name)) for name in others)
        return next((Swap(name, source) for name, source in sources if source), None)

    def _source(self, episode: EvaluationEpisode, shown: str) -> EvaluationEpisode | None:
        """An episode of the class `shown` without examples from the query's image."""
        image = episode.meta["sources"][-1]["image"]
        numbers = self.by_class.get(shown, [])
        start = stable_seed(episode.key, shown, "examples") % max(len(numbers), 1)
        for number in numbers[start:] + numbers[:start]:
            source = self.read(number)
            if all(of["image"] != image for of in source.meta["sources"][: self.examples]):
                return source
        return None

    @cached_property
    def by_class(self) -> dict[str, list[int]]:
        """Class -> the numbers of its episodes in the whole folder, including those beyond the
        limit.
        """
        numbers: dict[str, list[int]] = {}
        for index in range(self._shards.count(self.task.name)):
            category = self._shards.sample(self.task.name, index).category
            numbers.setdefault(category, []).append(index)
        return numbers

    @cached_property
    def _categories(self) -> list[str]:
        return [self._shards.sample(self.task.name, index).category for index in range(len(self))]
