"""What tasks share whose output is one image: how a pair is written and read.

pair: [BOI] image [BOI] output [EOC]
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from icl_moe.attributes import Modality
from icl_moe.errors import InputError
from icl_moe.sequence import Part, SequenceCodec, SequenceFormat, SequenceWriter
from icl_moe.tasks.grammar import Grammar, image_codes
from icl_moe.tasks.task import CodeReader, Output, Task, Truth


class OneImageTask(Task):
    """A task whose pairs are `pair_type(image, codes)`: the codes (N,) of the input image and of
    the output. `one_output` is the message for a pair that has not one output.
    """

    one_output: ClassVar[str]

    @abstractmethod
    def output_codes(self, pair: Any) -> np.ndarray:
        """The codes (N,) of a pair's output."""

    def outputs(self, format: SequenceFormat) -> tuple[Modality, ...]:
        return ("image",)

    def write_output(self, writer: SequenceWriter, pair: Any) -> None:
        vocabulary = writer.format.vocabulary
        writer.marker(vocabulary.boi, "image")
        writer.drawn(self.output_codes(pair))
        writer.marker(vocabulary.eoc, "image")

    def open_output(self, writer: SequenceWriter, category: str) -> None:
        writer.marker(writer.format.vocabulary.boi, "image")

    def read_pair(self, codec: SequenceCodec, image: np.ndarray, outputs: Sequence[Part]) -> Any:
        if len(outputs) != 1:
            raise InputError(self.one_output)
        return self.pair_type(image, codec.format.vocabulary.to_codes(outputs[0][1]))

    def grammar(self, codec: SequenceCodec, category: str) -> Grammar:
        return image_codes(codec.format)

    def read_output(self, codec: SequenceCodec, image: np.ndarray, tokens: Sequence[int]) -> Any:
        return self.pair_type(image, codec.format.vocabulary.to_codes(np.array(tokens)))

    def pair(
        self,
        format: SequenceFormat,
        category: str,
        image: np.ndarray,
        target: Any,
        drawn: Sequence[np.ndarray],
    ) -> Any:
        (codes,) = drawn
        return self.pair_type(image, codes)

    def repeats(self, pair: Any, example: Any) -> bool:
        return np.array_equal(self.output_codes(pair), self.output_codes(example))

    def ceiling(self, model: CodeReader, truths: Sequence[Truth]) -> list[Output]:
        """The true outputs, encoded and decoded: the upper bound for any model with these codes
        (for masks, the mask ceiling).
        """
        return self.said(model, [truth.pairs[-1] for truth in truths])
