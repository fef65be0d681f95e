"""Caption scores on cases small enough to compute by hand; tests/real_data has real ones."""

import math

import numpy as np
import pytest

from icl_moe.bootstrap import DRAWS, SEED
from icl_moe.tasks import java
from icl_moe.tasks.caption_scores import (
    rouge_l,
    score_captions,
    score_tokenised,
    tokenise,
    tokenise_plainly,
)

REFERENCES = {
    "1": ["a dog runs on grass"],
    "2": ["two cats sleep", "cats asleep on a bed"],
    "3": ["a red bus"],
}


def test_bleu_is_clipped_precision_with_brevity_penalty(no_java):
    """Two of three words of "a a dog" are in the reference after clipping; three words against five
    give exp(1 - 5/3).
    """
    (scores,) = score_tokenised([{"1": "a a dog"}], {"1": REFERENCES["1"]}, "")
    assert scores.bleu[0] == pytest.approx(2 / 3 * math.exp(1 - 5 / 3), rel=1e-6)
    assert scores.bleu[1] == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * math.exp(1 - 5 / 3), rel=1e-6)


def test_the_reference_itself_has_the_best_score_and_nothing_the_worst(no_java):
    right = {key: texts[0] for key, texts in REFERENCES.items()}
    best, worst = score_captions([right, dict.fromkeys(REFERENCES, "")], REFERENCES)
    assert best.bleu[0] == pytest.approx(1.0)
    assert best.rouge_l == pytest.approx(1.0)
    assert best.cider > 5
    assert (worst.cider, worst.rouge_l) == (0.0, 0.0)
    assert worst.bleu[0] == pytest.approx(0.0, abs=1e-6)


def test_sets_scored_together_have_the_scores_they_have_alone(no_java):
    sets = [
        {key: texts[-1] for key, texts in REFERENCES.items()},
        {"1": "a dog", "2": "cats, on a bed!", "3": "bus"},
    ]
    assert score_captions(sets, REFERENCES) == [
        score_captions([one], REFERENCES)[0] for one in sets
    ]


def test_without_java_meteor_is_left_out_and_says_why(no_java):
    (scores,) = score_captions([{"3": "a red bus"}], {"3": REFERENCES["3"]})
    assert scores.meteor is None
    assert scores.meteor_note == no_java
    assert "no `java` is on the PATH" in scores.tokenizer


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "`java -version` fails"),
        ('case "$*" in *version*) exit 0;; esac; exit 1', "METEOR's Java program failed"),
        (
            'case "$*" in *version*) exit 0;; esac; while read line; do echo nonsense; done',
            "METEOR's Java program failed",
        ),
        (
            'case "$*" in *version*) exit 0;; esac; while read line; do sleep 600; done',
            "METEOR's Java program failed (it gave no answer for 1 seconds)",
        ),
        (
            'case "$*" in *version*) exit 0;; esac; sleep 600',
            "METEOR's Java program failed (it gave no answer for 1 seconds)",
        ),
    ],
    ids=["no version", "dies at once", "answers nonsense", "stops answering", "never reads"],
)
def test_a_broken_java_is_noted_and_never_waited_for(script, reason, tmp_path, monkeypatch):
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(java, "PATIENCE", 1.0)
    (scores,) = score_captions([{"3": "a red bus"}], {"3": REFERENCES["3"]})
    assert scores.meteor is None
    assert reason in scores.meteor_note
    assert scores.bleu[0] == pytest.approx(1.0)


CASES = [
    ("A dog's ball (red), can't roll.", "a dog 's ball -lrb- red -rrb- ca n't roll"),
    ('He said: "hi" -- well...', "he said hi well"),
    ("I cannot; they're gonna", "i can not they 're gon na"),
    (
        "Mr. Bean's 1/2 x-ray at 10:30 cost $3.50 & more!",
        "mr. bean 's 1/2 x-ray at 10:30 cost $ 3.50 & more",
    ),
    ("brown/orange café", "brown/orange café"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_the_plain_tokeniser_splits_as_the_ptb_tokenizer_does(text, expected):
    assert tokenise_plainly(text) == expected


def test_the_ptb_tokenizer_splits_so_too_whatever_the_locale(monkeypatch):
    if problem := java.find_java()[1]:
        pytest.skip(f"{problem}: the PTB tokenizer needs Java")
    monkeypatch.setenv("LC_ALL", "C")
    texts, tokenizer = tokenise([text.replace(" ", "\n", 1) for text, _ in CASES])
    assert tokenizer.startswith("Stanford")
    assert texts == [expected for _, expected in CASES]


def test_the_scorers_files_are_found():
    assert (java.scorer_folder("meteor") / "meteor-1.5.jar").is_file()


def test_intervals_are_those_of_scores_of_plain_draws(no_java):
    """BLEU from the counts of each draw; ROUGE-L and CIDEr as means, the latter with the document
    frequencies of the whole set.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = {"1": "a dog on grass", "2": "two cats asleep on a bed", "3": "a bus"}
    (scores,) = score_tokenised([captions], REFERENCES, "", with_intervals=True)
    answers = {key: [text] for key, text in captions.items()}
    _, rouges = Rouge().compute_score(REFERENCES, answers)
    _, ciders = Cider().compute_score(REFERENCES, answers)
    rng, draws = np.random.default_rng(SEED), []
    for _ in range(DRAWS):
        drawn = [str(n + 1) for n in rng.integers(3, size=3)]
        bleu, _ = Bleu(4).compute_score(
            {n: REFERENCES[key] for n, key in enumerate(drawn)},
            {n: answers[key] for n, key in enumerate(drawn)},
            verbose=0,
        )
        places = [int(key) - 1 for key in drawn]
        draws.append([*bleu, rouges[places].mean(), ciders[places].mean()])
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
    for name, *expected in zip(names, low, high, strict=True):
        assert scores.intervals[name] == pytest.approx(tuple(expected), abs=1e-9)


def test_one_text_has_the_rouge_l_that_its_set_has():
    for caption in ("two cats sleep", "a bed", ""):
        (scores,) = score_captions([{"2": caption}], {"2": REFERENCES["2"]}, java=False)
        assert rouge_l(caption, REFERENCES["2"]) == pytest.approx(scores.rouge_l)
