"""Tiers that cannot share a graph, and tiers that a bundle does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.conftest import Refused
from tests.conftest import TINY_ROUTING

CANNOT_SHARE = {
    "other layers": (["reroute@2,3:keep=9,9"], ["'7-4' and '9-9' differ in decision layers (2,4 and 2,3)", "avg="]),
    "another action": (["wide=removal@2,4:keep=20,9"], ["'7-4' and 'wide' differ in action (reroute and removal)"]),
    "another scoring": (["x=reroute@2,4:keep=9,9:score=previous"], ["differ in score (own and previous)"]),
    "two of one name": (["a=dense", "a=reroute@2,4:keep=9,9"], ["two tiers have the name 'a'", "NAME=SPEC"]),
    "the same twice": (["again=reroute@2,4:keep=7,4"], ["'7-4' and 'again' are the same schedule"]),
    "a name with a space": (["a b=dense"], ["'a b'", "is no name"]),
    "no spec": (["a="], ["the tier 'a' has no routing spec", "NAME=SPEC"]),
    "a spec that is none": (["reroute@2,4:keeep=1,1"], ["unknown key 'keeep'", "did you mean 'keep'"]),
    "too many tokens": (["reroute@2,4:keep=40,4"], ["40 tokens, but there are 36"]),
}


@pytest.mark.parametrize(("tiers", "says"), [pytest.param(*case, id=name) for name, case in CANNOT_SHARE.items()])
def test_export(tiers: list[str], says: list[str], tiny_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    options = [word for tier in tiers for word in ("--tier", tier)]
    found = refused("export", tiny_checkpoint, "-o", tmp_path / "out", "--routing", TINY_ROUTING, *options, says=says)
    assert found.stdout == ""


def test_dense_with_a_vision_stage(tiny_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    routing = ("--routing", "reroute@2,4:nuwa=12:keep=5,3", "--tier", "dense")
    says = ["the tier 'dense' would be dense", "lets 12 tokens out", "as a bundle of its own"]
    refused("export", tiny_checkpoint, "-o", tmp_path / "out", *routing, says=says)


def test_tensorrt(tiered_export: Path, tmp_path: Path, refused: Refused) -> None:
    target = ("--backend", "tensorrt", "--target", "orin-jp6", "--onnx-only")
    says = ["4 tiers (7-4, dense, wide, 2/9)", "fixed in a TensorRT engine", "export one of them without --tier"]
    refused("build", tiered_export, *target, "-o", tmp_path / "out", says=says)


UNKNOWN = {
    "run": ["--prompt", "what is there ?"],
    "check": [],
    "eval": ["--grounding", "1", "--vqa", "1"],
}


@pytest.mark.parametrize("command", UNKNOWN)
def test_a_tier_that_the_bundle_does_not_have(command: str, tiered_bundle: Path, refused: Refused) -> None:
    says = ["unknown tier 'wid'", "did you mean 'wide'? supported: 2/9, 7-4, dense, wide"]
    refused(command, tiered_bundle, *UNKNOWN[command], "--tier", "wid", says=says)


@pytest.mark.parametrize("command", UNKNOWN)
def test_a_bundle_without_tiers(command: str, tiny_bundle: Path, refused: Refused) -> None:
    says = ["there is no tier 'dense': reroute@2,4:keep=7,4 is all", "export with --tier SPEC"]
    refused(command, tiny_bundle, *UNKNOWN[command], "--tier", "dense", says=says)
