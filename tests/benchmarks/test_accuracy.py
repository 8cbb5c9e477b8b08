"""The accuracy benchmark: what it asks for, and that README and docs show what its JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule
from tests.conftest import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


def resolved(routing: str, layers: int) -> Schedule:
    return RoutingSpec.parse(routing).resolve(num_layers=layers, num_visual=576)


@pytest.mark.parametrize(("published", "layers"), [(False, 24), (True, 32)])
def test_the_table_has_every_method_twice_at_every_tier(published: bool, layers: int) -> None:
    cases = accuracy.table_cases(published=published)
    assert len({(case.method, case.action, case.tier) for case in cases}) == len(cases) == 19
    for case in cases:
        schedule = resolved(case.routing, layers)
        assert schedule.action == case.action
        assert (schedule.nuwa is not None) == (case.method == "nuwa")
        if case.tier and not published:
            wanted = {"1/3": 192, "2/9": 128, "1/9": 64}[case.tier]
            assert wanted - 0.5 < schedule.average_visual_tokens(576) <= wanted


def test_every_case_of_the_ablation_fits_the_demo_model() -> None:
    cases = accuracy.ablation_cases()
    assert all(resolved(case.routing, 24).num_layers == 24 for case in cases)
    assert {case.method.partition(":")[0] for case in cases} == {
        "reference",
        "decision layers",
        "shape",
        "scoring",
        "positions",
    }


def rows_in(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]


def test_the_readme_shows_the_table_of_the_json() -> None:
    assert accuracy.table(rows_in("accuracy.json")) in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_ablation_page_shows_the_table_of_the_json() -> None:
    page = (REPOSITORY / "docs" / "ablation.md").read_text(encoding="utf-8")
    assert accuracy.ablation_table(rows_in("accuracy-ablation.json")) in page


def test_the_rows_say_what_a_reader_of_the_json_needs() -> None:
    for row in rows_in("accuracy.json"):
        assert row["method"] in ("dense", "fastv", "pdrop", "nuwa")
        assert row["action"] in ("dense", "removal", "reroute")
        for skill in ("grounding", "vqa"):
            low, high = row[f"{skill}_interval"]
            assert 0 <= low <= row[skill] <= high <= 1
        assert row["measured_visual_tokens"] == pytest.approx(row["average_visual_tokens"])


def test_a_gain_is_first_minus_second_whichever_way_it_was_counted() -> None:
    estimate = {"value": 0.25, "low": 0.2, "high": 0.4}
    pair = {("a", "b"): {"grounding": {"accuracy": estimate}}}
    assert accuracy.difference(pair, "a", "b") == {"grounding": 0.25, "grounding_interval": [0.2, 0.4]}
    assert accuracy.difference(pair, "b", "a") == {"grounding": -0.25, "grounding_interval": [-0.4, -0.2]}


def test_large_models_are_built_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles beside each other only as long as their files together stay within the runner's limit."""
    alive: list[int] = []

    class Large:
        def __init__(self, folder: Path) -> None:
            self.folder = folder
            file = type("File", (), {"bytes": accuracy.TOGETHER_BYTES})
            self.manifest = type("Manifest", (), {"files": {"decoder.onnx.data": file}})

    def make(checkpoint: Path, routing: str, folder: Path) -> Large:
        del checkpoint, routing
        folder.mkdir()
        return Large(folder)

    def ask(bundles: list[Large], questions: Any, **_: Any) -> list[Any]:
        del questions
        alive.append(len(bundles))
        assert all(bundle.folder.is_dir() for bundle in bundles)
        return list(bundles)

    monkeypatch.setattr(accuracy, "make_bundle", make)
    monkeypatch.setattr(accuracy, "run_bundles", ask)
    questions: Any = []
    runs: list[Any] = accuracy.run_cases(Path("model"), accuracy.table_cases()[:3], questions, None)
    assert alive == [1, 1, 1]
    assert not any(run.folder.exists() for run in runs)
