"""What becomes of visual tokens from decision to decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reroute.evaluation.records import decisions_of, share_of
from tests.evaluation.fakes import bundle_of


def follow(routing: str, routes: list[list[int]], *, region: Any = None, entered: Any = range(16)) -> list[tuple]:
    schedule = bundle_of(routing).manifest.schedule
    found = decisions_of(
        schedule,
        np.asarray(entered),
        tuple(np.asarray(route) for route in routes),
        None if region is None else np.asarray(region),
    )
    assert tuple(decision.layer for decision in found) == schedule.decision_layers
    return [(decision.kept, decision.returned, decision.recovered, decision.share) for decision in found]


def test_tokens_that_came_back_and_tokens_that_were_out():
    routes = [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5]]
    # At the second decision 4 and 5 come back; at the third they stay, having been out at the first.
    assert follow("reroute@1,2,4:keep=4,4,3", routes) == [(4, 0, 0, None), (4, 2, 2, None), (3, 0, 2, None)]


def test_a_token_can_come_back_from_two_stages_ago():
    routes = [[7, 8], [1, 2], [1, 7]]
    assert follow("reroute@1,2,4:keep=2,2,2", routes) == [(2, 0, 0, None), (2, 2, 2, None), (2, 1, 2, None)]


def test_removal_brings_nothing_back():
    routes = [[0, 1, 2], [1, 2], [2]]
    assert follow("removal@1,2,4:keep=3,2,1", routes, region=[2, 3]) == [
        (3, 0, 0, 0.5),
        (2, 0, 0, 0.5),
        (1, 0, 0, 0.5),
    ]


def test_tokens_that_never_entered_do_not_come_back():
    routes = [[1, 5], [3, 9]]
    assert follow("reroute@2,4:keep=2,2", routes, entered=[1, 3, 5, 9], region=[8, 9]) == [
        (2, 0, 0, 0.0),
        (2, 2, 2, 0.5),
    ]


def test_the_share_of_an_object():
    tokens = np.asarray([1, 2, 3])
    assert share_of(np.asarray([2, 3, 4, 5]), tokens) == 0.5
    assert share_of(None, tokens) is None
    assert share_of(np.zeros(0, dtype=np.int64), tokens) is None


def test_dense_bundles_decide_nothing():
    assert follow("dense", []) == []
    with pytest.raises(ValueError, match="zip"):
        follow("dense", [[1]])
