"""The episodes of a shard folder for evaluation: examples, a query, and its true output."""

from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from icl_moe.data.shards import ShardSet, sample_key
from icl_moe.errors import InputError
from icl_moe.seeds import stable_seed
from icl_moe.sequence import SequenceCodec
from icl_moe.tasks import TASKS, Task
from icl_moe.tasks.task import Kind, kind_of

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

    @property
    def kind(self) -> Kind:
        """What the examples show."""
        return kind_of(self.meta)


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
                f"The model's {name} differs from that of {shards.location}: "
                f"{_difference(ours, theirs)}; build the shards with the model's."
            )


def _difference(ours: Any, theirs: Any) -> str:
    """Both values, or of data classes the fields that differ."""
    if not is_dataclass(ours) or type(ours) is not type(theirs):
        return f"{ours} and {theirs}"
    return ", ".join(
        f"{field.name} ({_difference(*values)})"
        for field in fields(ours)
        for values in [(getattr(ours, field.name), getattr(theirs, field.name))]
        if values[0] != values[1]
    )


class Swap(NamedTuple):
    """What else a query can be asked for: another class that is seen in it, in another style if the
    query is described in several. shown: that class and style. source: the episode whose examples
    show it.
    """

    shown: Kind
    source: EvaluationEpisode


class Question(NamedTuple):
    """A query, and the episode whose examples are shown with it."""

    truth: EvaluationEpisode
    source: EvaluationEpisode


class EpisodeSet:
    """The first `limit` episodes of `task` (all by default), read from their shards on access."""

    def __init__(
        self, shards: ShardSet, codec: SequenceCodec, task: str, limit: int | None = None
    ) -> None:
        self.task = TASKS[task]
        self.examples = shards.manifest.examples
        self.image_size = shards.manifest.image_size
        self._shards, self._codec = shards, codec
        self._total = shards.count(task)
        self._count = min(self._total, limit or self._total)

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
    def total(self) -> int:
        """How many episodes the shards have, beyond the limit too."""
        return self._total

    def first(self, count: int) -> "EpisodeSet":
        """The first `count` episodes of the same shards."""
        return EpisodeSet(self._shards, self._codec, self.task.name, count)

    @property
    def keys(self) -> list[str]:
        """The episodes' keys, in order."""
        return [sample_key(self.task.name, index) for index in range(len(self))]

    def questions(self, swapped: bool = False) -> list[Question]:
        """Every query with its own examples, or each that can be asked for something else with the
        examples of that.
        """
        if swapped:
            return [Question(self[number], swap.source) for number, swap in self.swaps.items()]
        return [Question(episode, episode) for episode in map(self.__getitem__, range(len(self)))]

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
        samples = (self._shards.sample(self.task.name, index) for index in range(len(self)))
        return any("objects" in sample.meta for sample in samples)

    @cached_property
    def swaps(self) -> dict[int, Swap]:
        """Episode number -> what its query can be asked for instead; deterministic.

        Another class and another style are preferred to another class alone, and that to another
        style alone. It lacks the episodes whose query shows nothing else that is large enough, or
        nothing of which the shards have examples from other images than the query's.
        """
        found = (
            {index: self._swap(index) for index in range(len(self))} if self.keep_objects else {}
        )
        return {index: swap for index, swap in found.items() if swap is not None}

    def _swap(self, index: int) -> Swap | None:
        episode = self[index]
        own, objects = episode.kind, self.task.objects(episode)
        large = {kind for kind, right in objects.items() if self.task.can_be_shown(right)}
        if own not in large:
            return None

        def order(kind: Kind) -> tuple[bool, bool, int]:
            drawn = stable_seed(episode.key, *filter(None, kind))
            return kind.category == own.category, kind.style == own.style, drawn

        sources = ((kind, self._source(episode, kind)) for kind in sorted(large - {own}, key=order))
        return next((Swap(kind, source) for kind, source in sources if source), None)

    def _source(self, episode: EvaluationEpisode, kind: Kind) -> EvaluationEpisode | None:
        """An episode of this kind, none of whose examples is of the query's image."""
        image = episode.meta["sources"][-1]["image"]
        numbers = self.by_kind.get(kind, [])
        start = stable_seed(episode.key, *filter(None, kind), "examples") % max(len(numbers), 1)
        for number in numbers[start:] + numbers[:start]:
            source = self.read(number)
            if all(origin["image"] != image for origin in source.meta["sources"][: self.examples]):
                return source
        return None

    @cached_property
    def by_kind(self) -> dict[Kind, list[int]]:
        """Kind -> the numbers of its episodes in the whole folder, beyond the limit too."""
        numbers: dict[Kind, list[int]] = {}
        for index in range(self._total):
            sample = self._shards.sample(self.task.name, index)
            numbers.setdefault(kind_of(sample.meta), []).append(index)
        return numbers

    @cached_property
    def _categories(self) -> list[str]:
        return [self._shards.sample(self.task.name, index).category for index in range(len(self))]
