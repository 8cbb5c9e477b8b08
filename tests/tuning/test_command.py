"""`reroute tune` as a user meets it: once for real on a tiny checkpoint, and with a landscape in the device's place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reroute.cli import main
from reroute.evaluation.scenes import SceneSet
from reroute.manifest import Manifest
from reroute.runtime import Session
from reroute.tuning import command
from reroute.tuning.budgets import split
from tests.tuning.fakes import FakeDevice

FEW = ["--grounding", "8", "--vqa", "8"]
SMALL = ["--methods", "reroute,removal", "--layers", "2,4", "--averages", "1/2,2/5", *FEW]
ROUTED, REMOVED = "reroute@2,4:avg=1/2", "removal@2,4:avg=1/2"


def tune(*args: object) -> int:
    return main(["tune", *map(str, args)])


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real search: the bound on KV bytes leaves dense and one schedule. Do not change it."""
    folder = tmp_path_factory.mktemp("tune") / "out"
    file = folder.parent / "space.toml"
    file.write_text(f'[space]\nspecs = ["{ROUTED}", "reroute@2,4:avg=18", "reroute@2,4:avg=5/6"]\n')
    bounds = ("--speedup", "0.01", "--kv-mib", "0.06", "--end-to-end-ms", "1e6")
    measured = ("--text", "20", "--tokens", "2", "--warmup", "0", "--repeat", "2", "--threads", "1")
    assert tune(tiny_checkpoint, "-o", folder, "--space", file, *bounds, *measured, *FEW, "--keep-bundle") == 0
    file.unlink()
    return folder


@pytest.fixture
def data(output: Path) -> dict[str, Any]:
    return json.loads((output / "tune.json").read_text(encoding="utf-8"))


