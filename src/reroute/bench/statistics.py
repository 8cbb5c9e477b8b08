"""Medians, spread, and bootstrap intervals of ratios between candidates that ran in the same rounds.

A round runs every candidate once, one right after the other, so what the machine does in that minute (clock, heat,
neighbours) is in all of them. Dividing within a round takes it out; a median over rounds ignores rounds that were hit.
Everything works on logarithms, because times are positive and disturbances multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A sample in three numbers, in the unit of the sample.

    Attributes:
        median: the middle.
        quartiles: first and third.
        mad: median absolute deviation from the median, unscaled.
    """

    median: float
    quartiles: tuple[float, float]
    mad: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio and its bootstrap interval; with a single round the interval is unbounded: one says nothing."""

    value: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Median, quartiles and MAD."""
    values = np.asarray(samples, dtype=np.float64)
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    mad = float(np.median(np.abs(values - median)))
    return Spread(median=float(median), quartiles=(float(low), float(high)), mad=mad)


def paired_ratio(over: Sequence[float], under: Sequence[float], *, seed: int = 0) -> Ratio:
    """Median over rounds of over / under; sample i of both is of round i."""
    return _interval([_logs(over, under)], seed)


def ratio_of_ratios(
    new: tuple[Sequence[float], Sequence[float]], base: tuple[Sequence[float], Sequence[float]], *, seed: int = 0
) -> Ratio:
    """The paired ratio of one run (candidate, baseline) over that of another, which may have other rounds."""
    return _interval([_logs(*new), _logs(*base)], seed)


def _logs(over: Sequence[float], under: Sequence[float]) -> np.ndarray:
    """log(over / under) of each round, float64 [rounds]."""
    if len(over) != len(under) or not over:
        raise ValueError(f"{len(over)} samples against {len(under)}: not of the same rounds")
    return np.log(np.asarray(over, dtype=np.float64)) - np.log(np.asarray(under, dtype=np.float64))


def _interval(runs: list[np.ndarray], seed: int) -> Ratio:
    """exp(median of the first run minus median of the second, if any), rounds of each run resampled by themselves."""
    random = np.random.default_rng(seed)
    signs = (1, -1)
    value = sum(sign * float(np.median(run)) for sign, run in zip(signs, runs, strict=False))
    if min(map(len, runs)) < 2:
        return Ratio(value=float(np.exp(value)), low=0.0, high=float("inf"))
    drawn = np.zeros(RESAMPLES)
    for sign, run in zip(signs, runs, strict=False):
        drawn += sign * np.median(run[random.integers(len(run), size=(RESAMPLES, len(run)))], axis=1)
    low, high = np.exp(np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    return Ratio(value=float(np.exp(value)), low=float(low), high=float(high))
