"""Limits that a schedule must keep, and by how much it misses them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from reroute.bench.statistics import Ratio
from reroute.cost import Plan
from reroute.errors import UserError
from reroute.report import format_bytes
from reroute.tuning.trace import Latency


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit against one candidate.

    Attributes:
        bound: the field of `Bounds`.
        value: what was measured (a median) or computed.
        low: lower end of its 95 % interval; equal to `value` where it is exact.
        high: upper end.
        limit: the bound.
        at_least: whether the value must be at least the limit, and not at most.
    """

    bound: str
    value: float
    low: float
    high: float
    limit: float
    at_least: bool = False

    @property
    def miss(self) -> float:
        """How many times too large (or too small) the value is; the bound holds up to 1."""
        return self.limit / self.value if self.at_least else self.value / self.limit

    @property
    def least_miss(self) -> float:
        """The same at the favourable end of the interval."""
        return self.limit / self.high if self.at_least else self.low / self.limit

    @property
    def holds(self) -> bool:
        """The bound holds for the median."""
        return self.miss <= 1

    @property
    def certain(self) -> bool:
        """The whole interval lies on the side of the median."""
        inside = self.low >= self.limit if self.at_least else self.high <= self.limit
        outside = self.high < self.limit if self.at_least else self.low > self.limit
        return inside or outside

    def __str__(self) -> str:
        """`prefill 12.3 ms [12.1, 12.9] > 10 ms`, or what else it is."""
        value, limit = text_of(self.bound, self.value), text_of(self.bound, self.limit)
        span = "" if self.low == self.high else f" [{self.low:.3g}, {self.high:.3g}]"
        side = ("<" if self.at_least else ">") if not self.holds else (">=" if self.at_least else "<=")
        return f"{LABELS[self.bound]} {value}{span} {side} {limit}"


LABELS = {
    "prefill_ms": "prefill",
    "end_to_end_ms": "end to end",
    "speedup": "prefill speed",
    "kv_bytes": "KV",
    "memory_bytes": "estimated peak memory",
}


def text_of(bound: str, value: float) -> str:
    """A value of a bound with its unit."""
    if bound.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.3g}x dense" if bound == "speedup" else f"{value:.3g} ms"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What must hold; None is no limit. Times are medians of a prompt of one image, see `reroute.bench.workload`.

    Attributes:
        prefill_ms: at most.
        end_to_end_ms: at most.
        speedup: prefill at least this many times faster than the dense engine in the same rounds.
        kv_bytes: of the prompt, at most; exact, from the plan.
        memory_bytes: the plan's estimate of the peak (weights, caches at capacity, workspace), at most.
    """

    prefill_ms: float | None = None
    end_to_end_ms: float | None = None
    speedup: float | None = None
    kv_bytes: float | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(value is None for value in given.values()):
            raise UserError(
                "tune needs a bound: without one the answer is dense",
                hint="give --prefill-ms, --end-to-end-ms, --speedup, --kv-mib or --memory-mib",
            )
        for name, value in given.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"the bound on {LABELS[name]} is {value:g}", hint="give a number above 0")

    @property
    def quantity(self) -> str:
        """The latency that breaks ties: the one that is bound, prefill otherwise."""
        only_end = self.end_to_end_ms is not None and self.prefill_ms is None and self.speedup is None
        return "end_to_end_ms" if only_end else "prefill_ms"

    def words(self) -> list[str]:
        """Each bound in words."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                side = "at least" if field.name == "speedup" else "at most"
                found.append(f"{LABELS[field.name]} {side} {text_of(field.name, value)}")
        return found

    def of_plan(self, plan: Plan) -> list[Check]:
        """What the plan alone decides."""
        found = []
        for bound, value in (("kv_bytes", plan.kv_bytes), ("memory_bytes", plan.peak_bytes)):
            limit = getattr(self, bound)
            if limit is not None:
                found.append(Check(bound=bound, value=value, low=value, high=value, limit=limit))
        return found

    def of_latency(self, latency: Latency) -> list[Check]:
        """What a measurement decides."""
        found = []
        values: list[tuple[str, Ratio, bool]] = [
            ("prefill_ms", latency.times["prefill_ms"], False),
            ("end_to_end_ms", latency.times["end_to_end_ms"], False),
            ("speedup", latency.speedup["prefill_ms"], True),
        ]
        for bound, value, at_least in values:
            limit = getattr(self, bound)
            if limit is not None:
                interval = {"value": value.value, "low": value.low, "high": value.high}
                found.append(Check(bound=bound, **interval, limit=limit, at_least=at_least))
        return found


def worst(checks: list[Check]) -> Check | None:
    """The check that is missed most; None for none."""
    return max(checks, key=lambda check: check.miss, default=None)
