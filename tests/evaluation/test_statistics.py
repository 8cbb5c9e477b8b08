"""Intervals against numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from reroute.evaluation.statistics import Bootstrap, Estimate


def bounds(estimate: Estimate | None) -> tuple[float, float]:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def width(estimate: Estimate | None) -> float:
    low, high = bounds(estimate)
    return high - low


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.3])
def test_the_interval_of_a_constant_is_that_constant(constant: float):
    images = [n % 7 for n in range(50)]
    estimate = Bootstrap().estimate([constant] * 50, images)
    assert bounds(estimate) == pytest.approx((constant, constant), abs=1e-15)
    assert estimate is not None
    assert estimate.value == pytest.approx(constant)
    assert (estimate.questions, estimate.images) == (50, 7)


def test_two_images_have_three_resamples():
    # Drawn twice, image "a" gives 1, image "b" gives 0, and one of each gives 3 of 4 questions.
    estimate = Bootstrap().estimate([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate == Estimate(value=0.75, low=0.0, high=1.0, questions=4, images=2)


def test_an_image_weighs_as_much_as_its_questions():
    # 50 images of 9 right answers each, 50 of one wrong answer: 0.9 of the questions, though half of the images.
    low, high = bounds(Bootstrap().estimate([1] * 450 + [0] * 50, [*(n // 9 for n in range(450)), *range(50, 100)]))
    assert 0.8 < low < 0.9 < high < 0.95


def test_what_cannot_be_estimated():
    assert Bootstrap().estimate([], []) is None
    assert Bootstrap().estimate([0, 1], ["a", "a"]) == Estimate(value=0.5, low=None, high=None, questions=2, images=1)
    with pytest.raises(ValueError, match="3 values, but images of 2"):
        Bootstrap().estimate([1, 2, 3], ["a", "b"])


def test_independent_values_have_the_textbook_interval():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    low, high = bounds(Bootstrap().estimate(values.tolist(), range(400)))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=error / 10)
    assert high == pytest.approx(values.mean() + error, abs=error / 10)


def test_questions_that_hang_together_count_as_few():
    scenes = np.random.default_rng(2).integers(2, size=40).astype(float)
    values = np.repeat(scenes, 9).tolist()
    clustered = Bootstrap().estimate(values, [n // 9 for n in range(360)])
    independent = Bootstrap().estimate(values, range(360))
    assert clustered is not None
    assert independent is not None
    assert clustered.value == independent.value
    assert width(clustered) / width(independent) == pytest.approx(3, rel=0.15)  # the root of 9


def test_a_paired_difference_has_a_sign_and_is_sharper_than_two_intervals():
    rng = np.random.default_rng(3)
    hard = rng.normal(size=300)
    first, second = hard + 0.2 + rng.normal(0, 0.05, 300), hard
    images = [n // 3 for n in range(300)]
    difference = Bootstrap().estimate((first - second).tolist(), images)
    low, high = bounds(difference)
    assert 0 < low < 0.2 < high
    assert bounds(Bootstrap().estimate((second - first).tolist(), images)) == pytest.approx((-high, -low), abs=1e-3)
    assert width(difference) < width(Bootstrap().estimate(first.tolist(), images)) / 5


def test_equal_questions_get_equal_resamples():
    values = np.random.default_rng(4).random(60)
    images = [n // 4 for n in range(60)]
    bootstrap = Bootstrap()
    low, high = bounds(bootstrap.estimate(values.tolist(), images))
    assert bounds(bootstrap.estimate((values + 1).tolist(), images)) == pytest.approx((low + 1, high + 1), abs=1e-12)
    assert bounds(Bootstrap().estimate(values.tolist(), [f"image {i}" for i in images])) == (low, high)
    assert bounds(Bootstrap(seed=1).estimate(values.tolist(), images)) != (low, high)
