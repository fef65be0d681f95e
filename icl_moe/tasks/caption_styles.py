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
        self._counts: dict[str, _Terms] = {style: Counter() for style in texts}
        for style, of_style in texts.items():
            for text in dict.fromkeys(of_style):
                self._counts[style].update(_terms(text))
        self._known = len(set().union(*self._counts.values())) if self._counts else 0
        self._sizes = {style: counts.total() for style, counts in self._counts.items()}

    def style(self, text: str) -> str | None:
        """The style in which a text is the most probable; None where several are equally so, as
        for a text without a known word.
        """
        terms = _terms(text)
        scores: dict[str, float] = {}
        for style, counts in self._counts.items():
            size = self._sizes[style] + self._known
            scores[style] = sum(
                number * math.log((counts[term] + 1) / size)
                for term, number in terms.items()
                if any(of_style[term] for of_style in self._counts.values())
            )
        best = max(scores.values(), default=0.0)
        found = [style for style, score in scores.items() if score == best]
        return found[0] if len(found) == 1 else None


def _terms(text: str) -> _Terms:
    words = tokenise_plainly(text).split()
    return Counter([*words, *map(" ".join, pairwise(words))])
