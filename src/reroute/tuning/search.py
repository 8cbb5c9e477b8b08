"""The search: prune by the plan, build, measure, ask; the final score on what was kept back.

Everything that touches the machine is behind `Device`, so that tests can put a landscape in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from reroute.errors import GateError
from reroute.report import one_line
from reroute.tuning.bounds import Bounds, Check, worst
from reroute.tuning.budgets import FINALISTS, LEAST_FIRST, Round, Split, answers_of, rounds_of, within
from reroute.tuning.halving import Judge, halve
from reroute.tuning.screening import Batch, Bench, batches, screen, steps
from reroute.tuning.trace import Entry, Latency

BUILD_SHARE = 0.5  # of the time, at most, before the first question is asked


class Device(Bench, Judge, Protocol):
    """Where candidates are built, measured and asked."""

    def build(self, name: str) -> None:
        """Make the engine of a spec. Raises GateError when it does not reproduce the reference."""
        ...


Progress = Callable[[int, str], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to search.

    Attributes:
        warmup: rounds of the measurement that are thrown away.
        repeat: rounds that count.
        questions: of the first round; None for a number that uses all.
        seconds: that the whole may take; None for no limit.
        seed: of the order in which engines run.
        memory_bytes: that engines which are measured together may take.
    """

    warmup: int = 3
    repeat: int = 10
    questions: int | None = None
    seconds: float | None = None
    seed: int = 0
    memory_bytes: int = 2 << 30


@dataclass(kw_only=True)
class Outcome:
    """What the search found; the rest stands in its entries.

    Attributes:
        entries: all of the space, the dense one first.
        batches: of the measurement.
        planned: rounds of questions, as planned.
        run: how many of them were run.
        finalists: best first; none when no candidate is feasible.
        fresh: how many of the questions that were kept back were asked.
        seconds: by phase.
        notes: what a reader should know besides.
    """

    entries: list[Entry]
    batches: list[Batch] = field(default_factory=list)
    planned: list[Round] = field(default_factory=list)
    run: int = 0
    finalists: list[Entry] = field(default_factory=list)
    fresh: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Entry:
        """The baseline, whether or not it keeps the bounds."""
        return self.entries[0]

    @property
    def winner(self) -> Entry | None:
        """The best finalist."""
        return self.finalists[0] if self.finalists else None


def prune(entries: Sequence[Entry], bounds: Bounds) -> list[Entry]:
    """Mark what the plan alone rules out, and return the others."""
    for entry in entries:
        if entry.status == "candidate" and entry.plan is not None:
            missed = worst([check for check in bounds.of_plan(entry.plan) if not check.holds])
            if missed is not None:
                entry.status, entry.reason = "pruned", str(missed)
    return [entry for entry in entries if entry.status == "candidate"]


def nearest(entries: Sequence[Entry], bounds: Bounds) -> tuple[Entry, Check] | None:
    """The candidate whose worst miss is the smallest, and that miss: of those measured, else by the plans alone."""
    measured = [entry for entry in entries if entry.latency is not None and entry.status == "too slow"]
    found = []
    for entry in measured or [entry for entry in entries if entry.status == "pruned"]:
        checks = bounds.of_plan(entry.plan) if entry.plan is not None else []
        checks += bounds.of_latency(entry.latency) if entry.latency is not None else []
        if (missed := worst(checks)) is not None:
            found.append((entry, missed))
    return min(found, key=lambda pair: pair[1].miss, default=None)


