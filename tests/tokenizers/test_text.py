"""GPT-2's tokenizer: with all or fewer merges, from any source, lossless, and without special
tokens in plain text.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_moe.errors import InputError
from icl_moe.tokenizers.text import TextTokenizer

# Encodings by OpenAI's published GPT-2.
KNOWN = {
    "Hello world": [15496, 995],
    " the quick brown fox": [262, 2068, 7586, 21831],
    "don't": [9099, 470],
    "café": [66, 1878, 2634],
}


def test_the_whole_tokenizer_has_50257_ids(gpt2: TextTokenizer) -> None:
    assert gpt2.size == 50257
    assert max(gpt2.encode(" ".join(KNOWN))) < 50257


@pytest.mark.parametrize("text", KNOWN)
def test_known_encodings(gpt2: TextTokenizer, text: str) -> None:
    assert gpt2.encode(text) == KNOWN[text]


@given(text=st.text(max_size=60))
def test_any_text_comes_back(gpt2: TextTokenizer, small_text: TextTokenizer, text: str) -> None:
    for tokenizer in (gpt2, small_text):
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.size for token in ids)
        assert tokenizer.decode(ids) == text


def test_spaces_before_punctuation_survive(gpt2: TextTokenizer) -> None:
    text = "a dog , isn 't it ?  two  spaces \n and a line"
    assert gpt2.decode(gpt2.encode(text)) == text


def test_endoftext_in_a_caption_is_text(gpt2: TextTokenizer) -> None:
    text = "a sign that says <|endoftext|>"
    assert 50256 not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_character(gpt2: TextTokenizer) -> None:
    ids = gpt2.encode("\N{CHECK MARK}")
    assert len(ids) > 1
    assert "\N{REPLACEMENT CHARACTER}" in gpt2.decode(ids[:1])


def test_half_a_character_is_refused(small_text: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"'a dog \\ud83d' contains half of a character"):
        small_text.encode("a dog \ud83d")


def test_fewer_merges_keep_the_ids_of_the_rest(
    gpt2: TextTokenizer, small_text: TextTokenizer
) -> None:
    assert small_text.size == 1256
    # A piece of the smaller vocabulary has the same id as in the full one.
    for piece in (" the", " a", "ing", " on", "q"):
        (token,) = gpt2.encode(piece)
        assert token < small_text.size
        assert small_text.encode(piece) == [token]
    assert TextTokenizer(merges=0).encode("ab") == [64, 65]


@settings(max_examples=20)
@given(st.text(alphabet=st.characters(codec="ascii"), max_size=40))
def test_bytes_alone_encode_every_text(text: str) -> None:
    assert len(TextTokenizer.encode(_BYTES, text)) == len(text.encode())


def test_a_saved_tokenizer_reads_back_as_the_same(
    tmp_path: Path, small_text: TextTokenizer
) -> None:
    small_text.save(tmp_path / "text")
    again = TextTokenizer(merges=1000, source=str(tmp_path / "text"))
    assert again.fingerprint == small_text.fingerprint
    assert again.encode("a red bus on the road") == small_text.encode("a red bus on the road")


def test_the_fingerprint_tells_merges_apart(small_text: TextTokenizer) -> None:
    assert TextTokenizer(merges=1001).fingerprint != small_text.fingerprint


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path))}.*vocab\.json"):
        TextTokenizer(source=str(tmp_path))


def test_files_of_another_tokenizer_are_refused(tmp_path: Path, gpt2: TextTokenizer) -> None:
    gpt2.save(tmp_path)
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:-7]))
    with pytest.raises(InputError, match="50000 merges are expected, but 50257 and 49993"):
        TextTokenizer(source=str(tmp_path))


@pytest.mark.parametrize("content", ["{", json.dumps({"a": 0, "b": 1}), "[]", "3"])
def test_a_vocabulary_file_that_is_none_is_refused(
    tmp_path: Path, gpt2: TextTokenizer, content: str
) -> None:
    gpt2.save(tmp_path)
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(InputError, match=r"vocab\.json"):
        TextTokenizer(source=str(tmp_path))


_BYTES = TextTokenizer(merges=0)
