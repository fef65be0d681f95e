"""The text of a caption: its template, how it is written as tokens and read back, and its grammar.

    Category: <c_st> name <c_ed>. Bboxes: <b_st> x1 y1 x2 y2 <b_ed>. Caption: text.

The sequence format decides which parts exist. Each piece of text is encoded separately, so that
reading it back is exact.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from icl_moe.boxes import Box, bins_to_box, box_to_bins
from icl_moe.errors import InputError, shown
from icl_moe.sequence import SequenceCodec, SequenceFormat, TooLongError
from icl_moe.tasks.grammar import Allowed, Grammar, forced
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary


class CaptionText(NamedTuple):
    """The content of a caption's text; category and box are None if the format lacks them."""

    category: str | None
    box: Box | None
    caption: str


@dataclass(frozen=True)
class CaptionPart:
    """A part of the template: `fixed` tokens, or a placeholder for the `category`, `box` or
    `caption`.
    """

    kind: Literal["fixed", "category", "box", "caption"]
    tokens: tuple[int, ...] = ()


@lru_cache(maxsize=4096)
def _name(text: TextTokenizer, category: str) -> tuple[int, ...]:
    """The tokens of a class's name."""
    return tuple(text.encode(category))


def template(codec: SequenceCodec) -> tuple[CaptionPart, ...]:
    """The parts of a format's captions. The last two are the caption and its full stop."""
    return _template(codec.format, codec.text)


def write_caption(codec: SequenceCodec, caption: CaptionText) -> list[int]:
    """The tokens of a caption's text, without [BOT] and [EOC]. Raises InputError if it lacks a
    part of the format, and TooLongError if the text does not fit.
    """
    bins = codec.format.vocabulary.bin_range
    tokens: list[int] = []
    for part in template(codec):
        if part.kind == "fixed":
            tokens += part.tokens
        elif part.kind == "category":
            if caption.category is None:
                raise InputError("This caption format names the category, but none was given.")
            tokens += _name(codec.text, caption.category)
        elif part.kind == "box":
            if caption.box is None:
                raise InputError("This caption format writes the box, but none was given.")
            tokens += [bins[i] for i in box_to_bins(caption.box)]
        else:
            tokens += codec.text.encode(" " + caption.caption)
    room = codec.format.codes_per_image
    if len(tokens) > room:
        raise TooLongError(
            f"The caption {shown(caption.caption)} takes {len(tokens)} tokens; there is room for "
            f"{room}."
        )
    return tokens


def longest_caption(codec: SequenceCodec, category: str, caption: str) -> int:
    """The most tokens that `write_caption` can write: a token stands for at least one byte."""
    lengths = {"category": len(category.encode()), "box": 4, "caption": 1 + len(caption.encode())}
    return sum(lengths.get(part.kind, len(part.tokens)) for part in template(codec))


def given_category(codec: SequenceCodec, category: str | None) -> list[int]:
    """`Category: <c_st> name <c_ed>`, the part that category=given puts into the prompt."""
    if category is None:
        raise InputError("This caption format names the category, but none was given.")
    head = template(codec)[0].tokens
    return [*head, *codec.text.encode(category), codec.format.vocabulary.category_end]


def read_caption(codec: SequenceCodec, tokens: Iterable[int]) -> CaptionText:
    """The inverse of `write_caption`. Raises InputError if the tokens do not follow the
    template.
    """
    tokens = list(tokens)
    found: dict[str, list[int]] = {}
    parts = template(codec)
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
        else:  # Category and box end with a tag, which no text contains.
            try:
                stop = tokens.index(following.tokens[0], position)
            except ValueError:
                raise InputError(f"The caption's {part.kind} is not closed.") from None
        found[part.kind] = tokens[position:stop]
        position = stop
    if position != len(tokens):
        raise InputError("The caption's text does not follow its template.")
    return CaptionText(
        codec.read_text(found["category"]) if "category" in found else None,
        _read_box(codec.format.vocabulary, found["box"]) if "box" in found else None,
        codec.read_text(found["caption"]).removeprefix(" "),
    )


