"""Episode <-> token sequence.

A sequence is a list of spans, and a span says where it lies, which attribute class its tokens have
and what role they play; loss mask, positions and routing all derive from spans. Sequences are built
in the padded layout, in which every pair has the same length; the packed layout is the same
sequence less its padding, with the same position ids.

    segmentation pair: [BOI] image [BOI] mask [EOC]
    caption pair:      [BOI] image [BOT] text [EOC] padding         (box=image: [BOI] image [BOI]
    box [BOT] text [EOC] padding)
    class prompt:      [BOT] <c_st> name <c_ed> padding             once, at the start, where the
    format asks for it
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from icl_moe.errors import InputError
from icl_moe.ranges import Count, Range
from icl_moe.tasks import PADDING, TASKS, Modality, Task, attribute_class
from icl_moe.tokenizers.boxes import Box, bins_to_box, box_to_bins
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

Role = Literal["marker", "input", "output", "given", "prompt", "padding"]
"""What a span is for. Its loss weight follows: 1 for `output`, a setting (w_in) for `input`, 0 for
the rest.
"""


class TooLongError(InputError):
    """A text does not fit into the place that its pair has for it."""


@dataclass(frozen=True)
class Span:
    """`length` tokens from `start`, all of one attribute class (a byte, see tasks.py) and
    one role.
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
    """

    tokens_L: np.ndarray
    positions_L: np.ndarray
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.tokens_L)

    def loss_weights(self, input_weight: float = 0.0) -> np.ndarray:
        """Weight of each token *as a target* (float32, L)."""
        return np.repeat(
            np.array([span.loss_weight(input_weight) for span in self.spans], dtype=np.float32),
            [span.length for span in self.spans],
        )

    def attributes(self) -> np.ndarray:
        """Attribute class of each token (uint8, L)."""
        return np.repeat(
            np.array([span.attributes for span in self.spans], dtype=np.uint8),
            [span.length for span in self.spans],
        )

    def unpadded(self) -> "TokenSequence":
        """The packed layout: the same tokens and position ids without the padding, spans
        moved up.
        """
        keep = self.attributes() != PADDING
        spans, start = [], 0
        for span in self.spans:
            if span.role != "padding":
                spans.append(Span(start, span.length, span.attributes, span.role))
                start += span.length
        return TokenSequence(self.tokens_L[keep], self.positions_L[keep], tuple(spans))


@dataclass(frozen=True, eq=False)
class SegmentationPair:
    """Image codes and mask codes, each (N,), 0..image_codes-1."""

    image: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class CaptionPair:
    """Image codes (N,), and what the caption says. `category` and `box` are None where the format
    leaves them out.

    `box_image`: codes (N,) of the box drawn as an image (the paper: 0 on the object, 1 elsewhere);
    box=image only.
    """

    image: np.ndarray
    caption: str
    category: str | None = None
    box: Box | None = None
    box_image: np.ndarray | None = None


@dataclass(frozen=True)
class Episode:
    """Pairs of one task and one class; the last one is the query. `category` is the class's
    name.
    """

    task: Task
    category: str
    pairs: tuple[SegmentationPair, ...] | tuple[CaptionPair, ...]


PromptLength = Annotated[int, Range(4)]
"""Positions of a class prompt: its three markers and at least one token of a name."""


@dataclass(frozen=True)
class SequenceFormat:
    """How episodes are written; part of the data recipe, the manifest and the exported model.

    codes_per_image: N, such as 256 for 256 px at downsampling 16.
    category: in captions `none`, `written` (part of the output) or `given` (part of the prompt,
    without loss).
    box: in captions `none`, `text` (four bins) or `image` (drawn, before the text).
    class_prompt: whether sequences open with the class name, in `prompt_length` positions.
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
        """Positions of a pair of either task: 1 + N + 1 + N + 1; with box=image, 1 + N more."""
        n = self.codes_per_image
        return 3 + 2 * n + (1 + n if self.box == "image" else 0)

    def length(self, pairs: int) -> int:
        """Positions of a sequence of `pairs` pairs."""
        return (self.prompt_length if self.class_prompt else 0) + pairs * self.pair_length


def streams(format: SequenceFormat) -> list[int]:
    """The attribute classes that sequences of a format have, task by task."""
    found = []
    for task in TASKS.values():
        box_image = format.box == "image" and task.output == "text"
        outputs: tuple[Modality, ...] = ("image", "text") if box_image else (task.output,)
        inputs: tuple[Modality, ...] = ("text", "image") if format.class_prompt else ("image",)
        kinds = [
            *((modality, False) for modality in inputs),
            *((modality, True) for modality in outputs),
        ]
        found += [
            attribute_class(task, modality, target, format.class_prompt, box_image)
            for modality, target in kinds
        ]
    return found


