"""Attribute vectors: the kind of a token in the eight bits that attribute routing reads.

Uni-Perceiver-MoE gives every token eight bits. Here they are one byte, the token's *attribute
class*, so the class id is the vector itself and needs no second table. For a segmentation episode:

    [BOI] image    input side:  input image, target image, visual, causal               0b10010101
    [BOI] mask     target side: input image, target image, visual, target side, causal  0b11010101
"""

from collections.abc import Collection
from typing import Literal

Modality = Literal["image", "text"]

PADDING = 0
"""The attribute class of padding. No stream has it, since bit 7 is set in all of them."""

ATTRIBUTE_BITS = 8
_NAMES = (
    "input image",
    "input text",
    "target image",
    "target text",
    "visual",
    "textual",
    "target side",
    "causal",
)


def attribute_class(
    outputs: Collection[Modality], modality: Modality, target: bool, class_prompt: bool = False
) -> int:
    """The byte of the eight attribute bits of one token stream; bit i of the vector is bit i of the
    byte.

    Bits (as in Uni-Perceiver-MoE, which does not list these tasks): 0/1 the task's input contains
    visual data / text, 2/3 its target contains visual data / text, 4/5 this token is visual / text,
    6 it is on the target side, 7 it is under a causal mask.

    outputs: the modalities on the target side of the task. modality, target: of this stream.
    class_prompt: whether the sequence begins with the class name as text.
    """
    bits = (
        True,
        class_prompt,
        "image" in outputs,
        "text" in outputs,
        modality == "image",
        modality == "text",
        target,
        True,
    )
    return sum(bit << i for i, bit in enumerate(bits))


def attribute_bits(attributes: int) -> tuple[int, ...]:
    """The eight bits of an attribute class, bit 0 first."""
    return tuple(attributes >> i & 1 for i in range(ATTRIBUTE_BITS))


def is_target(attributes: int) -> bool:
    """Whether a stream is on the target side of its pair."""
    return bool(attribute_bits(attributes)[6])


def own_stream(attributes: int) -> int:
    """Which of four streams an attribute class is: 0 and 1 are the input and the target of tasks
    that write images alone, and 2 and 3 are those of tasks that write text.
    """
    bits = attribute_bits(attributes)
    return 2 * bits[3] + bits[6]


def is_output_image(attributes: int) -> bool:
    """Whether a stream consists of images on the target side of its pair."""
    return is_target(attributes) and bool(attribute_bits(attributes)[4])


def describe_attributes(attributes: int) -> str:
    """An attribute class in words, for tables: 'input image, target image, visual, target side,
    causal'.
    """
    set_bits = zip(_NAMES, attribute_bits(attributes), strict=True)
    return ", ".join(name for name, bit in set_bits if bit) or "padding"
