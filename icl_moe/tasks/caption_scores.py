"""Scores captions against references with the scorers of the COCO caption evaluation."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.bootstrap import Interval, intervals
from icl_moe.tables import percent, percent_range
from icl_moe.tasks.cider import cider_d
from icl_moe.tasks.task import GroupScore

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
    boxes; None if captions lack them. intervals: score -> 95 % interval over queries (see
    bootstrap.py); empty if not requested. BLEU is recomputed from the counts of each draw, and
    CIDEr keeps the document frequencies of the whole set. METEOR has no interval, since a Java
    program computes it.
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

    def cells(self) -> dict[str, str]:
        shown = dict(zip(("B@1", "B@2", "B@3", "B@4"), self.bleu, strict=True)) | {
            "ROUGE-L": self.rouge_l,
            "METEOR": self.meteor,
            "CIDEr": self.cider,
            "category": self.category_accuracy,
            "box IoU": self.box_iou,
        }
        return {heading: percent(value) for heading, value in shown.items()}

    def figures(self) -> dict[str, float]:
        return {"bleu_4": self.bleu[3], "rouge_l": self.rouge_l, "cider": self.cider}

    def ranges(self) -> dict[str, str]:
        headings = {f"bleu_{n}": f"B@{n}" for n in range(1, 5)} | {
            "rouge_l": "ROUGE-L",
            "cider": "CIDEr",
            "category_accuracy": "category",
            "box_iou": "box IoU",
        }
        return {headings[name]: percent_range(found) for name, found in self.intervals.items()}

    def groups(self) -> dict[str, dict[str, GroupScore]]:
        return {}

    def notes(self) -> list[str]:
        notes = [f"Tokenizer of the texts: {self.tokenizer}."]
        if self.meteor is None:
            return [*notes, f"METEOR was {self.meteor_note}."]
        return [*notes, "METEOR has no interval."] if self.intervals else notes


def score_captions(
    predictions: Sequence[Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    java: bool = True,
    with_intervals: bool = False,
) -> list[CaptionScores]:
    """The scores of several sets of plain texts: one prediction per key, against the same
    references, at least one per key.

    java: whether to use Java if it is available. Without it there is no METEOR and the tokenizer is
    approximate, but starts at once. with_intervals: whether to compute 95 % intervals.
    """
    keys = list(references)
    texts = [said[key] for said in predictions for key in keys] + [
        text for key in keys for text in references[key]
    ]
    tokens, tokenizer = tokenise(texts, java)
    rest = iter(tokens)
    candidates = [{key: next(rest) for key in keys} for _ in predictions]
    return score_tokenised(
        candidates,
        {key: [next(rest) for _ in references[key]] for key in keys},
        tokenizer,
        java,
        with_intervals,
    )


def score_tokenised(
    predictions: Sequence[Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    tokenizer: str,
    java: bool = True,
    with_intervals: bool = False,
) -> list[CaptionScores]:
    """The same for texts whose tokens are separated by spaces; `tokenizer` is recorded."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    truths = {key: list(texts) for key, texts in references.items()}
    meteors, note = _meteor(predictions, truths, java)
    scores = []
    for candidates, meteor in zip(predictions, meteors, strict=True):
        answers = {key: [candidates[key]] for key in truths}
        bleus = BleuScorer(n=4)
        for key, texts in truths.items():
            bleus += (candidates[key], texts)
        bleu, _ = bleus.compute_score(option="closest")
        rouge, rouges = Rouge().compute_score(truths, answers)
        ciders = cider_d([candidates[key] for key in truths], list(truths.values()))
        ranges = _intervals(bleus.ctest, rouges, ciders) if with_intervals else {}
        scores.append(
            CaptionScores(
                len(answers),
                tuple(bleu),
                float(rouge),
                float(ciders.mean()),
                meteor,
                note,
                tokenizer,
                intervals=ranges,
            )
        )
    return scores


def rouge_l(said: str, right: Sequence[str]) -> float:
    """ROUGE-L of one text against references, 0..1, with `tokenise_plainly`."""
    from pycocoevalcap.rouge.rouge import Rouge

    texts = [tokenise_plainly(text) for text in right]
    return float(Rouge().calc_score([tokenise_plainly(said)], texts))


