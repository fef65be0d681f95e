"""The learning rate of every step of a run, as a curve."""

import math

import pytest

from icl_moe.optim.learning_rate import learning_rate
from icl_moe.recipe import OptimizerSettings


def curve(steps: int, **settings: object) -> list[float]:
    return [
        learning_rate(OptimizerSettings(learning_rate=2.0, **settings), step, steps)
        for step in range(steps)
    ]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_climbs_evenly_to_its_peak_at_the_last_step_of_the_warmup(schedule):
    assert curve(100, schedule=schedule, warmup_steps=4)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_constant_stays_at_the_peak():
    assert curve(20, schedule="constant", warmup_steps=4)[4:] == [2.0] * 16


def test_cosine_falls_along_half_a_wave_to_nothing():
    rates = curve(104, schedule="cosine", warmup_steps=4)[4:]
    assert rates == pytest.approx([1.0 + math.cos(math.pi * k / 100) for k in range(100)])
    assert rates[0] == 2.0 and rates[50] == pytest.approx(1.0) and 0 < rates[-1] < 1e-3
    assert (
        learning_rate(OptimizerSettings(learning_rate=2.0, warmup_steps=4), step=104, steps=104)
        == 0.0
    )


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert curve(10, schedule="cosine", warmup_steps=0)[0] == 2.0


def test_a_warmup_longer_than_the_run_never_reaches_the_peak():
    assert curve(5, schedule="cosine", warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
