"""Equal files of several bundles are one file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reroute.bench.workload import Shape
from reroute.cost import Plan, plan_for
from reroute.manifest import Capacity, Manifest
from reroute.runtime import Bundle
from reroute.tuning import workshop
from reroute.tuning.workshop import Workshop
from tests.tuning.fakes import PlainSet


def test_an_equal_file_becomes_a_link_and_removing_one_leaves_the_other(tmp_path: Path):
    first, second = tmp_path / "a" / "weights", tmp_path / "b" / "weights"
    for path in (first, second):
        path.parent.mkdir()
        path.write_bytes(b"weights")
    workshop._share(second, first)
    assert first.stat().st_ino == second.stat().st_ino
    assert [path.name for path in second.parent.iterdir()] == ["weights"]
    first.unlink()
    assert second.read_bytes() == b"weights"


def test_without_links_it_stays_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"weights")
    workshop._share(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert len(list(tmp_path.iterdir())) == 2


def loaded(bundle: Path, plan: Plan) -> Workshop:
    """A workshop that has a bundle which others built."""
    made = Workshop(
        bundle, bundle, {"a": plan}, PlainSet(6), shape=Shape(text=20, images=1, tokens=2), capacity=Capacity()
    )
    made._bundles["a"] = Bundle.open(bundle)
    return made


def measured(made: Workshop) -> dict:
    with made.load(["a"]) as run:
        return dict(run(["a"], warmup=1, rounds=3, seed=0, advance=lambda: None))


def test_samples_are_those_of_the_rounds_that_count(tiny_bundle: Path):
    manifest = Manifest.load(tiny_bundle)
    plan = plan_for(manifest.model, manifest.schedule, manifest.capacity, num_text=20)
    samples = measured(loaded(tiny_bundle, plan))["a"]
    assert {len(values) for values in samples.values()} == {3}


def test_a_plan_that_is_wrong_about_kv_bytes_is_a_defect(tiny_bundle: Path):
    manifest = Manifest.load(tiny_bundle)
    plan = plan_for(manifest.model, manifest.schedule, manifest.capacity, num_text=21)
    with pytest.raises(RuntimeError, match="its plan says"):
        measured(loaded(tiny_bundle, plan))