def _intervals(
    counts: Sequence[Mapping[str, Any]], rouges: np.ndarray, ciders: np.ndarray
) -> dict[str, Interval]:
    """The intervals of a set. counts: of each text, as pycocoevalcap's BleuScorer stores them."""
    lengths = [
        (text["testlen"], min((abs(n - text["testlen"]), n) for n in text["reflen"])[1])
        for text in counts
    ]
    columns_QS = np.column_stack(
        [
            rouges,
            ciders,
            np.array(lengths),
            np.array([text["correct"] for text in counts]),
            np.array([text["guess"] for text in counts]),
        ]
    ).astype(np.float64)

    def scores(weights_BQ: np.ndarray) -> np.ndarray:
        """ROUGE-L, CIDEr and BLEU-1 to 4, (B, 6)."""
        sums_BS = weights_BQ @ columns_QS
        written_B, wanted_B = sums_BS[:, 2], sums_BS[:, 3]
        # With the small numbers that BleuScorer adds to avoid 0 / 0.
        precisions_B4 = (sums_BS[:, 4:8] + 1e-15) / (sums_BS[:, 8:] + 1e-9)
        bleu_B4 = np.cumprod(precisions_B4, axis=1) ** (1 / np.arange(1, 5))
        brevity_B = (written_B + 1e-15) / (wanted_B + 1e-9)
        penalty_B = np.exp(np.minimum(0.0, 1 - 1 / brevity_B))
        return np.column_stack([sums_BS[:, :2] / len(counts), bleu_B4 * penalty_B[:, None]])

    names = ("rouge_l", "cider", *(f"bleu_{n}" for n in range(1, 5)))
    return dict(zip(names, intervals(scores, len(counts)), strict=True))


def java_problem(wanted: bool = True) -> str | None:
    """Why Java cannot be used, or None if it can."""
    if not wanted:
        return "Java was not asked for"
    if shutil.which("java") is None:
        return "no `java` is on the PATH"
    if subprocess.run(["java", "-version"], capture_output=True, check=False).returncode:
        return "`java -version` fails"
    return None


def tokenise(texts: Sequence[str], java: bool = True) -> tuple[list[str], str]:
    """The texts in lower case, with tokens separated by spaces and without punctuation; and the
    name of the tokenizer.

    This is the Stanford PTB tokenizer, as in the COCO caption evaluation, if Java is available;
    otherwise `tokenise_plainly`.
    """
    problem = java_problem(java)
    if problem is None:
        lines = _ptb_lines([" ".join(text.split()) for text in texts])
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


def _ptb_lines(texts: Sequence[str]) -> list[str]:
    """Each text (without line breaks) as tokenized by the Stanford tokenizer; a different number of
    lines if it fails.

    pycocoevalcap's own wrapper is not used because it writes into its installation and depends on
    the locale.
    """
    command = [
        *_JAVA,
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    lines = "".join(text + "\n" for text in texts)
    result = subprocess.run(
        command,
        cwd=_folder("tokenizer"),
        input=lines,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return result.stdout.split("\n")[:-1]


def _meteor(
    predictions: Sequence[Mapping[str, str]], references: Mapping[str, Sequence[str]], java: bool
) -> tuple[Sequence[float | None], str]:
    """The corpus score of each set and "", or None for each set and the reason.

    pycocoevalcap's own wrapper is not used because it waits forever if its Java process dies.
    """
    problem = java_problem(java)
    if problem is not None:
        return [None] * len(predictions), f"not computed: {problem}"
    command = [*_JAVA, "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(
            command,
            cwd=_folder("meteor"),
            stdin=pipe,
            stdout=pipe,
            stderr=nowhere,
            encoding="utf-8",
        ) as process:
            try:
                sets = tqdm(predictions, desc="METEOR", unit="set", leave=False)
                return [_corpus_meteor(process, candidates, references) for candidates in sets], ""
            finally:
                process.kill()
    except (OSError, ValueError) as error:
        return [None] * len(predictions), f"not computed: METEOR's Java program failed ({error})"


def _corpus_meteor(
    java: subprocess.Popen[str],
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
) -> float:
    statistics = [_ask(java, "SCORE", *texts, candidates[key]) for key, texts in references.items()]
    score = float(
        _ask(java, "EVAL", *statistics)
    )  # The scores of the texts come first, and that of the corpus last.
    for _ in statistics:
        score = float(_read(java))
    return score


_JAVA = ("java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def _folder(name: str) -> Path:
    spec = find_spec(f"pycocoevalcap.{name}")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _ask(java: subprocess.Popen[str], *fields: str) -> str:
    assert java.stdin is not None
    java.stdin.write(" ||| ".join(field.replace("|||", "") for field in fields) + "\n")
    java.stdin.flush()
    return _read(java)


def _read(java: subprocess.Popen[str]) -> str:
    assert java.stdout is not None
    line = java.stdout.readline()
    if not line:
        raise ValueError("it ended early")
    return line.strip()
