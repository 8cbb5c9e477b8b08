"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reroute.errors import UserError
from reroute.runtime.backend import StepOutputs


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    Attributes:
        temperature: 0 takes the most likely token (the lowest id on ties); otherwise logits are divided by
            it.
        top_k: only the k most likely tokens are drawn from; None for all.
        top_p: then only the most likely tokens that together reach this probability; 1 for all.
        seed: of the random numbers of one answer; None for a new one each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"the temperature is {self.temperature}", hint="0 is greedy; useful values are 0.1 to 1.5")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}", hint="top_k is at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}", hint="top_p is a probability: above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"the seed is {self.seed}", hint="a seed is 0 or more")


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, outputs: StepOutputs) -> tuple[int, float]:
        """Token and log probability after a step: the engine's own choice if it made one and that is what is wanted."""
        if self._sampling.temperature > 0 or outputs.greedy is None:
            return self.pick(outputs.logits[0])
        if not np.isfinite(outputs.greedy[1]):
            raise FloatingPointError("the model returned logits that are not finite")
        return outputs.greedy

    def pick(self, logits: np.ndarray) -> tuple[int, float]:
        """Choose a token.

        Args:
            logits: float [V].

        Returns:
            The token id and its log probability (natural) under the model itself: temperature, top_k and
            top_p do not change it.

        Raises:
            FloatingPointError: a logit is NaN or no logit is finite.
        """
        scores = logits.astype(np.float64)
        top = scores.max()
        if not np.isfinite(top):  # max is NaN as soon as one logit is
            raise FloatingPointError("the model returned logits that are not finite")
        token = int(scores.argmax()) if self._sampling.temperature == 0 else self._draw(scores - top)
        return token, float(scores[token] - top - np.log(np.exp(scores - top).sum()))

    def _draw(self, scores: np.ndarray) -> int:
        order = np.argsort(-scores, kind="stable")  # stable: the lower id comes first on ties
        if self._sampling.top_k is not None:
            order = order[: self._sampling.top_k]
        weights = np.exp(scores[order] / self._sampling.temperature)
        probabilities = weights / weights.sum()
        if self._sampling.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            count = int((before < self._sampling.top_p).sum())
            order, probabilities = order[:count], probabilities[:count]
        return int(self._random.choice(order, p=probabilities / probabilities.sum()))
