"""Bootstrap percentile intervals: the sampling error of a score that comes from a limited number of
queries.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. All n queries are
resampled 1,000 times (n draws with replacement), and the score of each resample is computed; the
interval contains the middle 95 % of these scores. The resamples depend only on the number of
queries, so all scores of the same queries share them and can be compared sample by sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    values_QS = np.stack([np.asarray(column, dtype=np.float64) for column in values], axis=1)
    return intervals(lambda weights_BQ: weights_BQ @ values_QS / len(values_QS), len(values_QS))


class Statistic(NamedTuple):
    """Scores of a list of outputs as a function of how often each of them counts. names: the names
    of the S scores. of: the function, from weights (B, outputs) to scores (B, S). plain: the names
    of those that are printed as they are; the others are shares, which are printed times 100.
    """

    names: tuple[str, ...]
    of: Callable[[np.ndarray], np.ndarray]
    plain: tuple[str, ...] = ()


def mean_statistic(values: Mapping[str, Sequence[float] | np.ndarray]) -> Statistic:
    """The means of lists with one value for each output, by their names."""
    values_QS = np.stack(
        [np.asarray(column, dtype=np.float64) for column in values.values()], axis=1
    )
    return Statistic(
        tuple(values),
        lambda weights_BQ: weights_BQ @ values_QS / weights_BQ.sum(axis=1, keepdims=True),
    )


class Difference(NamedTuple):
    """The difference of two systems A and B on the same queries: the score of each, the difference
    B - A, its interval, and the two-sided p of the hypothesis that there is no difference.
    """

    a: float
    b: float
    value: float
    interval: Interval
    p: float


SWAPS = 4096


def differences(pooled: Statistic, queries: int) -> list[Difference]:
    """Paired differences of the S scores of two systems A and B. pooled: the statistic of the
    outputs of A for all queries and then those of B, 2 x queries in all.

    The interval is that of the differences of bootstrap draws. p is that of the permutation test
    ("approximate randomization": Noreen 1989; Riezler and Maxwell 2005): if there were no
    difference, the two outputs for a query could as well have been exchanged, so p is the share
    of exchanges that give a difference as large, of all 2^queries if these are at most `SWAPS`, and
    else of `SWAPS` - 1 random ones and the systems as they are.
    """

    def scores(weights_BQ: np.ndarray, exchanged_BQ: np.ndarray) -> np.ndarray:
        first_BP = np.hstack([weights_BQ * (1 - exchanged_BQ), weights_BQ * exchanged_BQ])
        second_BP = np.hstack([weights_BQ * exchanged_BQ, weights_BQ * (1 - exchanged_BQ)])
        return np.stack([pooled.of(first_BP), pooled.of(second_BP)])

    once, kept = np.ones((1, queries)), np.zeros((1, queries))
    a_S, b_S = scores(once, kept)[:, 0]
    found_S = b_S - a_S
    drawn_DS = np.concatenate(
        [
            np.subtract(*scores(weights_BQ, 0 * weights_BQ)[::-1])
            for weights_BQ in draw_weights(queries)
        ]
    )
    low_S, high_S = np.percentile(drawn_DS, [2.5, 97.5], axis=0)
    swapped_DS = np.concatenate(
        [
            np.subtract(*scores(np.ones_like(swaps_BQ), swaps_BQ)[::-1])
            for swaps_BQ in _swaps(queries)
        ]
    )
    # Sums in another order may differ in their last digits.
    as_large_DS = np.abs(swapped_DS) >= np.abs(found_S) - 1e-12
    columns = (a_S, b_S, found_S, low_S, high_S, as_large_DS.mean(axis=0))
    return [
        Difference(a, b, value, (low, high), p)
        for a, b, value, low, high, p in np.stack(columns, axis=1).tolist()
    ]


def _swaps(queries: int) -> Iterator[np.ndarray]:
    """Whether the outputs for each query are exchanged, 0 or 1, as blocks of rows (B, queries), the
    first of which exchanges none.
    """
    rng = np.random.default_rng(SEED)
    if 2**queries <= SWAPS:
        every = np.arange(2**queries)[:, None] >> np.arange(queries) & 1
    for begin in range(0, min(2**queries, SWAPS), _TOGETHER):
        if 2**queries <= SWAPS:
            yield every[begin : begin + _TOGETHER].astype(np.float64)
            continue
        swaps_BQ = rng.integers(2, size=(min(_TOGETHER, SWAPS - begin), queries))
        swaps_BQ[0] *= begin > 0
        yield swaps_BQ.astype(np.float64)
