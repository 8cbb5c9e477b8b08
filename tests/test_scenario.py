"""The recorded scenario must fit the sessions that it is replayed in, down to the smallest that export accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from reroute import scenario
from reroute.check import check_fits
from reroute.errors import UserError
from reroute.manifest import Capacity
from tests.model_descriptions import model_of
from tests.test_manifest import manifest_of


@pytest.mark.parametrize("num_tokens", [1, 9, 64])
def test_text_tokens_are_what_the_probe_runs(num_tokens: int, tmp_path: Path) -> None:
    """A bundle of exactly that capacity takes the probe, and of one token less refuses it with both numbers."""
    probe = scenario.probe(model_of(), num_tokens=num_tokens)
    needed = scenario.text_tokens(num_tokens)
    assert needed == len(probe.prompt_ids) - 1 + num_tokens + len(probe.turn_ids)  # one id is the image
    check_fits(probe, manifest_of(tmp_path, capacity=Capacity(max_text=needed)))
    with pytest.raises(UserError, match=f"{needed} text tokens, the bundle's capacity is {needed - 1}"):
        check_fits(probe, manifest_of(tmp_path, capacity=Capacity(max_text=needed - 1)))
