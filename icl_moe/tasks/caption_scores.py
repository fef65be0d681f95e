"""Scores captions against references with the scorers of the COCO caption evaluation."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from icl_moe.bootstrap import Interval, intervals
from icl_moe.tasks.cider import cider_d
from icl_moe.tasks.dense_captions import Matched, mean_average_precision
from icl_moe.tasks.java import Meteor, find_java, ptb_lines, start_meteor
from icl_moe.tasks.task import GroupScore, Measure

_MARKS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_MARKS |= {"-LRB-", "-RRB-", "-LCB-", "-RCB-"}
"""The tokens that the COCO evaluation drops. It lists brackets in capital letters but lower-cases
the text first, so it keeps brackets; so does this code.
"""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a whole set of captions, as pycocoevalcap computes them: in 0..1, CIDEr in 0..10
    (papers report 100 times these values).

    bleu: BLEU-1 to BLEU-4 (Papineni et al. 2002), with the closest reference length. rouge_l:
    ROUGE-L (Lin 2004), beta 1.2. cider: CIDEr-D (Vedantam et al. 2015), sigma 6, with document
    frequencies from the same references. meteor: METEOR 1.5 (Denkowski and Lavie 2014), or None;
    `meteor_note` then says why. `tokenizer` names the tokenizer of the texts. category_accuracy:
    how often the category is right, ignoring case; box_iou: the mean intersection over union of the
    boxes; None if captions lack them. mean_ap: the mean average precision of dense captioning (see
    dense_captions.py), or None; `mean_ap_note` then says why. intervals: score -> 95 % interval
    over queries (see bootstrap.py); empty if not requested. BLEU is recomputed from the counts of
    each draw, and CIDEr keeps the document frequencies of the whole set. METEOR, which a Java
    program computes, and mAP, which depends on it, have no interval.
    """

    episodes: int
    bleu: tuple[float, ...]
    rouge_l: float
    cider: float
    meteor: float | None
    meteor_note: str
    tokenizer: str
    category_accuracy: float | None = None
    box_iou: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)
    mean_ap: float | None = None
    mean_ap_note: str = ""

    def measures(self) -> dict[str, Measure]:
        bleus = {f"bleu_{n}": value for n, value in enumerate(self.bleu, 1)}
        return {
            heading: Measure(
                bleus[name] if name in bleus else getattr(self, name),
                self.intervals.get(name),
                definition,
            )
            for heading, (name, definition) in _MEASURES.items()
        }

    def figures(self) -> dict[str, float]:
        return {"bleu_4": self.bleu[3], "rouge_l": self.rouge_l, "cider": self.cider}

    def groups(self) -> dict[str, dict[str, GroupScore]]:
        return {}

    def notes(self) -> list[str]:
        notes = [f"Tokenizer of the texts: {self.tokenizer}."]
        if self.meteor is None:
            notes.append(f"METEOR was {self.meteor_note}.")
        if self.mean_ap is None and self.mean_ap_note:
            notes.append(f"mAP was {self.mean_ap_note}.")
        if self.intervals and self.meteor is not None:
            notes.append("METEOR and mAP have no interval.")
        return notes


_BLEU = "BLEU of n-grams of up to {} words, against the closest reference length"
_MEASURES = {
    **{f"B@{n}": (f"bleu_{n}", _BLEU.format(n)) for n in range(1, 5)},
    "ROUGE-L": ("rouge_l", "the F-measure of the longest common subsequence of words"),
    "METEOR": ("meteor", "METEOR 1.5, which also matches stems, synonyms and paraphrases"),
    "CIDEr": ("cider", "CIDEr-D, with document frequencies of the references of these queries"),
    "mAP": (
        "mean_ap",
        "the mean average precision of dense captioning, over the IoU thresholds 0.3 to 0.7 and "
        "the METEOR thresholds 0 to 0.25, as in DenseCap; the regions to find are the queries of "
        "each image, and outputs are ranked by their confidence, those without one last, as equals",
    ),
    "category": ("category_accuracy", "the share of queries whose class is named rightly"),
    "box IoU": ("box_iou", "the mean over queries of the intersection over union of the boxes"),
}
"""Heading -> the name in `CaptionScores` and its intervals, and what it is."""


