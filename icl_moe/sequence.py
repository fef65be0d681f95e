"""Episode <-> token sequence.

A sequence is a list of spans. A span has a position, the attribute class of its tokens and their
role; the loss mask, the positions and the routing all derive from spans. Sequences are built in the
padded layout, in which every pair has the same length; the packed layout is the same sequence
without its padding, with the same position ids.

A segmentation episode of one example and a query, with 2 x 2 codes per image (N = 4):

    tokens     [BOI] i i i i [BOI] m m m m [EOC] [BOI] i i i i [BOI] m m m m [EOC]
    roles        -   input     -   output    -     -   input     -   output    -
    positions    0   1 .. 4    5   6 .. 9   10    11   12..15   16   17..20   21

The task decides what follows the image of a pair (see icl_moe/tasks/); this file uses only the
interface of tasks. If the format has a class prompt, the sequence begins with it:

    [BOT] <c_st> name <c_ed> padding
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np

from icl_moe.attributes import PADDING, Modality, attribute_class, is_output_image, is_target
from icl_moe.errors import InputError
from icl_moe.ranges import Count, Range
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

if TYPE_CHECKING:
    from icl_moe.tasks.task import Task

Role = Literal["marker", "input", "output", "given", "prompt", "padding"]
"""The role of a span, which determines its loss weight: 1 for `output`, a setting (w_in) for
`input`, and 0 for the rest.
"""


InputLoss = Literal["tokens", "mean"]
LossOn = Literal["all", "query"]
"""Which pairs of an episode have a loss: all pairs, including examples, or only the query."""

NO_LINK = -1
"""The entry of `TokenSequence.links` that stands for no token."""


class TooLongError(InputError):
    """A text is too long for its pair."""


class Span(NamedTuple):
    """`length` tokens from `start`, all of one attribute class (a byte, see attributes.py) and one
    role.
    """

    start: int
    length: int
    attributes: int
    role: Role

    @property
    def stop(self) -> int:
        return self.start + self.length

    def loss_weight(self, input_weight: float = 0.0) -> float:
        return 1.0 if self.role == "output" else input_weight if self.role == "input" else 0.0


@dataclass(frozen=True)
class TokenSequence:
    """Token ids `tokens_L`, their position ids `positions_L`, and the spans that cover 0..L-1 in
    order.

    inputs_L: what a model reads instead of `tokens_L`, if some of these are hidden from it.
    """

    tokens_L: np.ndarray
    positions_L: np.ndarray
    spans: tuple[Span, ...]
    inputs_L: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens_L)

    def loss_weights(self, input_weight: float = 0.0, loss_on: LossOn = "all") -> np.ndarray:
        """Weight of each token *as a target* (float32, L)."""
        weights = [span.loss_weight(input_weight) for span in self.spans]
        weights_L = self._spread(weights, np.float32)
        if loss_on == "query":
            weights_L[: self.query_spans[0].start] = 0.0
        return weights_L

    @property
    def read_L(self) -> np.ndarray:
        """The tokens that a model reads, with [MASK] for hidden ones."""
        return self.tokens_L if self.inputs_L is None else self.inputs_L

    @property
    def query_spans(self) -> tuple[Span, ...]:
        """The spans of the last pair, beginning with its input image's codes."""
        first = max((i for i, span in enumerate(self.spans) if span.role == "input"), default=0)
        return self.spans[first:]

    def links(self) -> np.ndarray:
        """The links, int64 (L, 2), token ids of the pair's own input image: at each position, the
        code of the cell that the position predicts in the output image, then of the cell that it
        holds; `NO_LINK` if there is none.

        The marker before an output image predicts cell 0; cell j holds j and predicts j + 1.
        """
        held_L = np.full(len(self), NO_LINK, dtype=np.int64)
        image = held_L[:0]
        for span in self.spans:
            if span.role == "input":
                image = self.tokens_L[span.start : span.stop]
            elif span.role == "output" and is_output_image(span.attributes):
                cells = image[: span.length]
                held_L[span.start : span.start + len(cells)] = cells
        # A prompt, unlike a whole sequence, ends with the marker before an output image.
        last = self.spans[-1]
        opens = last.role == "marker" and is_output_image(last.attributes)
        if opens and len(image) and self.spans[-2].role != "output":
            return np.stack([np.append(held_L[1:], image[0]), held_L], axis=1)
        return np.stack([np.append(held_L[1:], NO_LINK), held_L], axis=1)

    def attributes(self) -> np.ndarray:
        """Attribute class of each token (uint8, L)."""
        return self._spread([span.attributes for span in self.spans], np.uint8)

    def unpadded(self) -> "TokenSequence":
        """The packed layout: the same tokens and position ids without padding, and the spans
        shifted accordingly.
        """
        keep = self.attributes() != PADDING
        spans, start = [], 0
        for span in self.spans:
            if span.role != "padding":
                spans.append(Span(start, span.length, span.attributes, span.role))
                start += span.length
        inputs_L = None if self.inputs_L is None else self.inputs_L[keep]
        return TokenSequence(self.tokens_L[keep], self.positions_L[keep], tuple(spans), inputs_L)

    def _spread(self, values: list[Any], dtype: Any) -> np.ndarray:
        return np.repeat(np.array(values, dtype), [span.length for span in self.spans])


