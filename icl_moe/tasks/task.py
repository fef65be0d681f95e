"""What the rest of the code asks of a task.

A task contains everything that is particular to it: its pair and how that is written and read, what
may be decoded, which pictures of an annotated region must be encoded, its scores and its pictures.
The input of every task is an image (with a class prompt, also the name of the class).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from icl_moe.attributes import Modality, attribute_class
from icl_moe.bootstrap import Interval
from icl_moe.errors import InputError
from icl_moe.pictures import Cell
from icl_moe.sequence import Pair, Part, SequenceCodec, SequenceFormat, SequenceWriter
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.grammar import Grammar

Output = dict[str, Any]
"""What a query's output says, as predictions.jsonl has it: plain JSON values by name."""


class Kind(NamedTuple):
    """What the examples of an episode show: a class and, where outputs have styles, a style ("" in
    all other data).
    """

    category: str
    style: str = ""

    def describe(self) -> str:
        """Such as "red star" or "red star, style place"."""
        return f"{self.category}, style {self.style}" if self.style else self.category


Objects = Mapping[Kind, Sequence[Output]]
"""What is annotated in a query: kind -> outputs, each of which would be right for that kind."""


Judge = Callable[[Output, Kind, Objects], dict[str, bool]]
"""Whether an output for a query that shows these objects is of a kind, in each respect in which
kinds differ, by the respect's name.
"""


class Baseline(NamedTuple):
    """Outputs that no model wrote, one for each episode, to compare a model's outputs with. name:
    as in tables; prediction: as in metrics.json.
    """

    name: str
    prediction: str
    outputs: Sequence[Output]


class Picture(Protocol):
    """A picture that is encoded. Equal pictures are encoded once, so it must be hashable."""

    def draw(self, size: int) -> np.ndarray:
        """The picture at `size` x `size` pixels: uint8 (size, size, 3), for the image tokenizer; or
        a mask, boolean (size, size), for what writes masks.
        """
        ...


class Truth(Protocol):
    """An episode of a shard as scores and pictures see it. meta: its KEY.json."""

    @property
    def category(self) -> str: ...

    @property
    def pairs(self) -> tuple[Any, ...]: ...

    @property
    def meta(self) -> Mapping[str, Any]: ...


class CodeReader(Protocol):
    """What reading an output needs of a model: codes (B, N) of images -> pixels (B, 3, H, W), of
    masks -> how bright each pixel is, (B, H, W), about -1 (outside) to 1 (inside).
    """

    def decode(self, codes_BN: np.ndarray) -> torch.Tensor: ...

    def decode_masks(self, codes_BN: np.ndarray) -> torch.Tensor: ...


class ClassScore(NamedTuple):
    """The main score of a class, over its episodes."""

    episodes: int
    score: float
    interval: Interval | None = None


class Scores(Protocol):
    """The scores of a set of outputs: a dataclass, whose fields go into metrics.json."""

    @property
    def episodes(self) -> int: ...

    def cells(self) -> dict[str, str]:
        """The columns of the report's table: heading -> text. The same headings for every row."""
        ...

    def figures(self) -> dict[str, float]:
        """The few numbers that training's curves show, by name."""
        ...

    def ranges(self) -> dict[str, str]:
        """The 95 % intervals (see bootstrap.py) of the columns that have one: heading -> text."""
        ...

    def by_class(self) -> Mapping[str, ClassScore]:
        """The main score of each class; empty where scores are not by class."""
        ...

    def notes(self) -> list[str]:
        """What must be known to read the table, a sentence each."""
        ...


