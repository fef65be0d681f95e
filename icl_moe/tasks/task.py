"""The interface between a task and the rest of the code.

A task contains everything that is specific to it: its pair and how the pair is written and read,
the grammar of its outputs, which pictures of an annotated region must be encoded, its scores and
its pictures. The input of every task is an image (with a class prompt, also the name of the class).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from icl_moe.attributes import Modality, attribute_class
from icl_moe.bootstrap import Interval, Statistic, mean_statistic
from icl_moe.errors import InputError
from icl_moe.pictures import Cell
from icl_moe.sequence import Pair, Part, SequenceCodec, SequenceFormat, SequenceWriter
from icl_moe.tables import percent, percent_range
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.grammar import Grammar

Output = dict[str, Any]
"""The content of a query's output, as in predictions.jsonl: name -> plain JSON value."""


def mean_log_probability(of_tokens: Iterable[float | None]) -> float | None:
    """The mean over the tokens that a model chose; None if it chose none."""
    chosen = [value for value in of_tokens if value is not None]
    return sum(chosen) / len(chosen) if chosen else None


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
    """Outputs without a model, one per episode, for comparison with a model's outputs. name: as in
    tables; prediction: as in metrics.json.
    """

    name: str
    prediction: str
    outputs: Sequence[Output]


class Picture(Protocol):
    """A picture to encode. Equal pictures are encoded once, so it must be hashable."""

    def draw(self, size: int) -> np.ndarray:
        """The picture at `size` x `size` pixels: uint8 (size, size, 3), for the image tokenizer; or
        for the tokenizer that encodes masks a mask, boolean (size, size), or several in corners of
        the RGB cube, boolean (size, size, 3).
        """
        ...


class Truth(Protocol):
    """An episode of a shard, for scores and pictures. meta: its KEY.json."""

    @property
    def category(self) -> str: ...

    @property
    def pairs(self) -> tuple[Any, ...]: ...

    @property
    def meta(self) -> Mapping[str, Any]: ...


class CodeReader(Protocol):
    """The interface that reading an output needs of a model: codes (B, N) of images -> pixels (B,
    3, H, W); codes of masks -> the brightness of each pixel, (B, H, W), about -1 (outside) to 1
    (inside); codes of painted masks -> pixels (B, 3, H, W), about -1 to 1.
    """

    def decode(self, codes_BN: np.ndarray) -> torch.Tensor: ...

    def decode_masks(self, codes_BN: np.ndarray) -> torch.Tensor: ...

    def decode_painted(self, codes_BN: np.ndarray) -> torch.Tensor: ...


class ExpectedReader(CodeReader, Protocol):
    """The interface that reading an output of one pass needs of a model: see `MaskTokenizer`."""

    def decode_expected(self, probabilities_BNK: torch.Tensor) -> torch.Tensor: ...

    def decode_colours(
        self, probabilities_BNK: torch.Tensor, colours_C3: np.ndarray
    ) -> torch.Tensor: ...


class GroupScore(NamedTuple):
    """The main score of a group of episodes, such as those of a class."""

    episodes: int
    score: float
    interval: Interval | None = None


class Measure(NamedTuple):
    """One number about a set of outputs; None where it was not computed. interval: 95 %, see
    bootstrap.py. definition: what it is, as the rest of a sentence that begins with its name.
    is_share: whether it is printed times 100; more_is_better: whether a larger one is, None if
    neither is.
    """

    value: float | None
    interval: Interval | None = None
    definition: str = ""
    is_share: bool = True
    more_is_better: bool | None = True

    @property
    def text(self) -> str:
        return percent(self.value) if self.is_share or self.value is None else _plain(self.value)

    @property
    def range_text(self) -> str:
        """Both ends of the interval; empty without one."""
        if self.is_share or self.interval is None:
            return percent_range(self.interval)
        return " – ".join(map(_plain, self.interval))


def _plain(value: float) -> str:
    return f"{value:.3f}"