class Pair(Protocol):
    """One pair of an episode as tokens: its image's codes (N,), and what its task adds.

    The codes of the image are those of the tokenizer that reads input images: features codes if the
    vocabulary has them, otherwise image codes.
    """

    @property
    def image(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Episode:
    """Pairs of one task and one class; the last one is the query. `category` is the class's
    name.
    """

    task: "Task"
    category: str
    pairs: tuple[Any, ...]


PromptLength = Annotated[int, Range(4)]
"""The length of a class prompt: at least 4, its three markers and one token of a name."""


@dataclass(frozen=True)
class SequenceFormat:
    """The format of sequences; part of the data recipe, the manifest and the exported model.

    codes_per_image: N, for example 256 for 256 px at downsampling 16.
    category: in captions `none`, `written` (part of the output) or `given` (part of the prompt,
    without loss).
    box: in captions `none`, `text` (four bins) or `image` (drawn, before the text).
    class_prompt: whether sequences begin with the class name, in `prompt_length` positions.
    """

    vocabulary: Vocabulary = Vocabulary()
    codes_per_image: Count = 256
    category: Literal["none", "written", "given"] = "written"
    box: Literal["none", "text", "image"] = "text"
    class_prompt: bool = False
    prompt_length: PromptLength = 16

    def __post_init__(self) -> None:
        uses = {
            "caption.category": self.category != "none",
            "caption.box=text": self.box == "text",
            "class_prompt": self.class_prompt,
        }
        wants_tags = [name for name, used in uses.items() if used]
        if wants_tags and not self.vocabulary.tags:
            raise InputError(
                f"{wants_tags[0]} needs the tags and bins of the vocabulary: set "
                "vocabulary.tags=true."
            )

    @property
    def pair_length(self) -> int:
        """Positions of a pair of any task: 1 + N + 1 + N + 1; with box=image, 1 + N more."""
        n = self.codes_per_image
        return 3 + 2 * n + (1 + n if self.box == "image" else 0)

    def length(self, pairs: int) -> int:
        """Positions of a sequence of `pairs` pairs."""
        return (self.prompt_length if self.class_prompt else 0) + pairs * self.pair_length


Part = tuple[Span, np.ndarray]
"""A span of a sequence, and its tokens."""


class SequenceCodec:
    """Writes episodes as token sequences in one format, and reads them back exactly."""

    def __init__(self, format: SequenceFormat, text: TextTokenizer) -> None:
        if text.size != format.vocabulary.text_size:
            raise InputError(
                f"The text tokenizer has {text.size} ids, but the vocabulary has room for "
                f"{format.vocabulary.text_size}."
            )
        self.format = format
        self.text = text

    def encode(self, episode: Episode) -> TokenSequence:
        """The sequence of a whole episode, in the padded layout. Raises TooLongError if a text does
        not fit.
        """
        return self._write(episode).finish()

    def encode_prompt(self, episode: Episode, query_image: np.ndarray) -> TokenSequence:
        """What a model reads before decoding: all pairs of `episode` as examples, then the query up
        to its output.

        It ends with what the task writes before its output, such as the [BOI] of a mask.
        """
        return self._open(episode, query_image).finish()

    def encode_hidden(self, episode: Episode, query_image: np.ndarray) -> TokenSequence:
        """What a model reads to decode an output image in one pass: the prompt, and all cells of
        that image as [MASK]. Only for tasks whose output is one image.
        """
        writer = self._open(episode, query_image)
        writer.hidden()
        return writer.finish()

    def _open(self, episode: Episode, query_image: np.ndarray) -> "SequenceWriter":
        writer = self._write(episode)
        writer.image(query_image)
        episode.task.open_output(writer, episode.category)
        return writer

    def decode(self, sequence: TokenSequence, task: "Task") -> Episode:
        """The inverse of `encode`, for either layout. Raises InputError if the sequence does not
        follow this task and format.
        """
        pairs = tuple(self._read_pair(parts, task) for parts in _pairs(sequence))
        if not pairs:
            raise InputError("The sequence holds no pair.")
        category = self._prompt(sequence)
        if category is None:
            category = task.category_of(pairs[-1])
        return Episode(task, category, pairs)

    def read_text(self, tokens: Iterable[int]) -> str:
        """The text of tokens. Raises InputError if one of them is not a text token."""
        tokens = list(tokens)
        if any(token not in self.format.vocabulary.text_range for token in tokens):
            raise InputError("A token that should be text is from another range.")
        return self.text.decode(tokens)

    def _write(self, episode: Episode) -> "SequenceWriter":
        writer = SequenceWriter(self, episode.task)
        if self.format.class_prompt:
            writer.class_prompt(episode.category)
        for pair in episode.pairs:
            writer.pair(pair)
        return writer

    def _read_pair(self, parts: list[Part], task: "Task") -> Pair:
        image = next((tokens for span, tokens in parts if span.role == "input"), None)
        outputs = [part for part in parts if part[0].role in ("output", "given")]
        if image is None or not outputs:
            raise InputError("A pair of the sequence lacks its image or its output.")
        return task.read_pair(self, self.format.vocabulary.to_input_codes(image), outputs)

    def _prompt(self, sequence: TokenSequence) -> str | None:
        """The class's name in the class prompt; None if there is no prompt."""
        for span in sequence.spans:
            if span.role == "prompt":
                return self.read_text(sequence.tokens_L[span.start + 2 : span.stop - 1].tolist())
        return None


def _pairs(sequence: TokenSequence) -> list[list[Part]]:
    """The parts of each pair. A pair begins with the marker of its image, on the input side."""
    pairs: list[list[Part]] = []
    for span in sequence.spans:
        if span.role in ("prompt", "padding"):
            continue
        if span.role == "marker" and not is_target(span.attributes):
            pairs.append([])
        if not pairs:
            raise InputError("The sequence does not begin with an image.")
        pairs[-1].append((span, sequence.tokens_L[span.start : span.stop]))
    return pairs


_attributes = lru_cache(attribute_class)


class SequenceWriter:
    """Appends spans to a sequence. Tasks write their outputs with it."""

    def __init__(self, codec: SequenceCodec, task: "Task") -> None:
        self.codec = codec
        self.format = codec.format
        self._vocabulary = codec.format.vocabulary
        self._task = task
        self._outputs = tuple(task.outputs(codec.format))
        self._tokens: list[np.ndarray] = []
        self._spans: list[Span] = []
        self._length = 0

    def pair(self, pair: Pair) -> None:
        """Write a whole pair, padded to the length of pairs."""
        if not isinstance(pair, self._task.pair_type):
            raise InputError(
                f"A {type(pair).__name__} cannot be in an episode of the task '{self._task.name}'."
            )
        start = self._length
        self.image(pair.image)
        self._task.write_output(self, pair)
        self._pad(start + self.format.pair_length)

    def image(self, codes: np.ndarray) -> None:
        """Write [BOI] and the codes (N,) of an input image."""
        self._append([self._vocabulary.boi], "image", "marker", target=False)
        self._check_count(codes)
        self._append(self._vocabulary.from_input_codes(codes), "image", "input", target=False)

    def marker(self, token: int, modality: Modality) -> None:
        """Write a marker on the target side, which has no loss."""
        self._append([token], modality, "marker", target=True)

    def drawn(self, codes: np.ndarray) -> None:
        """Write the codes (N,) of an image on the target side, which have a loss."""
        self._check_count(codes)
        self._append(self._vocabulary.from_codes(codes), "image", "output", target=True)

    def hidden(self) -> None:
        """Write an image on the target side whose codes are unknown: [MASK] in every cell."""
        mask = self._vocabulary.mask_token
        self._append([mask] * self.format.codes_per_image, "image", "output", target=True)

    def text(self, tokens: Sequence[int], role: Literal["given", "output"]) -> None:
        """Write text on the target side, which has a loss as `output` and none as `given`."""
        self._append(tokens, "text", role, target=True)

    def class_prompt(self, category: str) -> None:
        """Write [BOT] <c_st> name <c_ed>, padded to prompt_length."""
        vocabulary, name = self._vocabulary, self.codec.text.encode(category)
        tokens = [vocabulary.bot, vocabulary.category_start, *name, vocabulary.category_end]
        room = self.format.prompt_length
        if len(tokens) > room:
            raise TooLongError(
                f"The class prompt of '{category}' takes {len(tokens)} tokens; there is room "
                f"for {room}."
            )
        self._append(tokens, "text", "prompt", target=False)
        self._pad(room)

    def finish(self) -> TokenSequence:
        tokens_L = np.concatenate(self._tokens)
        return TokenSequence(tokens_L, np.arange(len(tokens_L)), tuple(self._spans))

    def _check_count(self, codes: np.ndarray) -> None:
        if np.shape(codes) != (self.format.codes_per_image,):
            raise InputError(
                f"An image must have {self.format.codes_per_image} codes in this format, not the "
                f"shape {np.shape(codes)}."
            )

    def _append(
        self, tokens: Sequence[int] | np.ndarray, modality: Modality, role: Role, target: bool
    ) -> None:
        attributes = _attributes(self._outputs, modality, target, self.format.class_prompt)
        self._add(np.asarray(tokens, dtype=np.int64), attributes, role)

    def _pad(self, stop: int) -> None:
        if stop > self._length:
            padding = np.full(stop - self._length, self._vocabulary.pad, dtype=np.int64)
            self._add(padding, PADDING, "padding")

    def _add(self, values: np.ndarray, attributes: int, role: Role) -> None:
        self._tokens.append(values)
        self._spans.append(Span(self._length, len(values), attributes, role))
        self._length += len(values)
