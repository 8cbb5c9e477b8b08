"""Budgets from a target: the largest ones of a shape whose cost does not exceed a limit.

The cost is any measure that does not fall when a budget grows: visual rows, FLOPs or KV bytes. A shape is one number r
in 0..1 that scales all budgets of N candidates; decision i keeps

    uniform    r N                          FastV
    geometric  r^(i+1) N                    PyramidDrop as printed for averages of 192 and 128 of 576
    halving    r N, r N, r N / 2, r N / 4   Reroute with PyramidDrop as printed for the same averages
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Shape = Literal["uniform", "geometric", "halving"]
# Nüwa keeps 7 times as many tokens in its first stage as in its second (112 and 16, 224 and 32, 336 and 48).
NUWA_RATIO = 7
_HALVINGS = 60  # of the scale: far below one token of any model


def shares(shape: Shape, count: int, scale: float) -> list[float]:
    """Share of the candidates that each decision keeps, at most 1."""
    if shape == "uniform":
        return [min(1.0, scale)] * count
    if shape == "geometric":
        return [scale ** (i + 1) for i in range(count)]
    return [min(1.0, scale * 2.0 ** -max(0, i - 1)) for i in range(count)]


def solve(
    shape: Shape, count: int, candidates: int, cost: Callable[[list[int]], int], limit: int, *, lead: int = 0
) -> list[int]:
    """Largest budgets of a shape with `cost(budgets) <= limit`; budgets never grow with depth.

    Args:
        shape: how the budgets relate.
        count: decisions.
        candidates: visual tokens N; no budget exceeds it.
        cost: of a list of budgets; all ones must be within the limit.
        limit: what the cost may be.
        lead: 0, or the ratio of one more budget in front to the first decision's (Nüwa's first stage).

    Returns:
        The budgets, with `lead` one more.
    """

    def budgets(scale: float) -> list[int]:
        own = shares(shape, count, scale)
        own = [min(1.0, lead * own[0]), *own] if lead else own
        return [min(candidates, max(1, int(candidates * share))) for share in own]

    low, high = 0.0, float(2**count)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(budgets(middle)) <= limit else (low, middle)
    keeps = budgets(low)
    # What flooring left over goes to the decisions from the front, one token at a time.
    grown = True
    while grown:
        grown = False
        for i in range(len(keeps)):
            more = [*keeps[:i], keeps[i] + 1, *keeps[i + 1 :]]
            if keeps[i] < (keeps[i - 1] if i else candidates) and cost(more) <= limit:
                keeps, grown = more, True
    return keeps
