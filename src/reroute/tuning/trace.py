"""What is known of each candidate, and what became of it: the part of tune.json that the search fills in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reroute.bench.statistics import Ratio, paired_ratio, spread
from reroute.cost import Plan
from reroute.schedule import Schedule

Samples = Mapping[str, Sequence[float]]  # quantity -> milliseconds, one a round

# In the order in which a candidate can meet them; every candidate ends with one of the others than "candidate".
Status = Literal[
    "candidate",
    "unreachable",  # the model has no such schedule
    "pruned",  # the plan alone misses a bound
    "not tried",  # out of time before it was built or measured
    "failed",  # its engine does not reproduce the recorded reference
    "too slow",  # measured, and the median misses a bound
    "eliminated",  # feasible, and left behind by the scores
    "finalist",
    "winner",
]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of a candidate that ran in the rounds of a batch, and of the dense engine in the same ones.

    Attributes:
        batch: number of the batch; times of different batches are of different minutes.
        samples: by quantity, one a round.
        times: by quantity, median and its interval, ms.
        speedup: by quantity, how many times faster than dense, paired by round.
        early: the candidate left after the first rounds.
    """

    batch: int
    samples: dict[str, tuple[float, ...]]
    times: dict[str, Ratio]
    speedup: dict[str, Ratio]
    early: bool = False

    @classmethod
    def of(cls, own: Samples, dense: Samples, *, batch: int, early: bool = False) -> Latency:
        """Summary of paired samples; `dense` may have more rounds, its first are those of `own`."""
        samples = {name: tuple(round(value, 5) for value in values) for name, values in own.items()}
        base = {name: [round(value, 5) for value in dense[name]] for name in samples}
        return cls(
            batch=batch,
            samples=samples,
            times={name: median_of(values) for name, values in samples.items()},
            speedup={name: paired_ratio(base[name][: len(values)], values) for name, values in samples.items()},
            early=early,
        )


def median_of(samples: Sequence[float]) -> Ratio:
    """Median of positive samples with its bootstrap interval (resampled on logarithms, as `reroute.bench` does)."""
    interval = paired_ratio(samples, [1.0] * len(samples))
    return Ratio(value=spread(samples).median, low=interval.low, high=interval.high)


@dataclass(kw_only=True, eq=False)
class Entry:
    """One schedule of the search space. The search fills it in.

    Attributes:
        name: its routing spec, the first of those that mean it.
        also: other specs of the space that mean the same schedule.
        schedule: None where the model has none.
        plan: of the prompt that is measured.
        status: what became of it.
        reason: why, in words.
        latency: None where it was not measured.
        rounds: for each round of the search that it took part in, questions and score.
        scores: 0..1 of the search questions, in their order; as many as were asked.
        fresh: of the questions that were kept back.
    """

    name: str
    also: tuple[str, ...] = ()
    schedule: Schedule | None = None
    plan: Plan | None = None
    status: Status = "candidate"
    reason: str = ""
    latency: Latency | None = None
    rounds: list[tuple[int, float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean over the search questions so far."""
        return mean(self.scores) if self.scores else None

    def relative(self, quantity: str) -> float:
        """Latency as a share of the dense engine's in the same rounds, so that batches compare."""
        if self.latency is None:
            raise ValueError(f"{self.name} was not measured")
        return 1 / self.latency.speedup[quantity].value


def mean(scores: Sequence[float]) -> float:
    """Exactly rounded, so that equal scores tie whatever their order."""
    return math.fsum(scores) / len(scores)


def front(entries: Sequence[Entry], quantity: str) -> list[Entry]:
    """The Pareto front of score against latency, fastest first.

    Two candidates are compared on the questions that both answered, which are the first ones of the longer list, so
    that neither gains by easier questions. One dominates the other when it is at least as fast and at least as good,
    and better in one of the two.
    """
    scored = [entry for entry in entries if entry.scores and entry.latency is not None]

    def dominates(one: Entry, other: Entry) -> bool:
        shared = min(len(one.scores), len(other.scores))
        gain = mean(one.scores[:shared]) - mean(other.scores[:shared])
        faster = other.relative(quantity) - one.relative(quantity)
        return gain >= 0 and faster >= 0 and (gain > 0 or faster > 0)

    left = [one for one in scored if not any(dominates(other, one) for other in scored if other is not one)]
    return sorted(left, key=lambda entry: entry.relative(quantity))
