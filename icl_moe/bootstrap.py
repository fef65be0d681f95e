"""Bootstrap percentile intervals: the sampling error of a score that comes from a limited number of
queries.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. All n queries are
resampled 1,000 times (n draws with replacement), and the score of each resample is computed; the
interval contains the middle 95 % of these scores. The resamples depend only on the number of
queries, so all scores of the same queries share them and can be compared sample by sample.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
SEED = 0
_TOGETHER = 50

Interval = tuple[float, float]
"""The lower and the upper end."""


def draw_weights(queries: int) -> Iterator[np.ndarray]:
    """How often each query is drawn, as blocks of rows, float64 (B, queries); `DRAWS` rows in
    all.
    """
    rng = np.random.default_rng(SEED)
    for _ in range(DRAWS // _TOGETHER):
        drawn = rng.integers(queries, size=(_TOGETHER, queries))
        yield np.stack([np.bincount(row, minlength=queries) for row in drawn]).astype(np.float64)


def intervals(statistic: Callable[[np.ndarray], np.ndarray], queries: int) -> list[Interval]:
    """The interval of each of S scores. statistic: weights (B, queries) -> scores (B, S); draws
    with the score NaN are left out.
    """
    scores_DS = np.concatenate([statistic(weights_BQ) for weights_BQ in draw_weights(queries)])
    low_S, high_S = np.nanpercentile(scores_DS, [2.5, 97.5], axis=0)
    return [(float(low), float(high)) for low, high in zip(low_S, high_S, strict=True)]


def mean_intervals(*values: Sequence[float] | np.ndarray) -> list[Interval]:
    """The interval of the mean of each of several lists with one value per query."""
    values_QS = np.stack([np.asarray(each, dtype=np.float64) for each in values], axis=1)
    return intervals(lambda weights_BQ: weights_BQ @ values_QS / len(values_QS), len(values_QS))


class Difference(NamedTuple):
    """Of two systems on the same queries: the difference, its interval, and the two-sided p of the
    hypothesis that there is none.
    """

    value: float
    interval: Interval
    p: float


def differences(statistic: Callable[[np.ndarray], np.ndarray], queries: int) -> list[Difference]:
    """Paired differences of S scores. statistic: weights (B, queries) -> differences (B, S).

    p is twice the share of the draws in which the difference is 0 or on the other side of it
    (Koehn 2004), where the systems as they are count as one draw, so that p is never 0.
    """
    values_S = statistic(np.ones((1, queries)))[0]
    drawn_DS = np.concatenate([statistic(weights_BQ) for weights_BQ in draw_weights(queries)])
    low_S, high_S = np.percentile(drawn_DS, [2.5, 97.5], axis=0)
    sides_2S = np.stack([np.sum(drawn_DS <= 0, axis=0), np.sum(drawn_DS >= 0, axis=0)])
    p_S = np.minimum(1.0, 2 * (sides_2S.min(axis=0) + 1) / (DRAWS + 1))
    return [
        Difference(float(value), (float(low), float(high)), float(p))
        for value, low, high, p in zip(values_S, low_S, high_S, p_S, strict=True)
    ]
