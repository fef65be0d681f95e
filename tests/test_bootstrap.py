import numpy as np
import pytest

from icl_moe.bootstrap import DRAWS, SEED, intervals, mean_intervals


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
