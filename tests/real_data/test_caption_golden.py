"""The caption scores of 126 real images with published captions equal the reference scores to the
last digits.
"""

import json
from pathlib import Path

import pytest

from icl_moe.tasks import caption_scores
from icl_moe.tasks.caption_scores import score_captions, score_tokenised


@pytest.fixture(scope="module")
def golden(real_data: Path) -> Path:
    return real_data / "caption_golden"


@pytest.fixture(scope="module")
def corpus(golden: Path) -> dict[str, float]:
    return json.loads((golden / "golden_scores.json").read_text())["corpus"]


def plain_texts(golden: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    predictions = {
        str(entry["image_id"]): entry["caption"]
        for entry in json.loads((golden / "candidates.json").read_text())
    }
    references: dict[str, list[str]] = {}
    for annotation in json.loads((golden / "references.json").read_text())["annotations"]:
        references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return predictions, references


def as_row(scores: caption_scores.CaptionScores) -> dict[str, float]:
    return {
        **{f"Bleu_{n}": value for n, value in enumerate(scores.bleu, start=1)},
        "ROUGE_L": scores.rouge_l,
        "CIDEr": scores.cider,
    }


def test_scores_of_tokenised_texts_are_the_golden_ones(golden, corpus):
    texts = json.loads((golden / "golden_tokenized.json").read_text())
    (scores,) = score_tokenised(
        [{key: value[0] for key, value in texts["candidates"].items()}],
        texts["references"],
        "golden",
    )
    assert scores.episodes == corpus["n_images"] == 126
    for name, value in as_row(scores).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name


def test_scores_of_plain_texts_with_java_are_the_golden_ones_meteor_too(golden, corpus):
    if caption_scores.java_problem():
        pytest.skip(f"{caption_scores.java_problem()}: the PTB tokenizer and METEOR need Java")
    predictions, references = plain_texts(golden)
    (scores,) = score_captions([predictions], references)
    assert scores.tokenizer.startswith("Stanford")
    for name, value in (as_row(scores) | {"METEOR": scores.meteor}).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name


def test_without_java_the_plain_tokeniser_gives_the_golden_scores_too(golden, corpus, monkeypatch):
    monkeypatch.setenv("PATH", "")
    predictions, references = plain_texts(golden)
    (scores,) = score_captions([predictions], references)
    assert scores.tokenizer.startswith("plain Python")
    assert scores.meteor is None
    assert scores.meteor_note == "not computed: no `java` is on the PATH"
    for name, value in as_row(scores).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name
