"""Grammars of outputs, as coroutines that yield the allowed next tokens and receive the chosen one.

    allowed = next(grammar)
    while True:
        allowed = grammar.send(token)  # StopIteration: the output is complete

An output that follows its task's grammar fits into the sequence and can be read back exactly.
"""

from collections.abc import Generator, Sequence

from icl_moe.sequence import SequenceFormat

Allowed = tuple[range, ...]
"""Disjoint, non-empty ranges of token ids. A single id means that the token is forced."""

Grammar = Generator[Allowed, int, None]


def is_forced(allowed: Allowed) -> bool:
    """Whether only one token is allowed."""
    return len(allowed) == 1 and len(allowed[0]) == 1


def forced(tokens: Sequence[int]) -> Grammar:
    """Exactly these tokens."""
    for token in tokens:
        yield (range(token, token + 1),)


def image_codes(format: SequenceFormat) -> Grammar:
    """The N codes of an image."""
    for _ in range(format.codes_per_image):
        yield (format.vocabulary.image_range,)
