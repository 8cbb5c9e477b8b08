"""Routing specs that cannot be, for a decoder of 6 layers and 36 visual tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.conftest import Refused

CASES = {
    "removal grows": ("removal@2,4:keep=4,7", ["removal keeps 7", "layer 4", "only 4", "reroute"]),
    "more than the candidates": ("reroute@2:keep=37", ["layer 2", "37", "36"]),
    "no tokens": ("reroute@2:keep=0", ["layer 2 is 0", "at least 1"]),
    "negative": ("reroute@2:keep=-3", ["layer 2 is -3", "at least 1"]),
    "layer outside": ("reroute@2,6:keep=7,4", ["2,6", "6 layers", "0 to 5"]),
    "negative layer": ("reroute@-1,2:keep=7,4", ["-1,2", "0 to 5"]),
    "unsorted": ("reroute@4,2:keep=7,4", ["must ascend", "4,2"]),
    "twice": ("reroute@2,2:keep=7,4", ["must ascend", "2,2"]),
    "too few budgets": ("reroute@2,4:keep=7", ["2 decision layers but 1 budgets"]),
    "too many budgets": ("reroute@2:keep=7,4", ["1 decision layers but 2 budgets"]),
    "unknown key": ("reroute@2:kepe=7", ["unknown key 'kepe'", "did you mean 'keep'"]),
    "key twice": ("reroute@2:keep=7:keep=4", ["keep= occurs twice"]),
    "unknown action": ("rerout@2:keep=7", ["unknown routing action 'rerout'", "did you mean 'reroute'"]),
    "unknown shape": ("reroute@2,4:avg=20:shape=halfing", ["unknown shape 'halfing'", "did you mean 'halving'"]),
    "shape with budgets": ("reroute@2:keep=7:shape=uniform", ["shape=", "keep="]),
    "budgets and average": ("reroute@2:keep=7:avg=20", ["exactly one of keep=, avg=, flops= and kv="]),
    "neither": ("reroute@2:shape=uniform", ["exactly one of keep=, avg=, flops= and kv="]),
    "no options": ("reroute@2", ["incomplete"]),
    "no layers": ("reroute:keep=7", ["incomplete"]),
    "empty layers": ("reroute@:keep=7", ["'' ", "not a layer number"]),
    "empty budgets": ("reroute@2:keep=", ["''", "not a budget"]),
    "budget a word": ("reroute@2:keep=few", ["'few'", "not a budget"]),
    "layer a word": ("reroute@two:keep=7", ["'two'", "not a layer number"]),
    "division by zero": ("reroute@2:avg=1/0", ["'1/0'", "not a budget"]),
    "share above 1": ("reroute@2:keep=1.5", ["1.5", "not between 0 and 1"]),
    "dense with options": ("dense:keep=7", ["dense:keep=7"]),
    "empty": ("", ["unknown routing action ''", "dense"]),
    # (2 layers of 36 + 4 layers of at least 1) / 6
    "unreachable average": ("reroute@2:avg=1/9", ["4.00", "layer 2 of 6", "36", "12.67", "earlier", "13"]),
    "unreachable from layer 0": ("reroute@0:avg=.01", ["0.36", "1.00", "avg=1"]),
    "average too large": ("reroute@2:avg=40", ["40.00", "36", "dense"]),
    "unknown published": (
        "published:llava15/avg64/reroute",
        ["unknown published schedule 'llava15/avg64/reroute'", "did you mean 'llava15/avg64/reroute-"],
    ),
    "published for another model": ("published:llava15/avg64/pdrop", ["2,7,15,23", "6 layers"]),
}


@pytest.mark.parametrize(("spec", "says"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_spec(spec: str, says: list[str], tiny_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    refusal = refused("export", tiny_checkpoint, "-o", tmp_path / "out", "--routing", spec, says=says)
    assert refusal.stdout == ""
