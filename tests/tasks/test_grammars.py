"""For any choices among the allowed tokens, the output fits, ends, and can be read back."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TooLongError
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.caption_template import read_caption
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.grammar import is_forced
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_merges=300, image_codes=32)
TEXT = TextTokenizer(merges=300)


def codec(**settings) -> SequenceCodec:
    return SequenceCodec(
        SequenceFormat(vocabulary=VOCABULARY, codes_per_image=64, **settings), TEXT
    )


def walk(grammar, choose) -> list[int]:
    """The output if `choose` chooses among the allowed ids."""
    tokens: list[int] = []
    allowed = next(grammar)
    while True:
        tokens.append(choose(allowed, tokens))
        assert any(tokens[-1] in ids for ids in allowed)
        try:
            allowed = grammar.send(tokens[-1])
        except StopIteration:
            return tokens


FORMATS = [
    {"category": c, "box": b}
    for c in ("none", "written", "given")
    for b in ("none", "text", "image")
]


@pytest.mark.parametrize("format", FORMATS)
@given(seed=st.integers(0, 10**6), eager=st.floats(0, 1))
@settings(max_examples=40)
def test_any_walk_through_a_caption_grammar_fits_ends_and_reads_back(format, seed, eager):
    """eager: how often a tag or [EOC] is chosen if allowed, so that both short and full-length
    captions occur.
    """
    writer, rng = codec(**format), random.Random(seed)

    def choose(allowed, _):
        ids = allowed[-1] if rng.random() < eager else rng.choice(allowed)
        return rng.choice(ids)

    tokens = walk(CAPTIONING.grammar(writer, "dog"), choose)
    image, text = [], tokens
    if format["box"] == "image":
        image, text = tokens[:64], tokens[65:]
        assert tokens[64] == VOCABULARY.bot
        assert all(token in VOCABULARY.image_range for token in image)
    assert text[-1] == VOCABULARY.eoc
    assert len(text) - 1 <= writer.format.codes_per_image
    category, box, _ = read_caption(writer, text[:-1])
    assert (category is None) == (format["category"] == "none")
    assert category == "dog" or format["category"] != "given"
    if format["box"] == "text":
        assert box[0] <= box[2]
        assert box[1] <= box[3]


@pytest.mark.parametrize("format", FORMATS)
def test_the_grammar_lets_through_exactly_what_the_codec_writes(format):
    writer = codec(**format)
    box_image = np.arange(64) % 32 if format["box"] == "image" else None
    pair = CaptionPair(np.zeros(64, int), "a dog. no", "dog", (0.1, 0.2, 0.3, 0.4), box_image)
    sequence = writer.encode(Episode(CAPTIONING, "dog", (pair,)))
    # The target begins after the marker at the beginning of the output.
    start = next(span.stop for span in sequence.spans if span.role == "input") + 1
    target = sequence.tokens_L[start:].tolist()
    target = target[: target.index(VOCABULARY.eoc) + 1]
    assert walk(CAPTIONING.grammar(writer, "dog"), lambda _, tokens: target[len(tokens)]) == target
    attributes = sequence.attributes()[start:]
    assert [CAPTIONING.output_attributes(writer.format, token) for token in target] == attributes[
        : len(target)
    ].tolist()


def test_a_mask_is_image_codes_and_nothing_else():
    steps = []
    tokens = walk(
        SEGMENTATION.grammar(codec(), ""),
        lambda allowed, _: steps.append(allowed) or allowed[0][3],
    )
    assert tokens == [VOCABULARY.image_range[3]] * 64
    assert set(steps) == {(VOCABULARY.image_range,)}


def test_a_full_stop_ends_a_caption_only_when_eoc_follows():
    stop = TEXT.encode(".")[0]
    grammar = CAPTIONING.grammar(codec(category="none", box="none"), "")
    allowed = next(grammar)
    while is_forced(allowed):
        allowed = grammar.send(allowed[0][0])
    assert allowed == (VOCABULARY.text_range,)
    end = range(VOCABULARY.eoc, VOCABULARY.eoc + 1)
    assert grammar.send(stop) == (VOCABULARY.text_range, end)
    assert grammar.send(stop) == (VOCABULARY.text_range, end)
    assert grammar.send(stop + 1) == (VOCABULARY.text_range,)


def test_a_given_category_without_room_is_refused():
    with pytest.raises(TooLongError, match="there is room for"):
        walk(
            CAPTIONING.grammar(codec(category="given"), "antidisestablishmentarianism " * 8),
            lambda allowed, _: allowed[0][0],
        )