class Task(ABC):
    """A task; `name` is its name in recipes, shards and tables. `pair_type`: the class of its
    pairs. `measure`: what `agreement` is called in tables.
    """

    name: ClassVar[str]
    pair_type: ClassVar[type]
    measure: ClassVar[str] = "exact matches"

    # The sequence ------------------------------------------------------------------------------

    @abstractmethod
    def outputs(self, format: SequenceFormat) -> tuple[Modality, ...]:
        """The modalities on the target side, in the order in which they are written."""

    @abstractmethod
    def write_output(self, writer: SequenceWriter, pair: Any) -> None:
        """Write what follows the image of a pair."""

    @abstractmethod
    def open_output(self, writer: SequenceWriter, category: str) -> None:
        """Write what stands between the query's image and the first token that is decoded."""

    @abstractmethod
    def read_pair(self, codec: SequenceCodec, image: np.ndarray, outputs: Sequence[Part]) -> Pair:
        """The pair of an image's codes (N,) and the spans of role `output` and `given` after it.

        Raises InputError where they are not what `write_output` writes.
        """

    def category_of(self, pair: Any) -> str:
        """The class's name where a pair says it, else an empty text."""
        return ""

    # Decoding ----------------------------------------------------------------------------------

    @abstractmethod
    def grammar(self, codec: SequenceCodec, category: str) -> Grammar:
        """What may be decoded after `open_output`. `category`: the class's name where it is
        given.
        """

    @abstractmethod
    def read_output(self, codec: SequenceCodec, image: np.ndarray, tokens: Sequence[int]) -> Pair:
        """The query's pair, of its image's codes (N,) and the tokens that the grammar let
        through.
        """

    def is_one_image(self, format: SequenceFormat) -> bool:
        """Whether an output is one image and nothing else, which may be written at once."""
        return tuple(self.outputs(format)) == ("image",)

    def read_at_once(
        self, codec: SequenceCodec, image: np.ndarray, tokens: Sequence[int], drawn: DrawnMask
    ) -> Pair:
        """The query's pair where its output image was written in one pass.

        tokens: the likeliest one of each cell. drawn: what the model expects in each pixel, for
        tasks whose image is a mask.
        """
        return self.read_output(codec, image, tokens)

    def begins_with_image(self, format: SequenceFormat) -> bool:
        """Whether an output begins with an image, which may be written at once, and goes on."""
        return len(self.outputs(format)) > 1 and self.outputs(format)[0] == "image"

    def settle(self, brightness_HW: np.ndarray) -> np.ndarray:
        """The mask, boolean (H, W), that an output begins with, of what the model expects in each
        pixel (-1 to 1). What is written after it reads the mask.
        """
        return brightness_HW > 0

    def with_image(self, pair: Any, mask_HW: np.ndarray) -> Any:
        """The query's pair, which was written after the mask that `settle` made."""
        return pair

    def needs_category(self, format: SequenceFormat) -> bool:
        """Whether a query cannot be asked without the name of its class."""
        return format.class_prompt

    def output_attributes(self, format: SequenceFormat, token: int) -> int:
        """The attribute class of a token that the grammar let through."""
        modality: Modality = "image" if token in format.vocabulary.image_range else "text"
        return attribute_class(self.outputs(format), modality, True, format.class_prompt)

    # Building shards ---------------------------------------------------------------------------

    @abstractmethod
    def pictures(self, target: Any, format: SequenceFormat) -> tuple[Picture, ...]:
        """What must be encoded of a region's target, beside the region's image."""

    @abstractmethod
    def pair(
        self,
        format: SequenceFormat,
        category: str,
        image: np.ndarray,
        target: Any,
        drawn: Sequence[np.ndarray],
    ) -> Any:
        """The pair of a region: its image's codes (N,), its target, and the codes of
        `pictures`.
        """

    @abstractmethod
    def describe(self, targets: Sequence[Any], image_size: int) -> dict[str, Any]:
        """What KEY.json says of the targets of an episode, the query's last; docs/shards.md."""

    @abstractmethod
    def verify(self, truth: Truth, image_size: int) -> None:
        """Check the pairs of an episode against its KEY.json. Raises InputError where they
        differ.
        """

    # Evaluation --------------------------------------------------------------------------------

    @abstractmethod
    def said(self, model: CodeReader, pairs: Sequence[Any]) -> list[Output]:
        """What pairs that a model wrote say."""

    @abstractmethod
    def true_output(self, truth: Truth, pair: int = -1) -> Output:
        """What a pair of an episode says in truth; by default the query."""

    @abstractmethod
    def repeats(self, pair: Any, example: Any) -> bool:
        """Whether a pair's output equals that of an example."""

    @abstractmethod
    def score(
        self,
        sets: Sequence[Sequence[Output]],
        truths: Sequence[Truth],
        format: SequenceFormat,
        quick: bool = False,
    ) -> Sequence[Scores]:
        """Scores of several sets of outputs, each with one output an episode of `truths`.

        quick: without scores that take another program, and without intervals.
        """

    def ceiling(self, model: CodeReader, truths: Sequence[Truth]) -> list[Output] | None:
        """The best outputs that a model can give with its tokenizers; None where there is no
        bound.
        """
        return None

    def baselines(self, truths: Sequence[Truth]) -> list[Baseline]:
        """What a model must be better than, besides a copy of its example."""
        return []

    # Following the examples --------------------------------------------------------------------

    def objects(self, truth: Truth) -> Objects:
        """What is annotated in the query, its own kind among it; empty where shards do not keep
        that.
        """
        return {}

    def can_be_shown(self, outputs: Sequence[Output]) -> bool:
        """Whether what is annotated of a kind in a query is enough to ask for it."""
        return True

    def right_outputs(self, truth: Truth) -> Sequence[Output]:
        """What would be right for the query."""
        return [self.true_output(truth)]

    def agreement(self, said: Output, right: Sequence[Output]) -> float:
        """How far an output agrees with any of those that would be right, 0..1."""
        return float(said in right)

    def judge(self, truths: Sequence[Truth], format: SequenceFormat) -> Judge:
        """What tells whether outputs for these queries are what examples show. By default by one
        respect, the class: an output agrees more with what is annotated of that class in the query
        than with what is annotated of any other.
        """

        def judge(said: Output, shown: Kind, objects: Objects) -> dict[str, bool]:
            return {"class": self.agrees_most(said, shown, objects)}

        return judge

    def agrees_most(self, said: Output, shown: Kind, objects: Objects) -> bool:
        """Whether an output agrees more with what is annotated of the shown kind's class than with
        what is annotated of any other class. A tie does not count.
        """
        best = {True: 0.0, False: 0.0}
        for kind, right in objects.items():
            same = kind.category == shown.category
            best[same] = max(best[same], self.agreement(said, right))
        return best[True] > best[False]

    # Pictures ----------------------------------------------------------------------------------

    @abstractmethod
    def show(self, image: Image.Image, output: Output) -> Image.Image:
        """An output drawn over its image."""

    @abstractmethod
    def caption_of(self, output: Output, truth: Output | None = None) -> str:
        """An output in words, with how far it agrees with the truth; empty where it is all
        shown.
        """

    def cells(
        self, truth: Truth, images: Sequence[Image.Image], said: Output, shots: int
    ) -> list[Cell]:
        """A row of a gallery: `shots` examples, the query, what was said and what is true.

        images: those of the examples, then the query's.
        """
        *examples, query = images
        true = self.true_output(truth)
        shown = [
            Cell("example", self.show(image, output), self.caption_of(output))
            for number, image in enumerate(examples[:shots])
            for output in [self.true_output(truth, number)]
        ]
        return [
            *shown,
            Cell("query", query),
            Cell("prediction", self.show(query, said), self.caption_of(said, true)),
            Cell("truth", self.show(query, true), self.caption_of(true)),
        ]

    @abstractmethod
    def preview(
        self, truth: Truth, number: int, image: Image.Image, model: CodeReader
    ) -> tuple[list[Cell], str]:
        """Pictures of a pair of an episode as its tokens have it, and words about it, for `shards
        preview`. image: the pair's image.
        """


def check_objects(truth: Truth, keys: Sequence[str]) -> None:
    """Raise InputError where the `objects` of a KEY.json, which older shards lack, are not records
    that have a class and these keys.
    """
    objects = truth.meta.get("objects", [])
    if not isinstance(objects, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("class"), str)
        and isinstance(entry.get("style", ""), str)
        and entry.keys() >= {*keys}
        for entry in objects
    ):
        raise InputError(
            "its JSON must have records under objects, each with the keys "
            f"{', '.join(('class', *keys))}."
        )


def kind_of(meta: Mapping[str, Any]) -> Kind:
    """What the examples of an episode show, by its KEY.json."""
    return Kind(meta["class"], str(meta.get("style", "")))


def by_kind(truth: Truth) -> dict[Kind, list[dict[str, Any]]]:
    """The records under `objects` of a KEY.json, kind by kind."""
    found: dict[Kind, list[dict[str, Any]]] = {}
    for entry in truth.meta.get("objects", ()):
        found.setdefault(Kind(entry["class"], entry.get("style", "")), []).append(entry)
    return found