def test_the_output_is_whole_and_nothing_else_is_left(output: Path):
    assert sorted(path.name for path in output.iterdir()) == ["bundle", "routing.toml", "tune.json", "tune.md"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_trace_says_what_was_done(data: dict[str, Any], output: Path):
    dense, routed, large = data["candidates"]
    assert (dense["name"], routed["name"], large["name"]) == ("dense", ROUTED, "reroute@2,4:avg=5/6")
    assert routed["also"] == ["reroute@2,4:avg=18"]
    assert [one["status"] for one in data["candidates"]] == ["pruned", "winner", "pruned"]
    assert routed["plan"]["average_visual_tokens"] == pytest.approx(18.0, abs=0.5)
    assert routed["plan"]["kv_bytes"] <= 0.06 * 2**20 < large["plan"]["kv_bytes"]
    for one in (dense, routed):
        assert {len(values) for values in one["latency"]["samples"].values()} == {2}
        assert set(one["latency"]["samples"]) == {"vision_ms", "prefill_ms", "decode_ms", "end_to_end_ms"}
    assert data["settings"]["text"] == 20
    assert data["machine"]["fingerprint"]
    assert data["versions"].keys() >= {"reroute", "torch", "onnxruntime"}
    text = (output / "tune.json").read_text(encoding="utf-8")
    assert str(output.parent) not in text


def test_scores_are_answers_of_the_kept_bundle_to_validation_scenes(data: dict[str, Any], output: Path):
    asked = SceneSet(grounding=8, vqa=8, split="validation")
    assert data["questions"]["set"] == asked.name
    assert "validation" in asked.name
    parts = split(asked, seed=0)
    assert data["questions"]["search"] == [question.id for question in parts.search]
    assert data["questions"]["fresh"] == [question.id for question in parts.fresh]
    with Session.open(output / "bundle") as session:
        scores = []
        for question in (*parts.search, *parts.fresh):
            session.reset()
            answer = session.ask(question.prompt, asked.image(question.image), max_new_tokens=6)
            scores.append(asked.grade(question, answer.text.strip()).score)
    winner = data["candidates"][1]
    assert winner["scores"] + winner["fresh_scores"] == scores
    assert len(data["candidates"][0]["fresh_scores"]) == len(parts.fresh)


def test_export_takes_the_winner_and_makes_the_same(
    output: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    kept = Manifest.load(output / "bundle")
    assert kept.check is not None
    assert kept.check["passed"]
    assert main(["export", str(tiny_checkpoint), "--routing", str(output / "routing.toml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["routing"] == kept.routing == ROUTED
    assert [stage["budget"] for stage in plan["plan"]["stages"]] == [stage.keep for stage in kept.schedule.stages]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDevice], FakeDevice]:
    """Puts a landscape in the place of the real device."""

    def put(device: FakeDevice) -> FakeDevice:
        monkeypatch.setattr(command, "Workshop", lambda *_, **__: device)
        return device

    return put


def latency(name: str) -> float:
    return {"dense": 40.0, ROUTED: 22.0, REMOVED: 20.0}.get(name, 15.0)


def right(name: str) -> float:
    return {"dense": 1.0, ROUTED: 0.9}.get(name, 0.1)


def test_markdown_is_the_standard_output_and_the_log_is_not(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    fake(FakeDevice(latency, right))
    assert tune(tiny_checkpoint, "-o", tmp_path / "out", "--prefill-ms", 25, *SMALL) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out" / "tune.md").read_text(encoding="utf-8")
    assert f"**Best: `{ROUTED}`**" in out
    assert "[2/5]" in err
    assert "next: reroute export" in err
    assert (tmp_path / "out" / "routing.toml").read_text() == (
        '[routing]\naction = "reroute"\nlayers = [2, 4]\navg = "1/2"\n'
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["routing.toml", "tune.json", "tune.md"]


def test_json_is_the_file(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    fake(FakeDevice(latency, right))
    assert tune(tiny_checkpoint, "-o", tmp_path / "out", "--prefill-ms", 25, *SMALL, "--json") == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "tune.json").read_text(encoding="utf-8")


def test_no_candidate_is_exit_code_3_with_the_nearest_and_the_trace(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    fake(FakeDevice(latency, right))
    args = (tiny_checkpoint, "-o", tmp_path / "out", "--prefill-ms", 12, *SMALL)
    assert tune(*args) == 3
    out, err = capsys.readouterr()
    assert "**No candidate keeps the bound.**" in out
    assert re.search(r"prefill 15 ms.* > 12 ms, missed by a factor of 1\.25", err)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tune.json", "tune.md"]
    assert tune(*args) == 2
    assert tune(*args, "--force") == 3


def test_what_was_not_tried_is_not_said_to_miss_the_bound(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    fake(FakeDevice(latency, right))
    args = ("-o", tmp_path / "out", "--prefill-ms", 12, *SMALL, "--budget-minutes", 1e-6)
    assert tune(tiny_checkpoint, *args) == 3
    out, err = capsys.readouterr()
    assert "no candidate of those tried keeps the bound, 3 were not tried for lack of time" in err
    assert "(3 were not tried for lack of time.)" in out


def test_bounds_that_no_plan_keeps_build_nothing(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    device = fake(FakeDevice(latency, right))
    assert tune(tiny_checkpoint, "-o", tmp_path / "out", "--kv-mib", 0.01, *SMALL) == 3
    assert device.built == []
    assert (tmp_path / "out" / "tune.json").is_file()
    assert "the nearest is reroute@2,4:avg=2/5: KV" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["build", "load", "ask"])
def test_an_interrupt_leaves_nothing(
    where: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    fake: Callable[[FakeDevice], FakeDevice],
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    device = fake(FakeDevice(latency, right))
    monkeypatch.setattr(device, where, interrupt)
    assert tune(tiny_checkpoint, "-o", tmp_path / "out", "--prefill-ms", 25, *SMALL) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_space_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, fake: Callable[[FakeDevice], FakeDevice], capsys: pytest.CaptureFixture[str]
):
    device = fake(FakeDevice(latency, right))
    args = (tiny_checkpoint, "-o", tmp_path / "out", "--kv-mib", 0.13, *SMALL, "--shapes", "own,halving", "--dry-run")
    assert tune(*args) == 0
    out = capsys.readouterr().out
    assert "search space under: KV at most 133 KiB" in out
    assert "pruned: KV" in out
    assert "to be tried" in out
    assert "4 to build and measure beside dense" in out
    assert tune(*args, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["candidates"]}
    assert rows["dense"]["status"] == "pruned"
    assert rows[ROUTED]["also"] == [f"{ROUTED}:shape=halving"]
    assert rows[ROUTED]["plan"]["decoder_ratio"] < 1
    assert device.built == []
    assert list(tmp_path.iterdir()) == []
    assert tune(tiny_checkpoint, "--kv-mib", 0.01, *SMALL, "--dry-run") == 3


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["-o", "{out}"], "tune needs a bound", "--prefill-ms"),
        (["--speedup", "3"], "tune needs -o DIR", "--dry-run"),
        (["-o", "{out}", "--speedup", "0"], "the bound on prefill speed is 0", "above 0"),
        (["-o", "{out}", "--kv-mib", "-2"], "the bound on KV is -2", "above 0"),
        (["-o", "{out}", "--speedup", "fast"], "argument --speedup", "--help"),
        (["-o", "{out}", "--speedup", "3", "--methods", "fastw"], "unknown method 'fastw'", "did you mean 'fastv'"),
        (["-o", "{out}", "--speedup", "3", "--methods", "reroute"], "no decision layers of their own", "--layers"),
        (["-o", "{out}", "--speedup", "3", "--averages", "0.001"], "none of the 6 specs", "averages"),
        (["-o", "{out}", "--speedup", "3", "--shapes", "flat"], "unknown shape 'flat'", "uniform"),
        (["-o", "{out}", "--speedup", "3", "--layers", "2,x"], "'x' in", "the form is"),
        (["-o", "{out}", "--speedup", "3", "--space", "nowhere.toml"], "cannot read the search space", "tuning.md"),
        (["-o", "{out}", "--speedup", "3", "--space", "a", "--methods", "fastv"], "--methods has no meaning", "leave"),
        (["-o", "{out}", "--speedup", "3", "--split", "heldout"], "validation scenes only", "reroute eval"),
        (["-o", "{out}", "--speedup", "3", "--set", "pope"], "--set pope needs --data", "nothing is downloaded"),
        (["-o", "{out}", "--speedup", "3", "--set", "pope", "--vqa", "5"], "--vqa has no meaning", "leave it out"),
        (["-o", "{out}", "--speedup", "3", "--grounding", "1", "--vqa", "0"], "about 1 image", "more questions"),
        (["-o", "{out}", "--speedup", "3", *FEW, "--questions", "12"], "a first round of 12 questions", "--questions"),
        (["-o", "{out}", "--speedup", "3", "--budget-minutes", "0"], "not a number of minutes above 0", "--help"),
        (["-o", "{out}", "--speedup", "3", "--budget-minutes", "1", "--questions", "9"], "not allowed with", "--help"),
        (["-o", "{out}", "--speedup", "3", "--text", "500", "--tokens", "50"], "500 text tokens and 50", "--max-text"),
        (["-o", "{out}", "--speedup", "3", "--provider", "gpu"], "unknown provider 'gpu'", "cpu"),
        (["-o", "{here}", "--speedup", "3"], "is not an earlier output of this command", "another output"),
        (["--dry-run", "--keep-bundle", "--speedup", "3"], "--keep-bundle has no meaning with --dry-run", "leave"),
    ],
)
def test_bad_input_is_one_error_with_a_hint(
    args: list[str],
    message: str,
    hint: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    fake: Callable[[FakeDevice], FakeDevice],
    capsys: pytest.CaptureFixture[str],
):
    device = fake(FakeDevice(latency, right))
    (tmp_path / "mine.txt").write_text("mine")
    assert tune(tiny_checkpoint, *(arg.format(out=tmp_path / "out", here=tmp_path) for arg in args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, blank, advice = err.rstrip("\n").split("\n")
    assert error.startswith("error: ")
    assert message in error
    assert blank == ""
    assert hint in advice
    assert device.built == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tune(tmp_path / "nowhere", "-o", tmp_path / "out", "--speedup", "3") == 2
    assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    code = "import sys; from reroute.cli import main\ntry: main(['tune', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'PIL', 'tokenizers', 'onnxruntime', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
