"""Means with bootstrap intervals that resample images, not questions.

Questions about one image share its scene and its visual features, so their results hang together: an interval that
resampled questions would be too narrow. A resample draws as many images as there are, with replacement, and takes all
questions of each (cluster bootstrap; Efron and Tibshirani, 1993, chapter 8). The bounds are percentiles, so a sample
without any variation, for example no error at all, has an interval of width 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions and its interval.

    Attributes:
        value: the mean.
        low: lower bound of the interval; None when there is one image only, which says nothing about others.
        high: upper bound.
        questions: how many values were averaged.
        images: how many images they are about.
    """

    value: float
    low: float | None
    high: float | None
    questions: int
    images: int


class Bootstrap:
    """Intervals of one evaluation. Equal questions get equal resamples, whatever is measured on them."""

    def __init__(self, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.seed = seed
        self.resamples = resamples
        self._weights: dict[int, np.ndarray] = {}

    def estimate(self, values: Sequence[float], images: Sequence[Hashable]) -> Estimate | None:
        """Mean of `values`, one for each question, whose image `images` names; None for no values.

        For a paired difference of two bundles give the differences of their scores, question by question.
        """
        if len(values) != len(images):
            raise ValueError(f"{len(values)} values, but images of {len(images)}")
        if not values:
            return None
        # Numbered as they come, so that the order of the questions, which is fixed, fixes the resamples.
        numbers: dict[Hashable, int] = {}
        clusters = np.asarray([numbers.setdefault(image, len(numbers)) for image in images])
        sums = np.bincount(clusters, weights=np.asarray(values, dtype=np.float64))
        counts = np.bincount(clusters)
        low = high = None
        if len(numbers) > 1:
            weights = self._weights_of(len(numbers))
            means = (weights @ sums) / (weights @ counts)
            low, high = (float(bound) for bound in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        return Estimate(
            value=float(sums.sum() / counts.sum()), low=low, high=high, questions=len(values), images=len(numbers)
        )

    def _weights_of(self, clusters: int) -> np.ndarray:
        """How often each resample draws each cluster, float64 [resamples, clusters]."""
        if clusters not in self._weights:
            drawn = np.random.default_rng([self.seed, clusters]).integers(clusters, size=(self.resamples, clusters))
            drawn += clusters * np.arange(self.resamples)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=self.resamples * clusters)
            self._weights[clusters] = counts.reshape(self.resamples, clusters).astype(np.float64)
        return self._weights[clusters]