@dataclass(frozen=True)
class CaptionPart:
    """A part of a caption's text: `fixed` tokens, or the place of the `category`, `box` or
    `caption`.
    """

    kind: Literal["fixed", "category", "box", "caption"]
    tokens: tuple[int, ...] = ()


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
        self.caption_parts = _caption_parts(format, text)

    def encode(self, episode: Episode) -> TokenSequence:
        """The sequence of a whole episode, in the padded layout. Raises TooLongError where a text
        has no room.
        """
        writer = _Writer(self, episode.task, episode.category)
        for pair in episode.pairs:
            writer.pair(pair)
        return writer.finish()

    def encode_prompt(self, episode: Episode, query_image: np.ndarray) -> TokenSequence:
        """What a model reads before it writes: all pairs of `episode` as examples, then the query
        up to its output.

        It ends with the [BOI] or [BOT] that opens the output, or, with category=given, with the
        category.
        """
        writer = _Writer(self, episode.task, episode.category)
        for pair in episode.pairs:
            writer.pair(pair)
        writer.query(query_image)
        return writer.finish()

    def decode(self, sequence: TokenSequence) -> Episode:
        """The inverse of `encode`, of either layout. Raises InputError where the sequence is not of
        this format.
        """
        return _read_episode(self, sequence)

    def parse_caption(self, tokens: Iterable[int]) -> tuple[str | None, Box | None, str]:
        """(category, box, caption) of a caption's text tokens, without [BOT] and [EOC].

        Raises InputError where the tokens do not follow the format's template.
        """
        return _parse_caption(self, list(tokens))


def _caption_parts(format: SequenceFormat, text: TextTokenizer) -> tuple[CaptionPart, ...]:
    """`Category: <c>. Bboxes: <box>. Caption: <text>.`, each piece encoded apart, so that reading
    it back is exact.
    """
    parts: list[CaptionPart] = []
    lead = ""
    if format.category != "none":
        parts += [
            CaptionPart("fixed", (*text.encode("Category:"), format.vocabulary.category_start)),
            CaptionPart("category"),
        ]
        parts.append(CaptionPart("fixed", (format.vocabulary.category_end,)))
        lead = ". "
    if format.box == "text":
        parts += [
            CaptionPart("fixed", (*text.encode(lead + "Bboxes:"), format.vocabulary.box_start)),
            CaptionPart("box"),
        ]
        parts.append(CaptionPart("fixed", (format.vocabulary.box_end,)))
        lead = ". "
    parts += [CaptionPart("fixed", tuple(text.encode(lead + "Caption:"))), CaptionPart("caption")]
    parts.append(CaptionPart("fixed", tuple(text.encode("."))))
    return tuple(_merge_fixed(parts))


def _merge_fixed(parts: Iterable[CaptionPart]) -> list[CaptionPart]:
    merged: list[CaptionPart] = []
    for part in parts:
        if merged and part.kind == "fixed" and merged[-1].kind == "fixed":
            merged[-1] = CaptionPart("fixed", merged[-1].tokens + part.tokens)
        else:
            merged.append(part)
    return merged


