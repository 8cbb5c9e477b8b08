"""Latency of all candidates, beside the dense engine and in the same rounds; the clearly too slow leave early.

Candidates are measured in batches that fit memory, and the dense engine runs in every batch. After the first rounds a
candidate whose whole interval misses a latency bound by a wide margin leaves. The others run all rounds, and are
feasible when the bound holds for the median.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from reroute.tuning.bounds import Bounds, worst
from reroute.tuning.trace import Entry, Latency, Samples

PROBE_ROUNDS = 4
MARGIN = 1.25  # by which the favourable end of the interval must miss the bound
MAX_BATCH = 12  # candidates: in a longer round the dense engine would run too far from some of them


class Runner(Protocol):
    """Loaded engines."""

    def __call__(
        self, names: Sequence[str], *, warmup: int, rounds: int, seed: int, advance: Callable[[], None]
    ) -> Mapping[str, Samples]:
        """Run `names` in interleaved rounds, warm-up thrown away; `advance` is called after every repetition."""
        ...


class Bench(Protocol):
    """What the screening needs of a device."""

    def memory_bytes(self, name: str) -> int:
        """That a loaded engine takes."""
        ...

    def load(self, names: Sequence[str]) -> AbstractContextManager[Runner]:
        """Engines that stay loaded as long as the context."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What ran together: names in their order, and how often, warm-up not counted, for those that stayed."""

    candidates: tuple[str, ...]
    rounds: int
    dense: dict[str, tuple[float, ...]]


def batches(entries: Sequence[Entry], device: Bench, *, dense: str, limit_bytes: int) -> list[list[Entry]]:
    """Neighbours that fit `limit_bytes` beside the dense engine; one that does not fit runs with it alone."""
    groups: list[list[Entry]] = []
    base = held = device.memory_bytes(dense)
    for entry in entries:
        size = device.memory_bytes(entry.name)
        if not groups or held + size > limit_bytes or len(groups[-1]) == MAX_BATCH:
            groups.append([])
            held = base
        groups[-1].append(entry)
        held += size
    return groups


def screen(
    groups: Sequence[Sequence[Entry]],
    device: Bench,
    bounds: Bounds,
    *,
    dense: str,
    warmup: int,
    repeat: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> list[Batch]:
    """Measure every entry of `groups` and mark those that are too slow. The dense engine is not among them.

    `advance` is called `steps(...)` times. When the time is up, the groups that are left are marked as not tried.
    """
    done: list[Batch] = []
    for number, group in enumerate(groups):
        if done and out_of_time():
            for entry in group:
                entry.status, entry.reason = "not tried", "out of time before it was measured"
            continue
        names = [dense, *(entry.name for entry in group)]
        probe = min(PROBE_ROUNDS, repeat)
        with device.load(names) as run:
            samples = _copy(run(names, warmup=warmup, rounds=probe, seed=seed + 2 * number, advance=advance))
            staying = []
            for entry in group:
                latency = Latency.of(samples[entry.name], samples[dense], batch=number, early=probe < repeat)
                if probe < repeat and any(check.least_miss > MARGIN for check in bounds.of_latency(latency)):
                    entry.latency = latency
                    for _ in range(repeat - probe):
                        advance()
                else:
                    staying.append(entry)
            if probe < repeat:
                names = [dense, *(entry.name for entry in staying)]
                more = run(names, warmup=0, rounds=repeat - probe, seed=seed + 2 * number + 1, advance=advance)
                for name in names:
                    for quantity, values in more[name].items():
                        samples[name][quantity] += values
        for entry in staying:
            entry.latency = Latency.of(samples[entry.name], samples[dense], batch=number)
        for entry in group:
            judge(entry, bounds)
        own = {quantity: tuple(round(value, 5) for value in values) for quantity, values in samples[dense].items()}
        done.append(Batch(candidates=tuple(entry.name for entry in group), rounds=repeat, dense=own))
    return done


def judge(entry: Entry, bounds: Bounds) -> None:
    """Mark an entry as too slow when the median misses a bound."""
    assert entry.latency is not None
    missed = worst([check for check in bounds.of_latency(entry.latency) if not check.holds])
    if missed is not None:
        rounds = len(next(iter(entry.latency.samples.values())))
        early = f"; left after {rounds} rounds" if entry.latency.early else ""
        entry.status, entry.reason = "too slow", f"{missed}{early}"


def steps(groups: Sequence[Sequence[Entry]], *, warmup: int, repeat: int) -> int:
    """How often `screen` advances when the time suffices."""
    return sum((len(group) + 1) * (warmup + repeat) for group in groups)


def _copy(samples: Mapping[str, Samples]) -> dict[str, dict[str, list[float]]]:
    return {name: {quantity: list(values) for quantity, values in own.items()} for name, own in samples.items()}
