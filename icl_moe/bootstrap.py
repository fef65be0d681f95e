"""Percentile intervals of the bootstrap: how far a score may lie from what more queries would show.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. As many queries as there
are, are drawn with replacement, 1,000 times, and the score of each draw is computed; 95 of 100 of
these scores lie in the interval. The draws depend on the number of queries alone, so all scores of
the same queries are computed from the same draws, and may be compared draw by draw.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

DRAWS = 1000
SEED = 0
_TOGETHER = 50

Interval = tuple[float, float]
"""The least and the largest value of the middle 95 %."""


def draw_weights(queries: int) -> Iterator[np.ndarray]:
    """How often each query is drawn, float64 (B, queries), until `DRAWS` rows were given."""
    rng = np.random.default_rng(SEED)
    for _ in range(DRAWS // _TOGETHER):
        drawn = rng.integers(queries, size=(_TOGETHER, queries))
        yield np.stack([np.bincount(row, minlength=queries) for row in drawn]).astype(np.float64)


def intervals(statistic: Callable[[np.ndarray], np.ndarray], queries: int) -> list[Interval]:
    """The interval of each of S scores. statistic: weights (B, queries) -> scores (B, S), NaN where
    a draw has no score, which then is left out.
    """
    scores_DS = np.concatenate([statistic(weights_BQ) for weights_BQ in draw_weights(queries)])
    low_S, high_S = np.nanpercentile(scores_DS, [2.5, 97.5], axis=0)
    return [(float(low), float(high)) for low, high in zip(low_S, high_S, strict=True)]


def mean_intervals(*values: Sequence[float] | np.ndarray) -> list[Interval]:
    """The interval of the mean of each of several lists, each with a value a query."""
    values_QS = np.stack([np.asarray(each, dtype=np.float64) for each in values], axis=1)
    return intervals(lambda weights_BQ: weights_BQ @ values_QS / len(values_QS), len(values_QS))
