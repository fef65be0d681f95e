"""The task table: what a task reads and writes, and the attribute vector of each of its token
streams.

An attribute class is the byte of Uni-Perceiver-MoE's eight bits, so the class id *is* the vector
and needs no second table. A new task is a new row of `TASKS`, nothing more.
"""

from dataclasses import dataclass
from typing import Literal

Modality = Literal["image", "text"]

PADDING = 0
"""The attribute class of padding. No real stream has it: bit 7 is set in all of them."""

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


@dataclass(frozen=True)
class Task:
    """One task. `output` is the modality that it writes; its input is always an image (with a class
    prompt, text too).
    """

    name: str
    output: Modality


TASKS: dict[str, Task] = {
    task.name: task for task in (Task("segmentation", "image"), Task("captioning", "text"))
}


def attribute_class(
    task: Task,
    modality: Modality,
    target: bool,
    class_prompt: bool = False,
    box_image: bool = False,
) -> int:
    """The byte of the eight attribute bits of one token stream; bit i of the vector is bit i of the
    byte.

    Bits (Uni-Perceiver-MoE; rows for these tasks are ours): 0/1 the task's input holds visual data
    / text, 2/3 its target holds visual data / text, 4/5 this token is visual / text, 6 it is on the
    target side, 7 it is under a causal mask.

    modality, target: of this stream. class_prompt: whether the sequence opens with the class name
    as text.
    box_image: whether captions are preceded by the box drawn as an image.
    """
    bits = (
        True,
        class_prompt,
        task.output == "image" or box_image,
        task.output == "text",
        modality == "image",
        modality == "text",
        target,
        True,
    )
    return sum(bit << i for i, bit in enumerate(bits))


def attribute_bits(attributes: int) -> tuple[int, ...]:
    """The eight bits of an attribute class, bit 0 first."""
    return tuple(attributes >> i & 1 for i in range(ATTRIBUTE_BITS))


def describe_attributes(attributes: int) -> str:
    """An attribute class in words, for tables: 'input image, target image, visual, target side,
    causal'.
    """
    return (
        ", ".join(name for name, bit in zip(_NAMES, attribute_bits(attributes), strict=True) if bit)
        or "padding"
    )
