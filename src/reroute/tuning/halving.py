"""Successive halving: all candidates answer a few questions, the better half of them more, and so on.

Within a round all candidates have answered the same questions, the first ones of the search, so they are compared in
pairs on equal ones. Equal scores go to the lower latency, and then by name, so that a search is repeatable.
(Karnin, Koren and Somekh, 2013; Jamieson and Talwalkar, 2016.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from reroute.evaluation.questions import Question
from reroute.tuning.budgets import FINALISTS, Round
from reroute.tuning.trace import Entry


class Judge(Protocol):
    """What the search needs of a device."""

    def ask(
        self, names: Sequence[str], questions: Sequence[Question], advance: Callable[[], None]
    ) -> Mapping[str, Sequence[float]]:
        """Scores 0..1 of every question, in order, by name; `advance` is called after every answer."""
        ...


def halve(
    entries: Sequence[Entry],
    questions: Sequence[Question],
    judge: Judge,
    rounds: Sequence[Round],
    *,
    quantity: str,
    advance: Callable[[], None] = lambda: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[list[Entry], int]:
    """Ask, and mark who is left behind.

    Entries may have answered the first questions already, all of them equally many.

    Returns:
        The finalists, best first, and how many rounds were run: fewer than planned when the time was up.
    """
    alive = list(entries)
    asked, run = len(entries[0].scores) if entries else 0, 0
    for run, plan in enumerate(rounds, 1):
        scores = judge.ask([entry.name for entry in alive], questions[asked : plan.questions], advance)
        asked = max(asked, plan.questions)
        for entry in alive:
            entry.scores += scores[entry.name]
            entry.rounds.append((len(entry.scores), _score(entry)))
        alive.sort(key=lambda entry: (-_score(entry), entry.relative(quantity), entry.name))
        last = run == len(rounds) or out_of_time()
        keep = min(FINALISTS, len(alive)) if last else math.ceil(len(alive) / 2)
        for entry in alive[keep:]:
            entry.status = "eliminated"
            cut = f"the last to go on had {100 * _score(alive[keep - 1]):.1f} %"
            entry.reason = f"in round {run}: {100 * _score(entry):.1f} % right, {cut}"
        alive = alive[:keep]
        if last:
            break
    for entry in alive:
        entry.status = "finalist"
    if alive:
        alive[0].status = "winner"
    return alive, run


def _score(entry: Entry) -> float:
    assert entry.score is not None
    return entry.score
