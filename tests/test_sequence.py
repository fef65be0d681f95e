"""Sequences have the paper's lengths, have losses at the right tokens, and decode to exactly the
original episode.
"""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_moe.attributes import PADDING, attribute_class
from icl_moe.boxes import bins_to_box
from icl_moe.errors import InputError
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TokenSequence, TooLongError
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.caption_template import read_caption
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

SMALL = Vocabulary(text_merges=1000, image_codes=64)
CODES = 48
CATEGORIES, BOXES = ("none", "written", "given"), ("none", "text", "image")
TEXT = TextTokenizer(merges=1000)

# Spaces and full stops also occur in the template, so they are the most likely cause of errors.
texts = st.text(max_size=8) | st.text(alphabet=" .:a", max_size=10)
names = st.text(max_size=5)


@st.composite
def formats(draw: st.DrawFn) -> SequenceFormat:
    return SequenceFormat(
        SMALL,
        CODES,
        draw(st.sampled_from(CATEGORIES)),
        draw(st.sampled_from(BOXES)),
        draw(st.booleans()),
        prompt_length=24,
    )


def image_codes() -> st.SearchStrategy[np.ndarray]:
    # A few seeds suffice, since the values of the codes do not affect the layout.
    return st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).integers(0, SMALL.image_codes, CODES)
    )


@st.composite
def episodes(draw: st.DrawFn, format: SequenceFormat) -> Episode:
    category, count = draw(names), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return Episode(
            SEGMENTATION,
            category,
            tuple(SegmentationPair(draw(image_codes()), draw(image_codes())) for _ in range(count)),
        )
    return Episode(
        CAPTIONING, category, tuple(draw(caption_pairs(format, category)) for _ in range(count))
    )


@st.composite
def caption_pairs(draw: st.DrawFn, format: SequenceFormat, category: str) -> CaptionPair:
    bins = st.tuples(*[st.integers(0, 1000)] * 4)
    return CaptionPair(
        draw(image_codes()),
        draw(texts),
        category=category if format.category != "none" else None,
        box=bins_to_box(draw(bins)) if format.box == "text" else None,
        box_image=draw(image_codes()) if format.box == "image" else None,
    )


@st.composite
def written_episodes(draw: st.DrawFn) -> tuple[SequenceCodec, Episode, TokenSequence]:
    codec = SequenceCodec(draw(formats()), TEXT)
    episode = draw(episodes(codec.format))
    try:
        return codec, episode, codec.encode(episode)
    except TooLongError:
        # Rare characters take one token per byte; such a text does not fit here and is tested
        # below.
        short = [
            dataclasses.replace(pair, caption="a") if isinstance(pair, CaptionPair) else pair
            for pair in episode.pairs
        ]
        short = [
            dataclasses.replace(pair, category=pair.category and "b")
            if isinstance(pair, CaptionPair)
            else pair
            for pair in short
        ]
        episode = Episode(episode.task, "b", tuple(short))
        return codec, episode, codec.encode(episode)


def same_pair(a: Any, b: Any) -> bool:
    return type(a) is type(b) and all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for f in dataclasses.fields(a)
        for x, y in [(getattr(a, f.name), getattr(b, f.name))]
    )


@settings(max_examples=300)
@given(written_episodes(), st.booleans())
def test_decoding_gives_the_episode_back_in_either_layout(
    written: tuple[SequenceCodec, Episode, TokenSequence], packed: bool
) -> None:
    codec, episode, sequence = written
    again = codec.decode(sequence.unpadded() if packed else sequence, episode.task)
    assert again.task is episode.task
    assert len(again.pairs) == len(episode.pairs)
    assert all(same_pair(a, b) for a, b in zip(again.pairs, episode.pairs, strict=True))
    says_class = codec.format.class_prompt or (
        episode.task is CAPTIONING and codec.format.category != "none"
    )
    assert again.category == (episode.category if says_class else "")


