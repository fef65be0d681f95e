"""The single vocabulary of text, image codes, specials, tags and bins. Only this module defines
ranges of token ids.
"""

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np

from icl_moe.errors import InputError
from icl_moe.ranges import Natural, Range

if TYPE_CHECKING:
    from torch import Tensor

GPT2_MERGES = 50_000
GPT2_SIZE = 50_257
BIN_COUNT = 1_001

# The paper names [BOI], [BOT] and [EOC]; its count of 51290 leaves room for nine specials. We add
# padding; five stay reserved.
SPECIALS = (
    "[BOI]",
    "[BOT]",
    "[EOC]",
    "[PAD]",
    "[RESERVED_0]",
    "[RESERVED_1]",
    "[RESERVED_2]",
    "[RESERVED_3]",
    "[RESERVED_4]",
)
TAGS = ("<c_st>", "<c_ed>", "<b_st>", "<b_ed>")
MASK = "[MASK]"

_Codes = TypeVar("_Codes", np.ndarray, "Tensor")

MOST_STAGES = 62
"""The most stages of features codes: a token holds as many stages of two codes each."""

Stages = Annotated[int, Range(1, MOST_STAGES)]


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the parts; the ids follow from their order: text, image codes, nine specials, four
    tags, 1001 bins, [MASK], features codes.

    `text_merges`: the first N merges of GPT-2's BPE, at most 50,000. Its ids are in merge order, so
    a smaller text vocabulary (256 bytes + N) keeps the ids of the larger one; the full one also
    contains <|endoftext|>, 50257 in all. `tags`: whether it contains the four tags and the 1001 box
    bins (52295 ids with them, 51290 without, at full size). `mask`: whether it contains [MASK],
    which replaces a hidden code. `features`: the number of codes of the features tokenizer for
    input images, of each of its stages; 0 if they are image codes. The latter two come last, so
    that no other id depends on them.

    `feature_stages`: how many codes together describe a cell of an input image, each what the
    codes before it leave over (see `icl_moe.tokenizers.features`). They share one token, so that
    the sequences do not become longer: a token stands for one of features ** feature_stages
    combinations, but an embedding has only features x feature_stages rows, and the vector of a
    token is the sum of its stages' rows.
    """

    text_merges: Annotated[int, Range(0, GPT2_MERGES)] = GPT2_MERGES
    image_codes: Annotated[int, Range(2)] = 1024
    tags: bool = True
    mask: bool = False
    features: Natural = 0
    feature_stages: Stages = 1

    def __post_init__(self) -> None:
        if self.features == 1:
            raise InputError("vocabulary.features must be 0, or at least 2, not 1.")
        if self.feature_stages > 1 and not self.features:
            raise InputError("vocabulary.feature_stages needs vocabulary.features.")
        check_stages(self.features, self.feature_stages)

    @cached_property
    def text_size(self) -> int:
        return GPT2_SIZE if self.text_merges == GPT2_MERGES else 256 + self.text_merges

    @cached_property
    def size(self) -> int:
        """The number of rows of an embedding, and of the logits. It is the number of ids, unless
        features codes have several stages.
        """
        return self._feature_start + self.features * self.feature_stages

    @cached_property
    def ids(self) -> int:
        """The number of token ids."""
        return self.feature_range.stop

    @cached_property
    def token_dtype(self) -> np.dtype:
        """The type in which token ids are stored: uint16 for up to 65,536 ids, uint32 for up to
        2**32, otherwise int64.
        """
        return np.promote_types(np.uint16, smallest_type(self.ids))

    @cached_property
    def boi(self) -> int:
        return self._special("[BOI]")

    @cached_property
    def bot(self) -> int:
        return self._special("[BOT]")

    @cached_property
    def eoc(self) -> int:
        return self._special("[EOC]")

    @cached_property
    def pad(self) -> int:
        return self._special("[PAD]")

    @cached_property
    def category_start(self) -> int:
        return self._tag("<c_st>")

    @cached_property
    def category_end(self) -> int:
        return self._tag("<c_ed>")

    @cached_property
    def box_start(self) -> int:
        return self._tag("<b_st>")

    @cached_property
    def box_end(self) -> int:
        return self._tag("<b_ed>")

    @property
    def mask_token(self) -> int:
        """[MASK]; raises InputError in a vocabulary without it."""
        if not self.mask:
            raise InputError("Hidden codes need [MASK]: set vocabulary.mask=true.")
        return self._mask_start

    @cached_property
    def image_range(self) -> range:
        return range(self.text_size, self.text_size + self.image_codes)

    @cached_property
    def feature_range(self) -> range:
        start = self._feature_start
        return range(start, start + self.features**self.feature_stages)

    @cached_property
    def input_range(self) -> range:
        """The ids of input images: features codes if there are any, otherwise image codes."""
        return self.feature_range if self.features else self.image_range

    def are_codes(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token (any shape) is an image code or a features code."""
        return _within(tokens, self.image_range) | _within(tokens, self.feature_range)

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """The rows of an embedding (any number, flat, int64) whose sums are the vectors of tokens
        (any shape): one row of each token, but one of each stage of a features code.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        is_feature = _within(tokens, self.feature_range)
        codes = tokens[is_feature] - self._feature_start
        rows = stage_rows(codes, max(self.features, 1), self.feature_stages)
        return np.concatenate([tokens[~is_feature], *(self._feature_start + row for row in rows)])

    @cached_property
    def text_range(self) -> range:
        return range(self.text_size)

    @cached_property
    def bin_range(self) -> range:
        start = self._tag_start + len(TAGS)
        return range(start, start + (BIN_COUNT if self.tags else 0))

    def from_codes(self, codes: np.ndarray) -> np.ndarray:
        """Image codes (any shape, 0..image_codes-1) as token ids (int64)."""
        return _to_tokens(codes, self.image_range, "Image codes")

    def to_codes(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids of image codes (any shape) as codes (int64); raises InputError if an id is not
        an image code.
        """
        return _to_codes(tokens, self.image_range, "an image code")

    def from_input_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes of an input image (any shape) as token ids (int64) in `input_range`."""
        return _to_tokens(
            codes, self.input_range, "Features codes" if self.features else "Image codes"
        )

    def to_input_codes(self, tokens: np.ndarray) -> np.ndarray:
        """The inverse of `from_input_codes`; raises InputError if an id is from another range."""
        return _to_codes(
            tokens, self.input_range, "a features code" if self.features else "an image code"
        )

    def name(self, token: int) -> str:
        """A readable name of one id, for previews and error messages; a text id is named by its
        number.
        """
        if token in self.text_range:
            return f"text_{token}"
        if token in self.image_range:
            return f"<image_{token - self.text_size}>"
        if token in self.bin_range:
            return f"<bin_{token - self.bin_range.start}>"
        if self.mask and token == self._mask_start:
            return MASK
        if token in self.feature_range:
            codes = split_stages(
                np.array(token - self._feature_start), self.features, self.feature_stages
            )
            return f"<feature_{'_'.join(map(str, codes))}>"
        named = (*SPECIALS, *(TAGS if self.tags else ()))
        index = token - self._special_start
        if 0 <= index < len(named):
            return named[index]
        raise InputError(f"The token id {token} is outside this vocabulary of {self.ids}.")

    @property
    def _special_start(self) -> int:
        return self.text_size + self.image_codes

    @property
    def _tag_start(self) -> int:
        return self._special_start + len(SPECIALS)

    @property
    def _mask_start(self) -> int:
        return self._tag_start + (len(TAGS) + BIN_COUNT if self.tags else 0)

    @property
    def _feature_start(self) -> int:
        return self._mask_start + self.mask

    def _special(self, name: str) -> int:
        return self._special_start + SPECIALS.index(name)

    def _tag(self, name: str) -> int:
        if not self.tags:
            raise InputError("Category tags and box bins need vocabulary.tags=true.")
        return self._tag_start + TAGS.index(name)


def smallest_type(count: int) -> np.dtype:
    """The smallest type that holds 0..count-1, but never uint64, with which NumPy and torch do not
    mix other integers.
    """
    smallest = np.min_scalar_type(count - 1)
    return np.dtype(np.int64) if smallest == np.uint64 else smallest


def split_stages(codes: _Codes, features: int, stages: int) -> list[_Codes]:
    """The code of each of the stages, 0..features-1, that combined codes (any shape,
    0..features**stages-1) stand for, the first stage first; see `join_stages`.
    """
    return [codes // features ** (stages - 1 - stage) % features for stage in range(stages)]


def stage_rows(codes: _Codes, features: int, stages: int) -> list[_Codes]:
    """For combined codes (any shape) the rows of each stage's code in a table that has `features`
    rows for each stage, one stage below the other.
    """
    parts = split_stages(codes, features, stages)
    return [stage * features + part for stage, part in enumerate(parts)]


def check_stages(features: int, stages: int) -> None:
    """Raise InputError if a token could not hold all combinations of the stages' codes."""
    if features**stages > 1 << 62:
        raise InputError(
            f"{features} features codes in {stages} stages make more combinations than 62 bits can "
            "hold; choose fewer."
        )


def join_stages(parts: list[_Codes], features: int) -> _Codes:
    """The combined code of the codes of each stage: their digits in a number of base `features`,
    the first stage first.
    """
    return reduce(lambda joined, part: joined * features + part, parts)


def _within(values: np.ndarray, ids: range) -> np.ndarray:
    return (values >= ids.start) & (values < ids.stop)


def _to_tokens(codes: np.ndarray, ids: range, what: str) -> np.ndarray:
    codes = np.asarray(codes, dtype=np.int64)
    if codes.size and codes.view(np.uint64).max() >= len(ids):  # Negative ones are large then.
        raise InputError(f"{what} must lie in 0..{len(ids) - 1}, not {codes.min()}..{codes.max()}.")
    return codes + ids.start


def _to_codes(tokens: np.ndarray, ids: range, what: str) -> np.ndarray:
    codes = np.asarray(tokens, dtype=np.int64) - ids.start
    if codes.size and (codes.min() < 0 or codes.max() >= len(ids)):
        raise InputError(f"A token that should be {what} is from another range.")
    return codes