def search(
    entries: list[Entry],
    bounds: Bounds,
    device: Device,
    questions: Split,
    settings: Settings,
    *,
    progress: Progress,
    tell: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Find the best schedule. `entries` begin with the dense one, and are filled in.

    Raises:
        GateError: the dense engine does not reproduce its reference.
        UserError: more questions for the first round than there are.
    """
    start = mark = clock()
    outcome = Outcome(entries=entries)
    dense = outcome.dense

    def phase(name: str) -> None:
        nonlocal mark
        outcome.seconds[name] = round(clock() - mark, 1)
        mark = clock()

    def out_of_time(share: float = 1.0, reserve: float = 0.0) -> bool:
        return settings.seconds is not None and clock() - start + reserve > share * settings.seconds

    candidates = prune(entries, bounds)
    if not candidates:
        return outcome
    # Bad input shows before the hours of building.
    rounds_of(1, len(questions.search), settings.questions)
    dense_counts = dense.status == "candidate"
    routed = [entry for entry in candidates if entry is not dense]
    built = _build(routed, device, dense.name, tell, lambda: out_of_time(BUILD_SHARE))
    phase("build")

    groups = batches(built, device, dense=dense.name, limit_bytes=settings.memory_bytes) or [[]]
    tell(f"measuring {len(built)} candidates and dense, {settings.warmup} + {settings.repeat} rounds")
    with progress(steps(groups, warmup=settings.warmup, repeat=settings.repeat), "measuring") as advance:
        outcome.batches = screen(
            groups,
            device,
            bounds,
            dense=dense.name,
            warmup=settings.warmup,
            repeat=settings.repeat,
            seed=settings.seed,
            advance=advance,
            out_of_time=lambda: out_of_time(BUILD_SHARE),
        )
    _measure_dense(outcome, bounds, dense_counts)
    phase("measure")
    feasible = [entry for entry in candidates if entry.status == "candidate"]
    if not feasible:
        return outcome

    pool, kept_back, reserve = _questions(outcome, feasible, questions, settings, device, start, clock)
    rounds = outcome.planned = rounds_of(len(feasible), pool, settings.questions)
    tell(f"{len(feasible)} keep the bounds; {len(rounds)} rounds, {rounds[0].questions} questions in the first")
    with progress(answers_of(rounds) - len(feasible) * len(feasible[0].scores), "searching") as advance:
        outcome.finalists, outcome.run = halve(
            feasible,
            questions.search,
            device,
            rounds,
            quantity=bounds.quantity,
            advance=advance,
            out_of_time=lambda: out_of_time(reserve=reserve),
        )
    if outcome.run < len(rounds):
        outcome.notes.append(f"Out of time after round {outcome.run} of {len(rounds)}: its best were taken.")
    phase("search")

    names = list(dict.fromkeys([*(entry.name for entry in outcome.finalists), dense.name]))
    fresh = questions.fresh[:kept_back]
    outcome.fresh = len(fresh)
    tell(f"{len(fresh)} fresh questions to {len(names)} engines")
    with progress(len(names) * len(fresh), "final score") as advance:
        scores = device.ask(names, fresh, advance)
    for entry in {*outcome.finalists, dense}:
        entry.fresh = list(scores[entry.name])
    phase("final score")
    return outcome


def _build(
    entries: Sequence[Entry], device: Device, dense: str, tell: Callable[[str], None], out_of_time: Callable[[], bool]
) -> list[Entry]:
    """Build the dense engine and the entries, and return those that were."""
    tell(f"building {len(entries) + 1} engines")
    tell(f"[1/{len(entries) + 1}] {dense}")
    device.build(dense)
    built = []
    for number, entry in enumerate(entries, 2):
        if built and out_of_time():  # one is always tried: dense alone is no answer
            entry.status, entry.reason = "not tried", "out of time before it was built"
            continue
        tell(f"[{number}/{len(entries) + 1}] {entry.name}")
        try:
            device.build(entry.name)
        except GateError as error:
            entry.status, entry.reason = "failed", one_line(error.message)
            continue
        built.append(entry)
    return built


def _measure_dense(outcome: Outcome, bounds: Bounds, counts: bool) -> None:
    """The dense engine's times over all batches, and whether it is feasible itself."""
    dense = outcome.dense
    pooled: dict[str, list[float]] = {}
    for batch in outcome.batches:
        for quantity, values in batch.dense.items():
            pooled.setdefault(quantity, []).extend(values)
    dense.latency = Latency.of(pooled, pooled, batch=0)
    missed = worst([check for check in bounds.of_latency(dense.latency) if not check.holds])
    if counts and missed is not None:
        dense.status, dense.reason = "too slow", str(missed)


def _questions(
    outcome: Outcome,
    feasible: Sequence[Entry],
    questions: Split,
    settings: Settings,
    judge: Judge,
    start: float,
    clock: Callable[[], float],
) -> tuple[int, int, float]:
    """How many questions to search with and to keep back, which a time limit may make fewer.

    With a limit, every candidate answers a few of the first questions here, which says how long an answer takes.

    Returns:
        Search questions, fresh questions, and the seconds that the final score will take (0 without a limit).
    """
    search, fresh = len(questions.search), len(questions.fresh)
    if settings.seconds is None:
        return search, fresh, 0.0
    few = questions.search[: min(LEAST_FIRST, rounds_of(len(feasible), search)[0].questions)]
    mark = clock()
    scores = judge.ask([entry.name for entry in feasible], few, lambda: None)
    per_answer = (clock() - mark) / (len(few) * len(feasible))
    for entry in feasible:
        entry.scores += scores[entry.name]
    left = settings.seconds - (clock() - start)
    chosen = within(left, candidates=len(feasible), search=search, fresh=fresh, per_answer=per_answer)
    if chosen != (search, fresh):
        outcome.notes.append(
            f"For the time that was left, {chosen[0]} of {search} search questions and {chosen[1]} of {fresh} that "
            "were kept back were planned."
        )
    return *chosen, per_answer * chosen[1] * (min(FINALISTS, len(feasible)) + 1)
