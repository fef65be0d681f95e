"""In which of a data set's styles a text is written, by its words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from icl_moe.tasks.caption_scores import tokenise_plainly

_Terms = Counter[str]


class StyleJudge:
    """Naive Bayes (multinomial, add-one, all styles equally probable) over words and pairs of
    neighbouring words; McCallum and Nigam 1998. texts: the known texts of each style.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        self._texts = {style: list(dict.fromkeys(of_style)) for style, of_style in texts.items()}
        self._counts: dict[str, _Terms] = {style: Counter() for style in self._texts}
        for style, of_style in self._texts.items():
            for text in of_style:
                self._counts[style].update(_terms(text))
        self._known = len(set().union(*self._counts.values())) if self._counts else 0
        self._sizes = {style: counts.total() for style, counts in self._counts.items()}

    def style(self, text: str) -> str | None:
        """The style in which a text is the most probable; None where several are equally so, as
        for a text without a known word.
        """
        return self._best(_terms(text))

    def accuracy(self) -> float:
        """The share of the known texts that are judged to be of their own style, each of them left
        out of the counts for itself; 0 where there are no texts.
        """
        right = [
            self._best(_terms(text), left_out=style) == style
            for style, of_style in self._texts.items()
            for text in of_style
        ]
        return sum(right) / max(len(right), 1)

    def _best(self, terms: _Terms, left_out: str | None = None) -> str | None:
        """The style in which these terms are the most probable; None if several are. left_out: the
        style whose counts contain these terms, which are then subtracted.
        """
        scores: dict[str, float] = {}
        for style, counts in self._counts.items():
            own = terms if style == left_out else _Terms()
            size = self._sizes[style] - own.total() + self._known
            scores[style] = sum(
                number * math.log((counts[term] - own[term] + 1) / size)
                for term, number in terms.items()
                if any(of_style[term] for of_style in self._counts.values())
            )
        best = max(scores.values(), default=0.0)
        found = [style for style, score in scores.items() if score == best]
        return found[0] if len(found) == 1 else None


def _terms(text: str) -> _Terms:
    words = tokenise_plainly(text).split()
    return Counter([*words, *map(" ".join, pairwise(words))])