class _Writer:
    """Appends spans; one method a building block of the formats above."""

    def __init__(self, codec: SequenceCodec, task: Task, category: str) -> None:
        self._codec = codec
        self._format = codec.format
        self._vocabulary = codec.format.vocabulary
        self._task = task
        self._category = category
        self._tokens: list[np.ndarray] = []
        self._spans: list[Span] = []
        self._length = 0
        if self._format.class_prompt:
            self._class_prompt()

    def pair(self, pair: SegmentationPair | CaptionPair) -> None:
        start = self._length
        self._image(pair.image)
        if isinstance(pair, SegmentationPair):
            self._check_task("image")
            self._append([self._vocabulary.boi], "image", "marker", target=True)
            self._codes(pair.mask, "output", target=True)
            self._append([self._vocabulary.eoc], "image", "marker", target=True)
        else:
            self._check_task("text")
            if self._format.box == "image":
                if pair.box_image is None:
                    raise InputError(
                        "A caption pair lacks the image of its box, which caption.box=image asks "
                        "for."
                    )
                self._append([self._vocabulary.boi], "image", "marker", target=True)
                self._codes(pair.box_image, "output", target=True)
            self._caption(pair)
        self._pad(start + self._format.pair_length)

    def query(self, image: np.ndarray) -> None:
        self._image(image)
        if self._task.output == "image" or self._format.box == "image":
            self._append([self._vocabulary.boi], "image", "marker", target=True)
            return
        self._append([self._vocabulary.bot], "text", "marker", target=True)
        if self._format.category == "given":
            self._append(_given_category(self._codec, self._category), "text", "given", target=True)

    def finish(self) -> TokenSequence:
        tokens_L = np.concatenate(self._tokens).astype(np.int64)
        return TokenSequence(tokens_L, np.arange(len(tokens_L)), tuple(self._spans))

    def _class_prompt(self) -> None:
        name = self._codec.text.encode(self._category)
        tokens = [
            self._vocabulary.bot,
            self._vocabulary.category_start,
            *name,
            self._vocabulary.category_end,
        ]
        room = self._format.prompt_length
        if len(tokens) > room:
            raise TooLongError(
                f"The class prompt of '{self._category}' takes {len(tokens)} tokens; there is room "
                f"for {room}."
            )
        self._append(tokens, "text", "prompt", target=False)
        self._pad(self._format.prompt_length)

    def _image(self, codes: np.ndarray) -> None:
        self._append([self._vocabulary.boi], "image", "marker", target=False)
        self._codes(codes, "input", target=False)

    def _codes(self, codes: np.ndarray, role: Role, target: bool) -> None:
        if np.shape(codes) != (self._format.codes_per_image,):
            raise InputError(
                f"An image must be {self._format.codes_per_image} codes in this format, not of "
                f"shape {np.shape(codes)}."
            )
        self._append(self._vocabulary.from_codes(codes), "image", role, target)

    def _caption(self, pair: CaptionPair) -> None:
        self._append([self._vocabulary.bot], "text", "marker", target=True)
        tokens = _caption_tokens(self._codec, pair)
        room = self._format.codes_per_image
        if len(tokens) > room:
            raise TooLongError(
                f"The caption '{pair.caption}' takes {len(tokens)} tokens; there is room for "
                f"{room}."
            )
        given = (
            len(_given_category(self._codec, pair.category))
            if self._format.category == "given"
            else 0
        )
        if given:
            self._append(tokens[:given], "text", "given", target=True)
        self._append([*tokens[given:], self._vocabulary.eoc], "text", "output", target=True)

    def _append(
        self, tokens: Iterable[int] | np.ndarray, modality: Modality, role: Role, target: bool
    ) -> None:
        values = np.asarray(tokens, dtype=np.int64)
        attributes = attribute_class(
            self._task, modality, target, self._format.class_prompt, self._box_image
        )
        self._add(values, attributes, role)

    def _pad(self, stop: int) -> None:
        if stop > self._length:
            self._add(
                np.full(stop - self._length, self._vocabulary.pad, dtype=np.int64),
                PADDING,
                "padding",
            )

    def _add(self, values: np.ndarray, attributes: int, role: Role) -> None:
        self._tokens.append(values)
        self._spans.append(Span(self._length, len(values), attributes, role))
        self._length += len(values)

    @property
    def _box_image(self) -> bool:
        return self._task.output == "text" and self._format.box == "image"

    def _check_task(self, output: Modality) -> None:
        if self._task.output != output:
            raise InputError(
                f"A pair that writes {output} cannot stand in an episode of the task "
                f"'{self._task.name}'."
            )


def _given_category(codec: SequenceCodec, category: str | None) -> list[int]:
    """`Category: <c_st> name <c_ed>`, the part of a caption that category=given puts into the
    prompt.
    """
    if category is None:
        raise InputError("This caption format names the category, but none was given.")
    head = codec.caption_parts[0].tokens
    return [*head, *codec.text.encode(category), codec.format.vocabulary.category_end]


def _caption_tokens(codec: SequenceCodec, pair: CaptionPair) -> list[int]:
    bins = codec.format.vocabulary.bin_range
    tokens: list[int] = []
    for part in codec.caption_parts:
        if part.kind == "fixed":
            tokens += part.tokens
        elif part.kind == "category":
            if pair.category is None:
                raise InputError("This caption format names the category, but none was given.")
            tokens += codec.text.encode(pair.category)
        elif part.kind == "box":
            if pair.box is None:
                raise InputError("This caption format writes the box, but none was given.")
            tokens += [bins[i] for i in box_to_bins(pair.box)]
        else:
            tokens += codec.text.encode(" " + pair.caption)
    return tokens