def caption_grammar(codec: SequenceCodec, category: str) -> Grammar:
    """A caption's text and [EOC]. The text takes at most N tokens, so each part leaves the room
    that the later ones need.

    category: the class's name, forced if the format gives it (category=given).
    """
    vocabulary = codec.format.vocabulary
    *parts, _, closing = template(codec)
    least_left = sum(map(_least, template(codec)))
    room = codec.format.codes_per_image
    opened = 0  # Tokens of the next fixed part that are already written: the tag after a category.
    for part in parts:
        least_left -= _least(part)
        if part.kind == "fixed":
            yield from forced(part.tokens[opened:])
            opened, used = 0, len(part.tokens)
        elif part.kind == "box":
            yield from _box(vocabulary)
            used = 4
        elif codec.format.category == "given":
            used = yield from _given(codec.text.encode(category), room - least_left, category)
        else:
            used = yield from _category(vocabulary, room - least_left)
            opened = 1
        room -= used
    (full_stop,) = closing.tokens
    yield from _closed_text(vocabulary, full_stop, room)


@lru_cache(maxsize=16)
def _template(format: SequenceFormat, text: TextTokenizer) -> tuple[CaptionPart, ...]:
    vocabulary = format.vocabulary
    parts: list[CaptionPart] = []
    lead = ""
    if format.category != "none":
        opening = (*text.encode("Category:"), vocabulary.category_start)
        parts += [CaptionPart("fixed", opening), CaptionPart("category")]
        parts.append(CaptionPart("fixed", (vocabulary.category_end,)))
        lead = ". "
    if format.box == "text":
        opening = (*text.encode(lead + "Bboxes:"), vocabulary.box_start)
        parts += [CaptionPart("fixed", opening), CaptionPart("box")]
        parts.append(CaptionPart("fixed", (vocabulary.box_end,)))
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


def _read_box(vocabulary: Vocabulary, tokens: list[int]) -> Box:
    if len(tokens) != 4 or not all(token in vocabulary.bin_range for token in tokens):
        raise InputError("A caption's box must be four bins.")
    return bins_to_box([token - vocabulary.bin_range.start for token in tokens])


def _least(part: CaptionPart) -> int:
    """The least number of tokens of a part."""
    return {"fixed": len(part.tokens), "category": 1, "box": 4, "caption": 0}[part.kind]


def _category(vocabulary: Vocabulary, room: int) -> Generator[Allowed, int, int]:
    """One to `room` text tokens, then <c_ed>. Returns their number without <c_ed>."""
    end = range(vocabulary.category_end, vocabulary.category_end + 1)
    for used in range(room):
        token = yield (vocabulary.text_range, end) if used else (vocabulary.text_range,)
        if token == vocabulary.category_end:
            return used
    yield (end,)
    return room


def _given(tokens: list[int], room: int, category: str) -> Generator[Allowed, int, int]:
    if len(tokens) > room:
        raise TooLongError(
            f"The category '{category}' takes {len(tokens)} tokens; there is room for {room}."
        )
    yield from forced(tokens)
    return len(tokens)


def _box(vocabulary: Vocabulary) -> Grammar:
    """Four bins: x1, y1, then x2 >= x1 and y2 >= y1."""
    bins = vocabulary.bin_range
    left = yield (bins,)
    top = yield (bins,)
    yield (range(left, bins.stop),)
    yield (range(top, bins.stop),)


def _closed_text(vocabulary: Vocabulary, full_stop: int, room: int) -> Grammar:
    """Text of at most `room` tokens whose last one is the template's full stop, then [EOC].

    A full stop may also be part of the caption. It is the template's if [EOC] follows, and [EOC]
    may follow only a full stop.
    """
    end = range(vocabulary.eoc, vocabulary.eoc + 1)
    last = None
    for left in range(room, 0, -1):
        text = vocabulary.text_range if left > 1 else range(full_stop, full_stop + 1)
        last = yield (text, end) if last == full_stop else (text,)
        if last == vocabulary.eoc:
            return
    yield (end,)