@given(written_episodes())
def test_spans_cover_the_sequence_in_order_and_every_pair_has_its_place(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, sequence = written
    assert len(sequence) == codec.format.length(len(episode.pairs))
    starts = [span.start for span in sequence.spans]
    stops = [span.stop for span in sequence.spans]
    assert starts == [0, *stops[:-1]]
    assert stops[-1] == len(sequence)
    assert all(span.length > 0 for span in sequence.spans)
    inputs = [span.start for span in sequence.spans if span.role == "input"]
    lead = codec.format.prompt_length if codec.format.class_prompt else 0
    assert inputs == [lead + 1 + i * codec.format.pair_length for i in range(len(episode.pairs))]


@given(written_episodes())
def test_only_padding_is_padding(written: tuple[SequenceCodec, Episode, TokenSequence]) -> None:
    codec, _, sequence = written
    padded = sequence.attributes() == PADDING
    np.testing.assert_array_equal(padded, sequence.tokens_L == codec.format.vocabulary.pad)
    roles = np.repeat(
        [span.role == "padding" for span in sequence.spans],
        [span.length for span in sequence.spans],
    )
    np.testing.assert_array_equal(padded, roles)


@given(written_episodes())
def test_packing_drops_the_padding_and_keeps_the_rest(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    _, _, sequence = written
    packed, keep = sequence.unpadded(), sequence.attributes() != PADDING
    np.testing.assert_array_equal(packed.tokens_L, sequence.tokens_L[keep])
    np.testing.assert_array_equal(packed.positions_L, np.flatnonzero(keep))
    np.testing.assert_array_equal(packed.attributes(), sequence.attributes()[keep])
    np.testing.assert_array_equal(packed.loss_weights(0.5), sequence.loss_weights(0.5)[keep])
    assert packed.unpadded().spans == packed.spans


@given(written_episodes())
def test_loss_falls_on_outputs_and_by_setting_on_input_codes(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, sequence = written
    vocabulary, half = codec.format.vocabulary, sequence.loss_weights(0.5)
    assert set(np.unique(half)) == {0.0, 0.5, 1.0}
    np.testing.assert_array_equal(sequence.loss_weights(), np.where(half == 1.0, 1.0, 0.0))
    assert (half == 0.5).sum() == CODES * len(episode.pairs)
    is_code = np.isin(sequence.tokens_L, vocabulary.image_range)
    assert is_code[half == 0.5].all()
    assert (half[is_code] > 0).all()
    # Markers and padding have no loss, except the [EOC] of a caption; that of a mask has none.
    for marker in (vocabulary.boi, vocabulary.bot, vocabulary.pad):
        assert (half[sequence.tokens_L == marker] == 0).all()
    ends = half[sequence.tokens_L == vocabulary.eoc]
    assert len(ends) == len(episode.pairs)
    assert (ends == (1.0 if episode.task is CAPTIONING else 0.0)).all()


@given(written_episodes())
def test_every_span_has_the_attribute_class_of_its_stream(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, sequence = written
    outputs = episode.task.outputs(codec.format)
    prompt = codec.format.class_prompt
    allowed = {
        "padding": {PADDING},
        "input": {attribute_class(outputs, "image", False, prompt)},
        "prompt": {attribute_class(outputs, "text", False, prompt)},
        "given": {attribute_class(outputs, "text", True, prompt)},
        "output": {attribute_class(outputs, modality, True, prompt) for modality in outputs},
    }
    allowed["marker"] = allowed["input"] | allowed["output"]
    for span in sequence.spans:
        assert span.attributes in allowed[span.role]


@given(written_episodes())
def test_a_prompt_is_the_start_of_what_it_asks_for(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, sequence = written
    examples = Episode(episode.task, episode.category, episode.pairs[:-1])
    prompt = codec.encode_prompt(examples, episode.pairs[-1].image)
    np.testing.assert_array_equal(prompt.tokens_L, sequence.tokens_L[: len(prompt)])
    np.testing.assert_array_equal(prompt.positions_L, sequence.positions_L[: len(prompt)])
    np.testing.assert_array_equal(prompt.attributes(), sequence.attributes()[: len(prompt)])
    # The next token is the first one that the model must write.
    last_image = max(span.stop for span in sequence.spans if span.role == "input")
    assert len(prompt) == next(
        span.start for span in sequence.spans if span.role == "output" and span.start >= last_image
    )


class TestThePapersSizes:
    """256 px at downsampling 16, with GPT-2's full vocabulary."""

    @pytest.fixture
    def codec(self, gpt2: TextTokenizer) -> SequenceCodec:
        return SequenceCodec(SequenceFormat(), gpt2)

    def test_a_pair_is_515_positions_and_four_are_2060(self, codec: SequenceCodec) -> None:
        zeros = np.zeros(256, dtype=np.int64)
        masks = codec.encode(Episode(SEGMENTATION, "dog", (SegmentationPair(zeros, zeros),) * 4))
        captions = codec.encode(
            Episode(
                CAPTIONING, "dog", (CaptionPair(zeros, "a dog", "dog", (0.0, 0.0, 1.0, 1.0)),) * 4
            )
        )
        assert codec.format.pair_length == 515
        assert len(masks) == len(captions) == codec.format.length(4) == 2060

    def test_a_segmentation_pair_token_by_token(self, codec: SequenceCodec) -> None:
        image, mask = np.arange(256), np.arange(256)[::-1]
        sequence = codec.encode(Episode(SEGMENTATION, "dog", (SegmentationPair(image, mask),)))
        assert sequence.tokens_L.tolist() == [
            51281,
            *(50257 + image),
            51281,
            *(50257 + mask),
            51283,
        ]
        assert [(span.role, span.length) for span in sequence.spans] == [
            ("marker", 1),
            ("input", 256),
            ("marker", 1),
            ("output", 256),
            ("marker", 1),
        ]
        assert sequence.loss_weights(0.5).tolist() == [0.0, *[0.5] * 256, 0.0, *[1.0] * 256, 0.0]

    def test_a_caption_reads_as_the_papers_template(
        self, codec: SequenceCodec, gpt2: TextTokenizer
    ) -> None:
        pair = CaptionPair(
            np.zeros(256, dtype=np.int64), "a dog on grass", "dog", (0.1, 0.25, 0.5, 1.0)
        )
        sequence = codec.encode(Episode(CAPTIONING, "dog", (pair,)))
        words = "".join(
            gpt2.decode([token]) if token < 50257 else codec.format.vocabulary.name(token)
            for token in sequence.tokens_L[257:].tolist()
        )
        template = (
            "Category:<c_st>dog<c_ed>. Bboxes:<b_st><bin_100><bin_250><bin_500><bin_1000><b_ed>. "
            "Caption: a dog on grass."
        )
        assert words.replace("[PAD]", "") == "[BOT]" + template + "[EOC]"
        written = [span for span in sequence.spans if span.role == "output"]
        assert len(written) == 1
        assert sequence.tokens_L[written[0].stop - 1] == codec.format.vocabulary.eoc

    def test_the_vocabulary_without_tags_writes_masks_and_plain_captions(
        self, gpt2: TextTokenizer
    ) -> None:
        format = SequenceFormat(Vocabulary(tags=False), category="none", box="none")
        assert format.vocabulary.size == 51290
        codec, zeros = SequenceCodec(format, gpt2), np.zeros(256, dtype=np.int64)
        sequence = codec.encode(Episode(CAPTIONING, "", (CaptionPair(zeros, "a dog"),)))
        assert sequence.tokens_L.max() < 51290
        (pair,) = codec.decode(sequence, CAPTIONING).pairs
        assert isinstance(pair, CaptionPair)
        assert pair.caption == "a dog"

    def test_128_pixels_make_pairs_of_131(self) -> None:
        assert SequenceFormat(codes_per_image=64).length(4) == 524

    def test_a_box_drawn_as_an_image_and_a_class_prompt_take_their_positions(self) -> None:
        assert SequenceFormat(box="image").pair_length == 515 + 257
        assert SequenceFormat(class_prompt=True, prompt_length=20).length(3) == 20 + 3 * 515


def caption_episode(caption: str, category: str = "dog") -> Episode:
    return Episode(
        CAPTIONING,
        category,
        (CaptionPair(np.zeros(CODES, dtype=np.int64), caption, category, (0.0, 0.0, 1.0, 1.0)),),
    )


def test_a_caption_that_just_fits_has_no_padding_and_one_more_word_is_too_long() -> None:
    codec = SequenceCodec(SequenceFormat(SMALL, CODES), TEXT)
    room = next(
        n
        for n in range(1, 60)
        if len(codec.encode(caption_episode(" a" * n)).unpadded()) == codec.format.pair_length
    )
    assert all(span.role != "padding" for span in codec.encode(caption_episode(" a" * room)).spans)
    with pytest.raises(
        TooLongError, match=rf"takes {CODES + 1} tokens; there is room for {CODES}\."
    ):
        codec.encode(caption_episode(" a" * (room + 1)))


def test_a_class_name_without_room_is_too_long() -> None:
    codec = SequenceCodec(
        SequenceFormat(SMALL, CODES, "none", "none", class_prompt=True, prompt_length=5), TEXT
    )
    with pytest.raises(TooLongError, match="class prompt of 'zzzzz'"):
        codec.encode(
            Episode(CAPTIONING, "zzzzz", (CaptionPair(np.zeros(CODES, dtype=np.int64), "a"),))
        )


@pytest.mark.parametrize(
    ("format", "pair", "message"),
    [
        (
            SequenceFormat(SMALL, CODES),
            CaptionPair(np.zeros(CODES, dtype=np.int64), "a", None, (0.0, 0.0, 1.0, 1.0)),
            "names the category",
        ),
        (
            SequenceFormat(SMALL, CODES, "given"),
            CaptionPair(np.zeros(CODES, dtype=np.int64), "a"),
            "names the category",
        ),
        (
            SequenceFormat(SMALL, CODES),
            CaptionPair(np.zeros(CODES, dtype=np.int64), "a", "dog"),
            "writes the box",
        ),
        (
            SequenceFormat(SMALL, CODES, box="image"),
            CaptionPair(np.zeros(CODES, dtype=np.int64), "a", "dog"),
            "lacks the image of its box",
        ),
        (
            SequenceFormat(SMALL, CODES, "none", "none"),
            CaptionPair(np.zeros(CODES + 1, dtype=np.int64), "a"),
            f"{CODES} codes",
        ),
        (
            SequenceFormat(SMALL, CODES, "none", "none"),
            CaptionPair(np.full(CODES, 64), "a"),
            r"0\.\.63",
        ),
        (
            SequenceFormat(SMALL, CODES),
            SegmentationPair(np.zeros(CODES, dtype=np.int64), np.zeros(CODES, dtype=np.int64)),
            "SegmentationPair cannot be in",
        ),
    ],
)
def test_a_pair_that_the_format_cannot_write_is_refused(
    format: SequenceFormat, pair: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SequenceCodec(format, TEXT).encode(Episode(CAPTIONING, "dog", (pair,)))


def test_a_format_that_needs_tags_says_which_setting_does() -> None:
    plain = Vocabulary(tags=False)
    for settings_, name in (
        ({"category": "written", "box": "none"}, "caption.category"),
        ({"category": "none", "box": "text"}, "caption.box=text"),
        ({"category": "none", "box": "none", "class_prompt": True}, "class_prompt"),
    ):
        with pytest.raises(InputError, match=re.escape(f"{name} needs the tags")):
            SequenceFormat(plain, **settings_)


def test_a_text_tokenizer_of_another_size_is_refused(gpt2: TextTokenizer) -> None:
    with pytest.raises(InputError, match="50257 ids, but the vocabulary has room for 1256"):
        SequenceCodec(SequenceFormat(SMALL, CODES), gpt2)


@settings(max_examples=200)
@given(formats(), st.data())
def test_whatever_a_model_writes_is_a_caption_or_a_sentence(
    format: SequenceFormat, data: st.DataObject
) -> None:
    codec = SequenceCodec(format, TEXT)
    pair = data.draw(caption_pairs(format, "dog"))
    try:
        sequence = codec.encode(Episode(CAPTIONING, "dog", (pair,)))
    except TooLongError:
        return
    first = next(
        i
        for i, token in enumerate(sequence.tokens_L.tolist())
        if token == format.vocabulary.bot and i >= CODES
    )
    tokens = sequence.tokens_L[
        first + 1 : sequence.tokens_L.tolist().index(format.vocabulary.eoc)
    ].tolist()
    for _ in range(data.draw(st.integers(1, 3))):
        tokens[data.draw(st.integers(0, len(tokens) - 1))] = data.draw(
            st.integers(0, format.vocabulary.size - 1)
        )
    tokens = tokens[: data.draw(st.integers(0, len(tokens)))]
    try:
        category, box, caption = read_caption(codec, tokens)
    except InputError:
        return
    assert (category is None) == (format.category == "none")
    assert (box is None) == (format.box != "text")
    assert isinstance(caption, str)


def test_a_sequence_of_another_kind_does_not_decode() -> None:
    codec = SequenceCodec(SequenceFormat(SMALL, CODES, "none", "none"), TEXT)
    sequence = codec.encode(
        Episode(CAPTIONING, "", (CaptionPair(np.zeros(CODES, dtype=np.int64), "a"),))
    )
    broken = dataclasses.replace(
        sequence, tokens_L=np.where(sequence.tokens_L == SMALL.eoc, SMALL.pad, sequence.tokens_L)
    )
    with pytest.raises(InputError, match=r"does not end with \[EOC\]"):
        codec.decode(broken, CAPTIONING)
    inputs_only = TokenSequence(
        sequence.tokens_L[: CODES + 1], sequence.positions_L[: CODES + 1], sequence.spans[:2]
    )
    with pytest.raises(InputError, match="lacks its image or its output"):
        codec.decode(inputs_only, CAPTIONING)


@pytest.mark.parametrize(
    ("bits", "stream"),
    [
        ("1 0 1 0 1 0 0 1", attribute_class({"image"}, "image", target=False)),
        ("1 0 1 0 1 0 1 1", attribute_class({"image"}, "image", target=True)),
        ("1 0 0 1 1 0 0 1", attribute_class({"text"}, "image", target=False)),
        ("1 0 0 1 0 1 1 1", attribute_class({"text"}, "text", target=True)),
        ("1 1 1 0 0 1 0 1", attribute_class({"image"}, "text", target=False, class_prompt=True)),
        ("1 0 1 1 1 0 1 1", attribute_class({"image", "text"}, "image", target=True)),
    ],
)
def test_a_stream_has_the_published_attribute_bits(bits: str, stream: int) -> None:
    assert [stream >> i & 1 for i in range(8)] == [int(bit) for bit in bits.split()]
    assert stream != PADDING


@given(written_episodes())
@settings(max_examples=30)
def test_links_name_the_input_code_of_the_cell_that_is_predicted_and_of_the_one_held(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, whole = written
    for sequence in (whole, whole.unpadded()):
        outputs = [
            span
            for span in sequence.spans
            if span.role == "output" and sequence.tokens_L[span.start] in SMALL.image_range
        ]
        images = [span for span in sequence.spans if span.role == "input"]
        draws = episode.task is SEGMENTATION or codec.format.box == "image"
        assert len(outputs) == (len(images) if draws else 0)
        expected = np.full((len(sequence), 2), -1)
        for output, image in zip(outputs, images, strict=False):
            for cell in range(CODES):
                code = sequence.tokens_L[image.start + cell]
                expected[output.start + cell - 1, 0] = code
                expected[output.start + cell, 1] = code
        np.testing.assert_array_equal(sequence.links(), expected)


@given(written_episodes())
@settings(max_examples=30)
def test_a_prompt_has_the_links_that_the_whole_sequence_has_there(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, whole = written
    examples = Episode(episode.task, episode.category, episode.pairs[:-1])
    prompt = codec.encode_prompt(examples, episode.pairs[-1].image)
    np.testing.assert_array_equal(prompt.links(), whole.links()[: len(prompt)])


@given(written_episodes())
@settings(max_examples=30)
def test_loss_on_the_query_is_the_loss_of_the_last_pair(
    written: tuple[SequenceCodec, Episode, TokenSequence],
) -> None:
    codec, episode, sequence = written
    everything, query = sequence.loss_weights(0.5), sequence.loss_weights(0.5, "query")
    start = codec.format.length(len(episode.pairs) - 1)
    assert not query[:start].any()
    np.testing.assert_array_equal(query[start:], everything[start:])
    assert query.sum() > 0
