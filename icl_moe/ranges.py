"""The ranges of numbers in recipes, which are declared beside the fields:

    heads: Count = 12
    dropout: Annotated[float, Range(0, below=1)] = 0.1

`icl_moe.settings` checks values against them. This is a separate module because the vocabulary,
which is a part of recipes, has ranges too.
"""

from dataclasses import dataclass
from typing import Annotated

LARGEST_INTEGER = 2**31 - 1
"""The largest whole number in a recipe: nobody needs so many steps, samples or pixels."""

LARGEST, SMALLEST = 1e9, 1e-30
"""The largest and the smallest positive size of numbers in a recipe: beyond them, computations in
float32 would soon reach infinity or 0.
"""


@dataclass(frozen=True)
class Range:
    """The numbers of at least `least` or above `above`, and of at most `most` or below `below`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def demand(self, value: float) -> str | None:
        """The demand that a number violates, such as "be at least 1"; None if it lies in the
        range.
        """
        if not self._holds(value):
            return str(self)
        if isinstance(value, int):
            return f"be at most {LARGEST_INTEGER}" if value > LARGEST_INTEGER else None
        if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
            return f"be of a size between {SMALLEST:g} and {LARGEST:g}"
        return None

    def _holds(self, value: float) -> bool:
        """Whether the number lies within the bounds; NaN never does."""
        return (
            value == value
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        start, stop = self.least or self.above or 0, self.below if self.most is None else self.most
        if stop is None:
            return f"be at least {start}" if self.above is None else "be a positive number"
        ends = [f"{end}" for end in (self.above, self.below) if end is not None]
        return f"lie in {start}..{stop}" + f" without {' and '.join(ends)}" * bool(ends)


Count = Annotated[int, Range(1)]
"""A number of at least one."""

Natural = Annotated[int, Range(0)]
"""A whole number that may be 0, such as a seed."""

LARGEST_SIDE = 8192
ImageSide = Annotated[int, Range(1, LARGEST_SIDE)]
"""The side in pixels of an image tokenizer's images."""

Weight = Annotated[float, Range(0)]
"""The weight of a part of a loss; 0 leaves the part out."""

Share = Annotated[float, Range(0, 1)]
"""A part of a whole, or of all cases."""

DropoutRate = Annotated[float, Range(0, below=1)]
LearningRate = Annotated[float, Range(above=0, most=1)]
Epsilon = Annotated[float, Range(above=0, most=1)]
TaskWeight = Annotated[float, Range(above=0)]
