"""Medians, spread and intervals of ratios, against numbers that can be checked by hand and against many seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reroute.bench.statistics import Ratio, Spread, paired_ratio, ratio_of_ratios, spread


def test_spread_by_hand():
    assert spread([5, 1, 2, 4, 3]) == Spread(median=3, quartiles=(2, 4), mad=1)
    assert spread([7]) == Spread(median=7, quartiles=(7, 7), mad=0)


def test_a_ratio_is_taken_within_rounds():
    """Every round is twice as slow, however different the rounds are."""
    under = [1.0, 10.0, 3.0, 100.0]
    assert paired_ratio([2 * value for value in under], under) == ratio_of(2)
    assert ratio_of_ratios(([6.0, 3.0], [2.0, 1.0]), (under, under)) == ratio_of(3)


def ratio_of(value: float) -> Ratio:
    near: Any = pytest.approx(value)
    return Ratio(value=near, low=near, high=near)


def test_one_round_says_nothing():
    ratio = paired_ratio([3.0], [2.0])
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(1.5), 0.0, float("inf"))


def test_rounds_must_be_the_same():
    with pytest.raises(ValueError, match="2 samples against 1"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 samples"):
        paired_ratio([], [])


def test_outliers_and_drift_do_not_move_the_ratio():
    random = np.random.default_rng(0)
    drift = np.exp(np.cumsum(random.normal(0, 0.2, 41)))
    over, under = 1.1 * drift, drift.copy()
    over[:8] *= 50
    under[10:15] *= 50
    assert paired_ratio(over.tolist(), under.tolist()).value == pytest.approx(1.1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, covered = np.random.default_rng(1), 0
    for seed in range(200):
        over, under = random.lognormal(0.1, 0.05, 25), random.lognormal(0, 0.05, 25)
        ratio = paired_ratio(over.tolist(), under.tolist(), seed=seed)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= np.exp(0.1) <= ratio.high
    assert 184 <= covered <= 198


def test_equal_samples_have_equal_intervals():
    random = np.random.default_rng(2)
    over, under = random.lognormal(0, 0.1, 20).tolist(), random.lognormal(0, 0.1, 20).tolist()
    assert paired_ratio(over, under) == paired_ratio(over, under)
