"""The vocabulary has the paper's sizes, and its parts cover it without overlap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.vocabulary import (
    BIN_COUNT,
    GPT2_MERGES,
    SPECIALS,
    TAGS,
    Vocabulary,
    join_stages,
    split_stages,
)

vocabularies = st.builds(
    Vocabulary,
    text_merges=st.one_of(st.integers(0, GPT2_MERGES), st.just(GPT2_MERGES)),
    image_codes=st.integers(2, 20_000),
    tags=st.booleans(),
    mask=st.booleans(),
    features=st.one_of(st.just(0), st.integers(2, 5_000)),
)


def test_the_papers_two_sizes_come_out_exactly() -> None:
    assert Vocabulary(tags=False).size == 51290
    assert Vocabulary(tags=True).size == 52295


def test_ids_of_the_full_vocabulary_stand_where_the_contract_says() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.text_range == range(0, 50257)
    assert vocabulary.image_range == range(50257, 51281)
    assert [vocabulary.boi, vocabulary.bot, vocabulary.eoc, vocabulary.pad] == [
        51281,
        51282,
        51283,
        51284,
    ]
    tags = [
        vocabulary.category_start,
        vocabulary.category_end,
        vocabulary.box_start,
        vocabulary.box_end,
    ]
    assert tags == [51290, 51291, 51292, 51293]
    assert vocabulary.bin_range == range(51294, 52295)


@given(vocabularies)
def test_every_id_belongs_to_one_part_and_has_its_own_name(vocabulary: Vocabulary) -> None:
    parts = len(vocabulary.text_range) + len(vocabulary.image_range) + len(SPECIALS)
    parts += len(TAGS) + BIN_COUNT if vocabulary.tags else 0
    assert vocabulary.size == vocabulary.ids == parts + vocabulary.mask + vocabulary.features
    start = vocabulary.image_range.stop
    names = [vocabulary.name(token) for token in range(start, vocabulary.size)]
    assert len(set(names)) == len(names)
    assert names[: len(SPECIALS)] == list(SPECIALS)
    for outside in (-1, vocabulary.size):
        with pytest.raises(InputError, match=f"{outside} is outside"):
            vocabulary.name(outside)


def test_the_mask_token_comes_last_and_moves_no_other_id() -> None:
    without, vocabulary = Vocabulary(), Vocabulary(mask=True)
    assert vocabulary.mask_token == without.size == 52295
    assert vocabulary.size == 52296
    assert vocabulary.name(52295) == "[MASK]"
    assert [vocabulary.name(i) for i in range(50257, 52295)] == [
        without.name(i) for i in range(50257, 52295)
    ]
    with pytest.raises(InputError, match=r"vocabulary\.mask=true"):
        _ = without.mask_token


@given(vocabularies)
def test_the_token_type_holds_every_id_and_is_no_wider_than_needed(vocabulary: Vocabulary) -> None:
    assert np.iinfo(vocabulary.token_dtype).max >= vocabulary.size - 1
    assert vocabulary.token_dtype == (np.uint16 if vocabulary.size <= 65536 else np.uint32)


def test_65536_ids_still_fit_into_two_bytes() -> None:
    base = Vocabulary().size - 1024
    assert Vocabulary(image_codes=65536 - base).token_dtype == np.uint16
    assert Vocabulary(image_codes=65537 - base).token_dtype == np.uint32


def test_a_smaller_text_vocabulary_keeps_bytes_and_drops_endoftext() -> None:
    assert Vocabulary(text_merges=0).text_size == 256
    assert Vocabulary(text_merges=1000).text_size == 1256
    assert Vocabulary(text_merges=GPT2_MERGES - 1).text_size == 50255
    assert Vocabulary(text_merges=GPT2_MERGES).text_size == 50257


@given(vocabularies, st.data())
def test_codes_come_back_from_their_tokens(vocabulary: Vocabulary, data: st.DataObject) -> None:
    codes = np.array(
        data.draw(st.lists(st.integers(0, vocabulary.image_codes - 1), max_size=20)), dtype=np.int64
    )
    tokens = vocabulary.from_codes(codes)
    assert all(int(token) in vocabulary.image_range for token in tokens)
    np.testing.assert_array_equal(vocabulary.to_codes(tokens), codes)


def test_features_codes_follow_the_mask_token_and_move_no_other_id() -> None:
    plain, reading = Vocabulary(mask=True), Vocabulary(mask=True, features=64)
    assert reading.feature_range == range(52296, 52360) and reading.size == 52360
    assert [reading.name(token) for token in range(50257, 52296)] == [
        plain.name(token) for token in range(50257, 52296)
    ]
    assert reading.name(52296) == "<feature_0>" and reading.mask_token == plain.mask_token
    assert Vocabulary(tags=False, features=64).feature_range == range(51290, 51354)


@given(vocabularies, st.data())
def test_input_images_are_features_codes_where_there_are_any(
    vocabulary: Vocabulary, data: st.DataObject
) -> None:
    size = vocabulary.features or vocabulary.image_codes
    codes = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    tokens = vocabulary.from_input_codes(codes)
    wanted = vocabulary.feature_range if vocabulary.features else vocabulary.image_range
    assert all(int(token) in wanted for token in tokens)
    np.testing.assert_array_equal(vocabulary.to_input_codes(tokens), codes)


def test_image_and_features_codes_are_not_taken_for_each_other() -> None:
    vocabulary = Vocabulary(features=64)
    with pytest.raises(InputError, match="should be a features code"):
        vocabulary.to_input_codes(vocabulary.from_codes(np.array([3])))
    with pytest.raises(InputError, match="should be an image code"):
        vocabulary.to_codes(vocabulary.from_input_codes(np.array([3])))
    with pytest.raises(InputError, match=r"Features codes must lie in 0\.\.63"):
        vocabulary.from_input_codes(np.array([64]))


@pytest.mark.parametrize("codes", [[-1], [0, 1024]])
def test_a_code_outside_the_codebook_is_refused(codes: list[int]) -> None:
    with pytest.raises(InputError, match=r"0\.\.1023"):
        Vocabulary().from_codes(np.array(codes))


def test_a_token_of_another_range_is_no_image_code() -> None:
    vocabulary = Vocabulary()
    for token in (vocabulary.text_range[-1], vocabulary.boi):
        with pytest.raises(InputError):
            vocabulary.to_codes(np.array([vocabulary.image_range[0], token]))


def test_tags_are_refused_where_the_vocabulary_has_none() -> None:
    vocabulary = Vocabulary(tags=False)
    assert len(vocabulary.bin_range) == 0
    with pytest.raises(InputError, match=r"vocabulary\.tags=true"):
        _ = vocabulary.category_start


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"text_merges": 50_001}, "text_merges"),
        ({"text_merges": -1}, "text_merges"),
        ({"image_codes": 1}, "image_codes"),
        ({"features": 1}, "features"),
        ({"features": -1}, "features"),
    ],
)
def test_impossible_sizes_are_refused_by_name(settings: dict[str, int], key: str) -> None:
    with pytest.raises(InputError, match=f"vocabulary.{key}"):
        load_recipe(
            TrainingRecipe,
            "demo",
            [f"vocabulary.{name}={value}" for name, value in settings.items()],
        )


@given(st.integers(2, 40), st.integers(1, 5), st.data())
def test_the_stages_of_features_codes_share_one_token(
    features: int, stages: int, data: st.DataObject
) -> None:
    vocabulary = Vocabulary(0, 16, False, features=features, feature_stages=stages)
    parts = data.draw(st.lists(st.integers(0, features - 1), min_size=stages, max_size=stages))
    code = int(join_stages([np.array(part) for part in parts], features))
    assert [int(part) for part in split_stages(np.array(code), features, stages)] == parts
    (token,) = vocabulary.from_input_codes(np.array([code]))
    assert token < vocabulary.ids and np.iinfo(vocabulary.token_dtype).max >= token
    assert vocabulary.name(int(token)) == f"<feature_{'_'.join(map(str, parts))}>"
    first = vocabulary.feature_range.start
    rows = [first + stage * features + part for stage, part in enumerate(parts)]
    assert sorted(vocabulary.rows(np.array([token, 3]))) == [3, *rows]
    assert vocabulary.size == first + stages * features > max(rows)
    with pytest.raises(InputError, match=f"{vocabulary.ids} is outside"):
        vocabulary.name(vocabulary.ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_stages": 2}, r"feature_stages needs vocabulary\.features"),
        (
            {"features": 1024, "feature_stages": 7},
            "1024 features codes in 7 stages make more combinations",
        ),
    ],
)
def test_stages_that_no_token_can_hold_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vocabulary(**settings)