class Scores(Protocol):
    """The scores of a set of outputs: a dataclass, whose fields go into metrics.json."""

    @property
    def episodes(self) -> int: ...

    def measures(self) -> dict[str, Measure]:
        """The columns of the report's table: heading -> measure. The same headings for every
        row.
        """
        ...

    def figures(self) -> dict[str, float]:
        """The few numbers that the curves of a training run show, by name."""
        ...

    def groups(self) -> Mapping[str, Mapping[str, GroupScore]]:
        """The main score of groups of episodes: what they are grouped by, such as "class" ->
        the group's name -> its score. Empty where nothing is scored by groups.
        """
        ...

    def notes(self) -> list[str]:
        """How to read the table, in one sentence each."""
        ...


class Task(ABC):
    """A task; `name` is its name in recipes, shards and tables. `pair_type`: the class of its
    pairs. `measure`: the name of `agreement` in tables. `mirrors`: whether its pairs are an image
    and a mask, so that a mirrored pair is one as well (see `InContextModel.complete`). `outlines`:
    whether a pair of one pass has what was `drawn`, whose outlines may follow the edges of images.
    `recipe`: a recipe of the package that trains the task, if there is one.
    """

    name: ClassVar[str]
    pair_type: ClassVar[type]
    measure: ClassVar[str] = "exact matches"
    recipe: ClassVar[str] = ""
    mirrors: ClassVar[bool] = False
    outlines: ClassVar[bool] = False

    # The sequence ------------------------------------------------------------------------------

    @abstractmethod
    def outputs(self, format: SequenceFormat) -> tuple[Modality, ...]:
        """The modalities of the output, in the order in which they are written."""

    @abstractmethod
    def write_output(self, writer: SequenceWriter, pair: Any) -> None:
        """Write the part of a pair that follows its image."""

    @abstractmethod
    def open_output(self, writer: SequenceWriter, category: str) -> None:
        """Write the tokens between the query's image and the first decoded token."""

    @abstractmethod
    def read_pair(self, codec: SequenceCodec, image: np.ndarray, outputs: Sequence[Part]) -> Pair:
        """The pair of an image's codes (N,) and the spans of role `output` and `given` after it.

        Raises InputError if they are not in the form that `write_output` writes.
        """

    def category_of(self, pair: Any) -> str:
        """The class's name if a pair contains it, otherwise an empty text."""
        return ""

    # Decoding ----------------------------------------------------------------------------------

    @abstractmethod
    def grammar(self, codec: SequenceCodec, category: str) -> Grammar:
        """What may be decoded after `open_output`. category: the class's name, if it is given."""

    @abstractmethod
    def read_output(self, codec: SequenceCodec, image: np.ndarray, tokens: Sequence[int]) -> Pair:
        """The query's pair, from its image's codes (N,) and tokens that follow the grammar."""

    def is_one_image(self, format: SequenceFormat) -> bool:
        """Whether an output is one image and nothing else, so that it can be decoded in one
        pass.
        """
        return tuple(self.outputs(format)) == ("image",)

    def expected_masks(
        self,
        model: ExpectedReader,
        probabilities_BNK: torch.Tensor,
        examples: Sequence[Sequence[Any]],
    ) -> torch.Tensor:
        """The brightness (B, C, H, W), -1 to 1, that is expected in each pixel of the C masks that
        an output image consists of, from the probability of each code in each cell.
        examples: the pairs of the examples of each query.
        """
        return model.decode_expected(probabilities_BNK)[:, None]

    def read_at_once(
        self,
        codec: SequenceCodec,
        image: np.ndarray,
        tokens: Sequence[int],
        drawn: Sequence[DrawnMask],
    ) -> Pair:
        """The query's pair if its output image was decoded in one pass.

        tokens: the most probable one of each cell. drawn: the masks of `expected_masks`.
        """
        return self.read_output(codec, image, tokens)

    def begins_with_image(self, format: SequenceFormat) -> bool:
        """Whether an output begins with an image, which may be written at once, and goes on."""
        return len(self.outputs(format)) > 1 and self.outputs(format)[0] == "image"

    def settle(self, brightness_HW: np.ndarray) -> np.ndarray:
        """Returns the mask, boolean (H, W), that an output begins with, from the brightness that
        the model expects in each pixel (-1 to 1). The rest of the output is written after the model
        has read this mask.
        """
        return brightness_HW > 0

    def with_image(self, pair: Any, mask_HW: np.ndarray) -> Any:
        """Returns the query's pair, completed with what `mask_HW` tells about it: the mask that
        `settle` returned, after which the rest of the output was written. By default the pair is
        returned as it is.
        """
        return pair

    def scored(self, pair: Any, log_probabilities: Sequence[float | None]) -> Any:
        """Returns the query's pair with how probable the model found it. log_probabilities: that of
        each token of its output; None for tokens that the model did not choose. By default the pair
        is returned as it is.
        """
        return pair

    def needs_category(self, format: SequenceFormat) -> bool:
        """Whether a query needs the name of its class."""
        return format.class_prompt

    def output_attributes(self, format: SequenceFormat, token: int) -> int:
        """The attribute class of a token that the grammar allowed."""
        modality: Modality = "image" if token in format.vocabulary.image_range else "text"
        return attribute_class(self.outputs(format), modality, True, format.class_prompt)

    # Building shards ---------------------------------------------------------------------------

    @abstractmethod
    def pictures(self, target: Any, format: SequenceFormat) -> tuple[Picture, ...]:
        """The pictures to encode for a region's target, besides the region's image."""

    @abstractmethod
    def pair(
        self,
        format: SequenceFormat,
        category: str,
        image: np.ndarray,
        target: Any,
        drawn: Sequence[np.ndarray],
    ) -> Any:
        """The pair of a region, from its image's codes (N,), its target, and the codes of
        `pictures`.
        """

    def target_of(self, target: Any, meta: Mapping[str, Any]) -> Any:
        """A region's target as in the episode with this KEY.json, for tasks whose episodes decide
        a part of it.
        """
        return target

    def surely_fits(self, codec: SequenceCodec, category: str, target: Any) -> bool:
        """Whether the texts of a pair have room by their length alone, without encoding them."""
        return False

    @abstractmethod
    def describe(self, targets: Sequence[Any], image_size: int) -> dict[str, Any]:
        """The entries of KEY.json about the targets of an episode, the query's last; see
        docs/shards.md.
        """

    @abstractmethod
    def verify(self, truth: Truth, image_size: int) -> None:
        """Check the pairs of an episode against its KEY.json. Raises InputError if they differ."""

    # Evaluation --------------------------------------------------------------------------------

    @abstractmethod
    def said(self, model: CodeReader, pairs: Sequence[Any]) -> list[Output]:
        """The outputs of pairs that a model wrote."""

    @abstractmethod
    def true_output(self, truth: Truth, pair: int = -1) -> Output:
        """The true output of a pair of an episode, by default the query."""

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
        """The scores of several sets of outputs, each with one output per episode of `truths`.

        quick: leave out intervals and scores that need another program.
        """

    def statistic(
        self, sets: Sequence[Sequence[Output]], truths: Sequence[Truth], format: SequenceFormat
    ) -> Statistic:
        """Measures of `score` as a function of how often each output counts, under the headings of
        `Scores.measures`. Several sets count as one, which contains their outputs set after set. By
        default there is only the mean agreement.
        """
        agreements = [
            self.agreement(output, self.right_outputs(truth))
            for outputs in sets
            for truth, output in zip(truths, outputs, strict=True)
        ]
        return mean_statistic({f"mean {self.measure}": agreements})

    def ceiling(self, model: CodeReader, truths: Sequence[Truth]) -> list[Output] | None:
        """The best outputs that a model can produce with its tokenizers; None if there is no such
        bound.
        """
        return None

    def baselines(self, truths: Sequence[Truth]) -> list[Baseline]:
        """Baselines that a model should exceed, besides the copy of its example."""
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
        """The right outputs for the query."""
        return [self.true_output(truth)]

    def agreement(self, prediction: Output, right: Sequence[Output]) -> float:
        """The highest agreement of an output with any of the right ones, 0..1."""
        return float(prediction in right)

    def judge(self, truths: Sequence[Truth], format: SequenceFormat) -> Judge:
        """What tells whether outputs for these queries are what examples show. By default by one
        respect, the class: an output agrees more with what is annotated of that class in the query
        than with what is annotated of any other.
        """

        def judge(prediction: Output, shown_kind: Kind, objects: Objects) -> dict[str, bool]:
            return {"class": self.agrees_most(prediction, shown_kind, objects)}

        return judge

    def agrees_most(
        self,
        prediction: Output,
        shown_kind: Kind,
        objects: Objects,
        agreement: Callable[[Output, Sequence[Output]], float] | None = None,
    ) -> bool:
        """Whether an output agrees more with what is annotated of the shown kind's class than with
        what is annotated of any other class. A tie does not count. agreement: the measure of
        agreement, by default the task's own.
        """
        agreement = agreement or self.agreement
        best = {True: 0.0, False: 0.0}
        for kind, right in objects.items():
            same = kind.category == shown_kind.category
            best[same] = max(best[same], agreement(prediction, right))
        return best[True] > best[False]

    # Pictures ----------------------------------------------------------------------------------

    @abstractmethod
    def show(self, image: Image.Image, output: Output) -> Image.Image:
        """An output drawn over its image."""

    @abstractmethod
    def caption_of(self, output: Output, truth: Output | None = None) -> str:
        """An output in words, with its agreement with the truth; empty if `show` displays
        everything.
        """

    def cells(
        self, truth: Truth, images: Sequence[Image.Image], prediction: Output, shots: int
    ) -> list[Cell]:
        """A row of a gallery: `shots` examples, the query, the output and the truth.

        images: the images of the examples, then the image of the query.
        """
        *examples, query = images
        right = self.right_outputs(truth)
        closest = max(right, key=lambda output: self.agreement(prediction, [output]))
        true = self.true_output(truth) | closest
        example_cells = [
            Cell("example", self.show(image, output), self.caption_of(output))
            for number, image in enumerate(examples[:shots])
            for output in [self.true_output(truth, number)]
        ]
        return [
            *example_cells,
            Cell("query", query),
            Cell("prediction", self.show(query, prediction), self.caption_of(prediction, true)),
            Cell(
                "truth" if len(right) == 1 else f"truth, closest of {len(right)}",
                self.show(query, true),
                self.caption_of(true),
            ),
        ]

    @abstractmethod
    def preview(
        self, truth: Truth, number: int, image: Image.Image, model: CodeReader
    ) -> tuple[list[Cell], str]:
        """Pictures of a pair decoded from its tokens, and a description, for `shards preview`.
        image: the pair's image.
        """


def check_objects(truth: Truth, keys: Sequence[str]) -> None:
    """Raise InputError if the `objects` of a KEY.json, which older shards lack, are not records
    with a class and these keys.
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


def lacks_class(meta: Mapping[str, Any], pair: int = -1) -> bool:
    """Whether the image of a pair lacks the class of its episode, by its KEY.json, as
    `segmentation.absent` of a data recipe has it.
    """
    return meta["scale"][pair] == 0 and not meta["sources"][pair]["annotations"]


def by_kind(truth: Truth) -> dict[Kind, list[dict[str, Any]]]:
    """The records under `objects` of a KEY.json, kind by kind."""
    found: dict[Kind, list[dict[str, Any]]] = {}
    for entry in truth.meta.get("objects", ()):
        found.setdefault(Kind(entry["class"], entry.get("style", "")), []).append(entry)
    return found
