"""What may be written next: the format's template as coroutines that yield the allowed tokens and
take the chosen one.

    allowed = next(grammar)
    while True:
        allowed = grammar.send(token)  # StopIteration: the output is complete

An output that follows its grammar fits into its place in the sequence and can be read back exactly.
"""

from collections.abc import Generator, Sequence

from icl_moe.sequence import CaptionPart, SequenceCodec, SequenceFormat, TooLongError
from icl_moe.tasks import Task, attribute_class
from icl_moe.vocabulary import Vocabulary

Allowed = tuple[range, ...]
"""Ranges of token ids, disjoint and none empty. A single id means that the token is forced."""

Grammar = Generator[Allowed, int, None]


def output_grammar(codec: SequenceCodec, task: Task, category: str) -> Grammar:
    """All that follows the marker which opens the query's output.

    Segmentation: N image codes. Captioning: the caption's text, closed by [EOC]; with box=image, N
    image codes and [BOT] come before it. category: the class's name, forced where the format gives
    it (category=given), else unused.
    """
    if task.output == "image" or codec.format.box == "image":
        for _ in range(codec.format.codes_per_image):
            yield (codec.format.vocabulary.image_range,)
    if task.output == "text":
        if codec.format.box == "image":
            yield from _forced([codec.format.vocabulary.bot])
        yield from _caption(codec, category)


def output_attributes(format: SequenceFormat, task: Task, token: int) -> int:
    """The attribute class of a token that a grammar let through."""
    drawn = token in format.vocabulary.image_range
    box_image = task.output == "text" and format.box == "image"
    return attribute_class(
        task,
        "image" if drawn else "text",
        target=True,
        class_prompt=format.class_prompt,
        box_image=box_image,
    )


def is_forced(allowed: Allowed) -> bool:
    """Whether there is nothing to choose."""
    return len(allowed) == 1 and len(allowed[0]) == 1


def _caption(codec: SequenceCodec, category: str) -> Grammar:
    """A caption's text and [EOC]. The text takes at most N tokens, so each part leaves the room
    that the later ones need.
    """
    vocabulary = codec.format.vocabulary
    *parts, _, closing = (
        codec.caption_parts
    )  # The template ends with the caption itself and a full stop.
    least_left = sum(map(_least, codec.caption_parts))
    room = codec.format.codes_per_image
    opened = (
        0  # Tokens of the next fixed part that are written already: the tag that closed a category.
    )
    for part in parts:
        least_left -= _least(part)
        if part.kind == "fixed":
            yield from _forced(part.tokens[opened:])
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


def _least(part: CaptionPart) -> int:
    """The fewest tokens that a part takes."""
    return {"fixed": len(part.tokens), "category": 1, "box": 4, "caption": 0}[part.kind]


def _category(vocabulary: Vocabulary, room: int) -> Generator[Allowed, int, int]:
    """One to `room` text tokens, then <c_ed>; returns their number, <c_ed> not counted."""
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
    yield from _forced(tokens)
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

    A full stop may also be part of the caption; it was the template's if [EOC] follows, which may
    follow nothing else.
    """
    end = range(vocabulary.eoc, vocabulary.eoc + 1)
    last = None
    for left in range(room, 0, -1):
        text = vocabulary.text_range if left > 1 else range(full_stop, full_stop + 1)
        last = yield (text, end) if last == full_stop else (text,)
        if last == vocabulary.eoc:
            return
    yield (end,)


def _forced(tokens: Sequence[int]) -> Grammar:
    for token in tokens:
        yield (range(token, token + 1),)
