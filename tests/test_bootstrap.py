import itertools

import numpy as np
import pytest

from icl_moe.bootstrap import (
    DRAWS,
    SEED,
    SWAPS,
    Statistic,
    differences,
    intervals,
    mean_intervals,
    mean_statistic,
)


def drawn(queries: int) -> list[list[int]]:
    """The queries of each draw, one draw at a time."""
    rng = np.random.default_rng(SEED)
    return [rng.integers(queries, size=queries).tolist() for _ in range(DRAWS)]


def middle(scores: list[float]) -> tuple[float, float]:
    """Between the 2.5th and the 97.5th percentile, by linear interpolation."""
    ordered = sorted(scores)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(0.025), at(0.975)


def test_the_interval_of_a_mean_is_that_of_plain_draws():
    values = [0.0, 1.0, 0.25, 0.5, 0.125]
    (found,) = mean_intervals(values)
    assert found == pytest.approx(middle([sum(values[q] for q in d) / 5 for d in drawn(5)]))


def test_a_draw_without_a_score_is_left_out():
    """The mean over the first of three queries, in the draws that contain it."""

    def of_the_first(weights):
        return np.where(weights[:, :1] > 0, weights[:, :1], np.nan)

    scores = [float(d.count(0)) for d in drawn(3) if 0 in d]
    assert intervals(of_the_first, 3) == [pytest.approx(middle(scores))]


def test_scores_of_the_same_queries_come_from_the_same_draws():
    values = np.random.default_rng(1).random(20)
    wide, gain = mean_intervals(values, values + 0.5 - values)
    assert wide[1] - wide[0] > 0.1
    assert gain == pytest.approx((0.5, 0.5))


def ratio_of_sums(pairs) -> float:
    return sum(top for top, _ in pairs) / sum(bottom for _, bottom in pairs)


def ratio_statistic(pairs) -> Statistic:
    """A score that is no mean over queries, as mIoU and BLEU are none."""
    columns = np.array(pairs)

    def ratios(weights):
        sums = weights @ columns
        return sums[:, :1] / sums[:, 1:]

    return Statistic(("ratio",), ratios)


def test_the_p_of_few_queries_is_that_of_all_exchanges():
    """Compared with a plain loop over the 2^7 ways to exchange the outputs of two systems."""
    rng = np.random.default_rng(4)
    a, b = ([(rng.random(), 1 + rng.random()) for _ in range(7)] for _ in range(2))
    b = [(top + 0.2, bottom) for top, bottom in b]
    (found,) = differences(ratio_statistic([*a, *b]), 7)
    assert (found.a, found.b) == pytest.approx((ratio_of_sums(a), ratio_of_sums(b)))
    assert found.value == pytest.approx(found.b - found.a)
    as_large = 0
    for exchanged in itertools.product([False, True], repeat=7):
        pairs = [(y, x) if e else (x, y) for e, x, y in zip(exchanged, a, b, strict=True)]
        difference = ratio_of_sums([y for _, y in pairs]) - ratio_of_sums([x for x, _ in pairs])
        as_large += abs(difference) >= abs(found.value) - 1e-12
    assert found.p == as_large / 2**7
    scores = [ratio_of_sums([b[q] for q in d]) - ratio_of_sums([a[q] for q in d]) for d in drawn(7)]
    assert found.interval == pytest.approx(middle(scores))


def test_the_p_of_more_queries_is_near_that_of_all_exchanges():
    """The score is a mean over 18 queries, for which all 2^18 exchanges can still be made."""
    rng = np.random.default_rng(10)
    a = rng.random(18)
    b = a + rng.normal(0.06, 0.12, 18)
    (found,) = differences(mean_statistic({"mean": [*a, *b]}), 18)
    signs = 1 - 2 * (np.arange(2**18)[:, None] >> np.arange(18) & 1)
    exact = np.mean(np.abs(signs @ (b - a)) >= abs((b - a).sum()) - 1e-12)
    assert 0.02 < exact < 0.5
    assert found.p == pytest.approx(exact, abs=0.02)


def test_chance_seldom_looks_like_a_difference():
    """For two systems that are equally good, p is below 0.05 about once in twenty times, also with
    few queries.
    """
    rng = np.random.default_rng(6)
    for queries in (6, 30):
        small = sum(
            differences(mean_statistic({"mean": rng.random(2 * queries)}), queries)[0].p <= 0.05
            for _ in range(60)
        )
        assert small <= 8


def test_equal_systems_do_not_differ_and_p_is_never_0():
    values = np.random.default_rng(7).random(40)
    (same,) = differences(mean_statistic({"mean": [*values, *values]}), 40)
    assert (same.value, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    (other,) = differences(mean_statistic({"mean": [*values, *(values + 1)]}), 40)
    assert other.p == pytest.approx(1 / SWAPS)
