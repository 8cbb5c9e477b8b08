"""Tiers from the command line: plan, inspect, run, check, bench and eval."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from reroute.bench import measure
from reroute.cli import main
from reroute.manifest import Manifest
from reroute.runtime import Bundle, Session
from tests.conftest import REPOSITORY, TINY_ROUTING, TINY_TIERS

pytest.importorskip("onnxruntime")

IMAGE = str(REPOSITORY / "demo" / "images" / "scene1.png")
ASK = ("--image", IMAGE, "--prompt", "where is the red circle ?", "--max-new-tokens", "4")
KEPT = {"7-4": [7, 4], "dense": [36, 36], "wide": [20, 9], "2/9": [3, 12]}
AVERAGES = {"7-4": 15.7, "dense": 36.0, "wide": 21.7, "2/9": 17.0}  # of 2 + 2 + 2 layers
ROUTINGS = {
    "7-4": TINY_ROUTING, "dense": "dense", "wide": "reroute@2,4:keep=20,9", "2/9": "reroute@2,4:keep=3,12",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """What a command prints on stdout."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == code
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    return json.loads(run(capsys, *args, "--json"))


def lines_of(text: str, tier: str) -> list[list[str]]:
    """The cells of the lines that begin with a tier's name."""
    return [line.split() for line in text.splitlines() if line.split()[:1] == [tier]]


def test_the_plan_has_a_line_for_each_tier(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [word for tier in TINY_TIERS for word in ("--tier", tier)]
    command = ("export", tiny_checkpoint, "--routing", TINY_ROUTING, *options, "--dry-run")
    plans = run_json(capsys, *command)["tiers"]
    text = run(capsys, *command)
    assert f"plan for {TINY_ROUTING}" in text
    assert list(plans) == list(KEPT)
    for tier, plan in plans.items():
        (cells,) = lines_of(text, tier)
        assert cells[1:3] == [ROUTINGS[tier], f"{AVERAGES[tier]:.1f}"]
        assert f"{plan['plan']['decoder_ratio']:.3f}" in cells
        assert cells[-1] == f"{plan['plan']['kv_ratio']:.3f}"
        assert plan["routing"] == ROUTINGS[tier]
    assert plans["dense"]["plan"]["kv_ratio"] == 1
    assert 1 < plans["dense"]["plan"]["decoder_ratio"] < 1.005  # scoring
    assert "all, all" in text


def test_inspect_shows_the_tiers(tiered_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "inspect", tiered_bundle)
    for tier, average in AVERAGES.items():
        assert lines_of(text, tier)[0][1:3] == [ROUTINGS[tier], f"{average:.1f}"]
    assert "tiers" in text
    assert "tiers" not in run(capsys, "inspect", tiny_bundle)
    assert list(run_json(capsys, "inspect", tiered_bundle)["tiers"]) == list(KEPT)


@pytest.mark.parametrize("tier", [None, "dense", "2/9"])
def test_run_asks_in_a_tier(tier: str | None, tiered_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "run", tiered_bundle, *ASK, *(("--tier", tier) if tier else ()))
    assert result["tier"] == (tier or "7-4")
    assert result["turns"][0]["routes"] == KEPT[tier or "7-4"]


def test_run_without_tiers_does_not_mention_them(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tier" not in run_json(capsys, "run", tiny_bundle, *ASK)


def test_an_interactive_dialogue_changes_its_tier(
    tiered_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = f"/image {IMAGE}\nwhere is the red circle ?\n"
    answers = []
    for typed in (f"{question}/tier dense\n/tier none\n{question}", f"/tier dense\n{question}", question):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        assert main(["run", str(tiered_bundle), "--interactive", "--max-new-tokens", "12"]) == 0
        out, err = capsys.readouterr()
        answers.append(out.splitlines())
        assert ("unknown tier 'none'" in err) is ("none" in typed)
    both, dense, default = answers
    assert both == [*default, *dense]
    assert default != dense


def test_a_page_of_a_tier_says_its_routing(
    tiered_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "run", tiered_bundle, *ASK, "--tier", "wide", "--picture", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert ROUTINGS["wide"] in page
    assert "20 of 36 tokens ran" in page


def test_check_has_rows_for_each_tier(
    tiered_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_json(capsys, "check", tiered_bundle)["rows"]
    assert list(dict.fromkeys(row["tier"] for row in rows)) == list(KEPT)
    text = run(capsys, "check", tiered_bundle, "--tier", "2/9")
    assert len(lines_of(text, "2/9")) == len(rows) // 4
    assert not lines_of(text, "dense")
    assert all("tier" not in row for row in run_json(capsys, "check", tiny_bundle)["rows"])
    assert "tier" not in run(capsys, "check", tiny_bundle)


def test_bench_measures_every_tier_on_one_engine(
    tiered_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Bundle] = []
    open_backend = measure.open_backend
    monkeypatch.setattr(measure, "open_backend", lambda *args: opened.append(args[0]) or open_backend(*args))
    monkeypatch.setattr(measure, "MEMORY_RUNS", 1)
    settings = ("--text", "9", "--tokens", "2", "--warmup", "1", "--repeat", "3")
    data = run_json(capsys, "bench", tiered_bundle, *settings)
    assert len(opened) == 1
    manifest = Manifest.load(tiered_bundle)
    assert [one["name"] for one in data["candidates"]] == list(ROUTINGS.values())
    row = 2 * 2 * 16 * 4
    for one, (tier, kept) in zip(data["candidates"], KEPT.items(), strict=True):
        assert one["average_visual_tokens"] == pytest.approx(AVERAGES[tier], abs=0.05)
        assert one["memory"]["cache_bytes"] == row * 2 * sum(manifest.tiers[tier].cache_rows)
        graphs = [tiered_bundle / f"{part}.onnx{end}" for part in ("decoder", "vision") for end in ("", ".data")]
        assert one["memory"]["weight_bytes"] == sum(path.stat().st_size for path in graphs)
        (cell,) = [cell for cell in data["cells"] if cell["candidate"] == one["name"]]
        assert cell["kv_bytes"] == row * 2 * (3 * 9 + 36 + sum(kept))
        assert {len(samples) for samples in cell["samples"].values()} == {3}
    assert [one["action"] for one in data["candidates"]] == ["reroute", "dense", "reroute", "reroute"]
    assert data["statistics"]["speedup_over"] == "dense"


def test_eval_scores_every_tier_on_one_engine(
    tiered_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    open_session = Session.open
    monkeypatch.setattr(Session, "open", lambda *args, **options: opened.append(args) or open_session(*args, **options))
    questions = ("--grounding", "2", "--vqa", "2")
    bundles = run_json(capsys, "eval", tiered_bundle, *questions)["bundles"]
    assert len(opened) == 1
    assert [one["name"] for one in bundles] == list(ROUTINGS.values())
    for one, kept in zip(bundles, KEPT.values(), strict=True):
        assert one["measured"]["visual_tokens_per_stage"] == [36, *kept]
        assert [decision["kept"] for decision in one["decisions"]] == kept
    assert [one.get("agreement", {}).get("with") for one in bundles] == ["dense", None, "dense", "dense"]
    (alone,) = run_json(capsys, "eval", tiny_bundle, *questions)["bundles"]
    assert alone["records"] == bundles[0]["records"]
    (wide,) = run_json(capsys, "eval", tiered_bundle, *questions, "--tier", "wide")["bundles"]
    assert wide["records"] == bundles[2]["records"]
