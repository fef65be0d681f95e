"""The caption scores of 126 real images with published captions equal the reference scores to the
last digits.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from icl_moe.tasks.caption_scores import CaptionScores, score_captions, score_tokenised
from icl_moe.tasks.dense_captions import Detection, Region, match
from icl_moe.tasks.java import find_java


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


def as_row(scores: CaptionScores) -> dict[str, float]:
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
        java=False,
    )
    assert scores.episodes == corpus["n_images"] == 126
    for name, value in as_row(scores).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name


def test_scores_of_plain_texts_with_java_are_the_golden_ones_meteor_and_map_too(golden, corpus):
    """mAP where every box is right, and all captions are equally sure: METEOR decides alone."""
    if problem := find_java()[1]:
        pytest.skip(f"{problem}: the PTB tokenizer and METEOR need Java")
    predictions, references = plain_texts(golden)
    box = (0.25, 0.25, 0.5, 0.75)
    detections = [Detection(key, box, text) for key, text in predictions.items()]
    regions = [Region(key, box, tuple(texts)) for key, texts in references.items()]
    (scores,) = score_captions([predictions], references, matched=[match(detections, regions)])
    assert scores.tokenizer.startswith("Stanford")
    for name, value in (as_row(scores) | {"METEOR": scores.meteor}).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name
    of_images = json.loads((golden / "golden_scores.json").read_text())["per_image"].values()
    shares = [
        np.mean([each["METEOR"] > least for each in of_images])
        for least in (0, 0.05, 0.1, 0.15, 0.2, 0.25)
    ]
    expected = [share * (math.floor(100 * share + 1e-9) + 1) / 101 for share in shares]
    assert scores.mean_ap == pytest.approx(np.mean(expected), abs=1e-12)


def test_without_java_the_plain_tokeniser_gives_the_golden_scores_too(golden, corpus, no_java):
    predictions, references = plain_texts(golden)
    (scores,) = score_captions([predictions], references)
    assert scores.tokenizer.startswith("plain Python")
    assert scores.meteor is None
    assert scores.meteor_note == no_java
    for name, value in as_row(scores).items():
        assert value == pytest.approx(corpus[name], abs=1e-12), name