def score_captions(
    predictions: Sequence[Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    java: bool = True,
    with_intervals: bool = False,
    matched: Sequence[Matched] | None = None,
) -> list[CaptionScores]:
    """The scores of several sets of plain texts: one prediction per key, against the same
    references, at least one per key.

    java: whether to use Java if it is available. Without it there is no METEOR and the tokenizer is
    approximate, but starts at once. with_intervals: whether to compute 95 % intervals. matched: of
    each set, what `match` found, for the mean average precision.
    """
    keys = list(references)
    texts = [captions[key] for captions in predictions for key in keys]
    texts += [text for key in keys for text in references[key]]
    texts += [
        text
        for matched_set in matched or ()
        for found in matched_set.matches
        for text in found.all_texts
    ]
    tokens, tokenizer = tokenise(texts, java)
    of_text = dict(zip(texts, tokens, strict=True))
    return score_tokenised(
        [{key: of_text[captions[key]] for key in keys} for captions in predictions],
        {key: [of_text[text] for text in references[key]] for key in keys},
        tokenizer,
        java,
        with_intervals,
        None if matched is None else [matched_set.with_texts(of_text) for matched_set in matched],
    )


def score_tokenised(
    predictions: Sequence[Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    tokenizer: str,
    java: bool = True,
    with_intervals: bool = False,
    matched: Sequence[Matched] | None = None,
) -> list[CaptionScores]:
    """The same as `score_captions`, for texts whose tokens are separated by spaces. tokenizer: the
    name of the tokenizer that separated them; it is recorded.
    """
    truths = {key: list(texts) for key, texts in references.items()}
    meteors, note = _meteor(predictions, truths, java, matched)
    scores = []
    for candidates, (meteor, mean_ap) in zip(predictions, meteors, strict=True):
        texts = [candidates[key] for key in truths]
        counts = count_captions(texts, list(truths.values()))
        ranges: dict[str, Interval] = {}
        if with_intervals:
            names = [_MEASURES[heading][0] for heading in COUNTED]
            found = intervals(counted_scores(counts.columns_QS), len(texts))
            ranges = dict(zip(names, found, strict=True))
        scores.append(
            CaptionScores(
                len(texts),
                counts.bleu,
                counts.rouge_l,
                counts.cider,
                meteor,
                note,
                tokenizer,
                intervals=ranges,
                mean_ap=mean_ap,
                mean_ap_note=note if matched is not None else "",
            )
        )
    return scores


class CaptionCounts(NamedTuple):
    """The scores of a set of Q texts that do not need Java, and the counts that they are computed
    from.

    columns_QS: for each text, in 12 columns, its ROUGE-L and its CIDEr, its length and that of the
    closest reference, the numbers of its n-grams of 1 to 4 words that are correct, and the numbers
    of all of them.
    """

    bleu: tuple[float, ...]
    rouge_l: float
    cider: float
    columns_QS: np.ndarray


def count_captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionCounts:
    """The counts of tokenised texts against the references of each."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    numbers = range(len(texts))
    bleus = BleuScorer(n=4)
    for text, right in zip(texts, references, strict=True):
        bleus += (text, list(right))
    bleu, _ = bleus.compute_score(option="closest")
    truths = {number: list(references[number]) for number in numbers}
    rouge, rouges = Rouge().compute_score(truths, {number: [texts[number]] for number in numbers})
    ciders = cider_d(texts, references)
    lengths = [
        (counts["testlen"], min((abs(n - counts["testlen"]), n) for n in counts["reflen"])[1])
        for counts in bleus.ctest
    ]
    grams = [np.array([counts[name] for counts in bleus.ctest]) for name in ("correct", "guess")]
    columns_QS = np.column_stack([rouges, ciders, np.array(lengths), *grams]).astype(np.float64)
    return CaptionCounts(tuple(bleu), float(rouge), float(ciders.mean()), columns_QS)


COUNTED = ("ROUGE-L", "CIDEr", "B@1", "B@2", "B@3", "B@4")
"""The headings of the scores that `counted_scores` computes, in its order."""


def counted_scores(columns_QS: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The scores of weighted texts, weights (B, Q) -> (B, 6), from `CaptionCounts.columns_QS`."""

    def scores(weights_BQ: np.ndarray) -> np.ndarray:
        sums_BS = weights_BQ @ columns_QS
        written_B, wanted_B = sums_BS[:, 2], sums_BS[:, 3]
        # With the small numbers that BleuScorer adds to avoid 0 / 0.
        precisions_B4 = (sums_BS[:, 4:8] + 1e-15) / (sums_BS[:, 8:] + 1e-9)
        bleu_B4 = np.cumprod(precisions_B4, axis=1) ** (1 / np.arange(1, 5))
        brevity_B = (written_B + 1e-15) / (wanted_B + 1e-9)
        penalty_B = np.exp(np.minimum(0.0, 1 - 1 / brevity_B))
        means_B2 = sums_BS[:, :2] / weights_BQ.sum(axis=1, keepdims=True)
        return np.column_stack([means_B2, bleu_B4 * penalty_B[:, None]])

    return scores


def rouge_l(caption: str, right: Sequence[str]) -> float:
    """ROUGE-L of one text against references, 0..1, with `tokenise_plainly`."""
    from pycocoevalcap.rouge.rouge import Rouge

    texts = [tokenise_plainly(text) for text in right]
    return float(Rouge().calc_score([tokenise_plainly(caption)], texts))


def tokenise(texts: Sequence[str], java: bool = True) -> tuple[list[str], str]:
    """The texts in lower case, with tokens separated by spaces and without punctuation; and the
    name of the tokenizer.

    This is the Stanford PTB tokenizer, as in the COCO caption evaluation, if Java is available;
    otherwise `tokenise_plainly`.
    """
    program, problem = find_java() if java else ("", _NOT_ASKED)
    if program:
        lines = ptb_lines(program, [" ".join(text.split()) for text in texts])
        if len(lines) == len(texts):
            return [
                _without_marks(line.split(" ")) for line in lines
            ], "Stanford PTB tokenizer 3.4.1"
        problem = "the Stanford tokenizer failed"
    return [
        tokenise_plainly(text) for text in texts
    ], f"plain Python, close to the PTB tokenizer but not equal ({problem})"


_CONTRACTION = re.compile(r"(?<=\w)(n['’]t|['’](?:s|re|ve|ll|d|m))\b")
_FUSED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_TOKEN = re.compile(
    r"n't|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:/]\d+)+|(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|ft|vs)\."
    r"|\w+(?:['/&.-]\w+)*|\.{3}|--+|[^\w\s]"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenise_plainly(text: str) -> str:
    """Approximates the PTB tokenizer on ordinary captions without Java: lower case, split
    contractions, no punctuation.
    """
    text = _CONTRACTION.sub(lambda match: " " + match[1].replace("’", "'"), text.lower())
    text = _FUSED.sub(lambda match: " ".join(part for part in match.groups() if part), text)
    return _without_marks(
        _BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in '"“”‘’'
    )


def _without_marks(tokens: Iterable[str]) -> str:
    return " ".join(token for token in tokens if token and token not in _MARKS)


_NOT_ASKED = "Java was not asked for"


_Meteors = tuple[float | None, float | None]
"""The scores of one set that need METEOR: METEOR of the corpus, and the mean average precision."""


def _meteor(
    predictions: Sequence[Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    java: bool,
    matched: Sequence[Matched] | None,
) -> tuple[list[_Meteors], str]:
    """The scores of each set that need METEOR, and an empty text. If METEOR is not available: None
    for each score, and the reason.
    """
    nothing: list[_Meteors] = [(None, None)] * len(predictions)
    program, problem = find_java() if java else ("", _NOT_ASKED)
    if problem:
        return nothing, f"not computed: {problem}"
    scores: list[_Meteors] = []
    try:
        with start_meteor(program) as meteor:
            for place, captions in enumerate(tqdm(predictions, "METEOR", unit="set", leave=False)):
                judged = [(captions[key], texts) for key, texts in references.items()]
                _, corpus = meteor.scores(judged)
                mean_ap = None if matched is None else _mean_ap(meteor, matched[place])
                scores.append((corpus, mean_ap))
    except (OSError, ValueError) as error:
        return nothing, f"not computed: METEOR's Java program failed ({error})"
    return scores, ""


def _mean_ap(meteor: Meteor, matched: Matched) -> float:
    judged = [(m.text, m.references) for m in matched.matches if m.needs_meteor]
    found = iter(meteor.scores(judged)[0] if judged else ())
    return mean_average_precision(
        matched, [next(found) if match.needs_meteor else 0.0 for match in matched.matches]
    )