def _parse_caption(codec: SequenceCodec, tokens: list[int]) -> tuple[str | None, Box | None, str]:
    vocabulary = codec.format.vocabulary
    found: dict[str, list[int]] = {}
    parts = codec.caption_parts
    position = 0
    for part, following in zip(parts, (*parts[1:], None), strict=True):
        if part.kind == "fixed":
            if tuple(tokens[position : position + len(part.tokens)]) != part.tokens:
                raise InputError("The caption's text does not follow its template.")
            position += len(part.tokens)
            continue
        assert following is not None, "a template ends with fixed tokens"
        if part.kind == "caption":
            stop = len(tokens) - len(following.tokens)
        else:  # Category and box are closed by a tag, which no text contains.
            try:
                stop = tokens.index(following.tokens[0], position)
            except ValueError:
                raise InputError(f"The caption's {part.kind} is not closed.") from None
        found[part.kind] = tokens[position:stop]
        position = stop
    if position != len(tokens):
        raise InputError("The caption's text does not follow its template.")
    return (
        _category_text(codec, found),
        _box_of(vocabulary, found),
        _caption_text(codec, found["caption"]),
    )


def _category_text(codec: SequenceCodec, found: dict[str, list[int]]) -> str | None:
    return codec.text.decode(_only_text(codec, found["category"])) if "category" in found else None


def _caption_text(codec: SequenceCodec, tokens: list[int]) -> str:
    return codec.text.decode(_only_text(codec, tokens)).removeprefix(" ")


def _only_text(codec: SequenceCodec, tokens: list[int]) -> list[int]:
    if any(token not in codec.format.vocabulary.text_range for token in tokens):
        raise InputError("A token where text belongs is of another range.")
    return tokens


def _box_of(vocabulary: Vocabulary, found: dict[str, list[int]]) -> Box | None:
    if "box" not in found:
        return None
    bins = [token - vocabulary.bin_range.start for token in found["box"]]
    if len(bins) != 4 or not all(token in vocabulary.bin_range for token in found["box"]):
        raise InputError("A caption's box must be four bins.")
    return bins_to_box(bins)


def _read_episode(codec: SequenceCodec, sequence: TokenSequence) -> Episode:
    spans = [span for span in sequence.spans if span.role != "padding"]
    prompt = next((span for span in spans if span.role == "prompt"), None)
    pairs: list[SegmentationPair | CaptionPair] = []
    current: list[tuple[Span, np.ndarray]] = []
    for span in spans:
        if span.role == "prompt":
            continue
        tokens = sequence.tokens_L[span.start : span.stop]
        if span.role == "marker" and current and _closes(codec, current, tokens):
            pairs.append(_read_pair(codec, current))
            current = []
        current.append((span, tokens))
    pairs.append(_read_pair(codec, current))
    task = TASKS["segmentation" if isinstance(pairs[0], SegmentationPair) else "captioning"]
    category = _episode_category(codec, sequence, prompt, pairs)
    return Episode(task, category, tuple(pairs))  # type: ignore[arg-type]


def _closes(
    codec: SequenceCodec, current: list[tuple[Span, np.ndarray]], tokens: np.ndarray
) -> bool:
    """Whether a [BOI] opens the next pair: the current one has its output and this marker is on the
    input side.
    """
    has_output = any(span.role == "output" for span, _ in current)
    last = int(current[-1][1][-1])
    return (
        has_output
        and last == codec.format.vocabulary.eoc
        and int(tokens[0]) == codec.format.vocabulary.boi
    )


def _read_pair(
    codec: SequenceCodec, parts: list[tuple[Span, np.ndarray]]
) -> SegmentationPair | CaptionPair:
    vocabulary = codec.format.vocabulary
    image = next((tokens for span, tokens in parts if span.role == "input"), None)
    outputs = [(span, tokens) for span, tokens in parts if span.role in ("output", "given")]
    if image is None or not outputs:
        raise InputError("A pair of the sequence lacks its image or its output.")
    is_text = [int(tokens[0]) not in vocabulary.image_range for _, tokens in outputs]
    if not any(is_text):
        return SegmentationPair(vocabulary.to_codes(image), vocabulary.to_codes(outputs[0][1]))
    text = np.concatenate(
        [tokens for (_, tokens), textual in zip(outputs, is_text, strict=True) if textual]
    )
    if int(text[-1]) != vocabulary.eoc:
        raise InputError("A caption does not end with [EOC].")
    category, box, caption = codec.parse_caption(int(token) for token in text[:-1])
    box_image = None if all(is_text) else vocabulary.to_codes(outputs[0][1])
    return CaptionPair(vocabulary.to_codes(image), caption, category, box, box_image)


def _episode_category(
    codec: SequenceCodec,
    sequence: TokenSequence,
    prompt: Span | None,
    pairs: list[SegmentationPair | CaptionPair],
) -> str:
    """The class's name where the sequence says it (class prompt, captions with a category), else
    ''.
    """
    if prompt is not None:
        return codec.text.decode(
            _only_text(codec, sequence.tokens_L[prompt.start + 2 : prompt.stop - 1].tolist())
        )
    last = pairs[-1]
    return last.category or "" if isinstance(last, CaptionPair) else ""
