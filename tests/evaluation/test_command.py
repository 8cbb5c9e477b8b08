"""`reroute eval` as a user meets it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reroute import report
from reroute.cli import main
from reroute.evaluation.command import to_json
from reroute.evaluation.scenes import SceneSet
from reroute.runtime import Session
from tests.test_import_rules import PACKAGE, breaks, imports_of_file

FEW = ["--grounding", "9", "--vqa", "5"]


def evaluate(*args: object) -> int:
    return main(["eval", *map(str, args)])


@pytest.fixture(scope="module")
def output(demo_bundle: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them twice, on a few questions. Do not change it."""
    folder = tmp_path_factory.mktemp("eval")
    shutil.copytree(demo_bundle, folder / "copy")
    assert evaluate(demo_bundle, folder / "copy", tiny_bundle, *FEW, "-o", folder / "out") == 0
    return folder / "out"


@pytest.fixture
def result(output: Path) -> dict:
    return json.loads((output / "eval.json").read_text(encoding="utf-8"))


def test_the_output_has_both_forms(output: Path, result: dict):
    assert sorted(path.name for path in output.iterdir()) == ["eval.json", "eval.md"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["copy", "out"]
    assert (result["kind"], result["schema_version"]) == ("evaluation", 1)
    assert result["questions"]["grounding"] == 9
    assert result["questions"]["vqa"] == 5
    assert re.fullmatch(r"[0-9a-f]{64}", result["questions"]["sha256"])
    assert result["versions"].keys() >= {"reroute", "python", "numpy"}
    assert result["run"].keys() == {"date", "seconds", "machine", "threads"}
    markdown = (output / "eval.md").read_text(encoding="utf-8")
    for row in result["bundles"]:
        assert f"`{row['name']}`" in markdown


def test_every_bundle_says_what_it_is_and_what_it_cost(result: dict, demo_bundle: Path):
    first = result["bundles"][0]
    manifest = json.loads((demo_bundle / "reroute.json").read_text(encoding="utf-8"))
    assert first["routing"] == manifest["routing"]
    assert first["checkpoint_sha256"] == manifest["checkpoint_sha256"]
    assert first["versions"] == manifest["versions"]
    assert first["engine"]["engine"] == "ONNX Runtime"
    assert first["measured"]["visual_tokens_per_layer"] == pytest.approx(manifest["average_visual_tokens"])
    assert first["measured"]["kv_bytes"] > 0
    assert len({row["name"] for row in result["bundles"]}) == 3


def test_records_are_complete_and_in_order(result: dict):
    asked = list(SceneSet(grounding=9, vqa=5))
    for row in result["bundles"]:
        assert [record["id"] for record in row["records"]] == [question.id for question in asked]
        layers = [decision["layer"] for decision in row["decisions"] if decision["layer"] is not None]
        for record, question in zip(row["records"], asked, strict=True):
            assert [decision["layer"] for decision in record["decisions"]] == layers
            assert (record["iou"] is not None) == (record["skill"] == "grounding")
            shares = [decision["share"] for decision in record["decisions"]]
            assert all(share is None for share in shares) == (question.box is None)
            assert 0 <= record["score"] <= 1


def test_the_demo_model_knows_where_things_are_and_the_random_one_does_not(result: dict):
    demo, _, random = (row["scores"]["grounding"]["accuracy"]["value"] for row in result["bundles"])
    assert demo > 0.5
    assert random < 0.5


def test_a_copy_answers_alike(result: dict):
    demo, copy, _ = result["bundles"]
    assert demo["records"] == copy["records"]
    same = next(row for row in result["differences"] if (row["first"], row["second"]) == (demo["name"], copy["name"]))
    assert same["grounding"]["mean_iou"] == {"value": 0.0, "low": 0.0, "high": 0.0, "questions": 9, "images": 2}
    assert len(result["differences"]) == 3


def test_answers_are_those_of_a_session(result: dict, demo_bundle: Path):
    questions = SceneSet(grounding=9, vqa=5)
    with Session.open(demo_bundle) as session:
        for question, record in zip(questions, result["bundles"][0]["records"], strict=True):
            session.reset()
            answer = session.ask(question.prompt, questions.image(question.image), max_new_tokens=6)
            assert answer.text.strip() == record["answer"]
            assert [len(route) for route in answer.routes] == [d["kept"] for d in record["decisions"]]


def test_two_runs_are_equal(
    result: dict, demo_bundle: Path, tiny_bundle: Path, output: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(demo_bundle, output.parent / "copy", tiny_bundle, *FEW, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("run") != {}
    assert again == {key: value for key, value in result.items() if key != "run"}


def test_markdown_is_the_standard_output_and_nothing_else(demo_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate(demo_bundle, "--grounding", 1, "--vqa", 0) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# scenes/heldout, seed 0, 3 to 7 objects\n")
    assert "## Grounding" in out
    assert err == ""


def test_an_earlier_output_is_replaced_only_by_force(demo_bundle: Path, tmp_path: Path):
    one = [demo_bundle, "--grounding", 1, "--vqa", 0, "-o", tmp_path / "out"]
    assert evaluate(*one) == 0
    before = (tmp_path / "out" / "eval.json").stat().st_mtime_ns
    assert evaluate(*one) == 2
    assert (tmp_path / "out" / "eval.json").stat().st_mtime_ns == before
    assert evaluate(*one, "--force") == 0
    assert (tmp_path / "out" / "eval.json").stat().st_mtime_ns != before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert evaluate(*one, "--force") == 2
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ([], "BUNDLE", "--help"),
        (["{bundle}", "{real}"], "is given twice", "once"),
        (["nowhere"], "there is no folder nowhere", "reroute build"),
        (["{empty}"], "holds no reroute.json", "reroute build"),
        (["{bundle}", "--set", "refcocoo"], "unknown question set 'refcocoo'", "did you mean 'refcoco'"),
        (["{bundle}", "--set", "pope"], "--set pope needs --data", "nothing is downloaded"),
        (["{bundle}", "--set", "pope", "--data", "nowhere"], "there is no nowhere", "--data"),
        (["{bundle}", "--set", "pope", "--data", "{empty}", "--images", "no"], "no is not a folder", "--images"),
        (["{bundle}", "--set", "pope", "--data", "{empty}", "--vqa", "5"], "--vqa has no meaning", "leave it out"),
        (["{bundle}", "--data", "{empty}"], "--data has no meaning with --set scenes", "pope"),
        (["{bundle}", "--dataset-split", "val"], "--dataset-split has no meaning", "leave it out"),
        (["{bundle}", "--split", "train"], "unknown split 'train'", "heldout, validation"),
        (["{bundle}", "--grounding", "0", "--vqa", "0"], "nothing to ask", "at least one"),
        (["{bundle}", "--grounding", "-3"], "-3 grounding questions are impossible", "0 to"),
        (["{bundle}", "--objects", "many"], "'many' is not a range", "3-7"),
        (["{bundle}", "--objects", "7-3"], "scenes of 7 to 3 objects", "3-7"),
        (["{bundle}", "--threads", "0"], "0 is less than 1", "--help"),
        (["{bundle}", "-o", "{empty}/.."], "is not an earlier output of this command", "another output"),
    ],
)
def test_bad_input_is_one_error_with_a_hint(
    args: list[str],
    message: str,
    hint: str,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    places = {"bundle": tmp_path / "bundle", "real": tiny_bundle, "empty": tmp_path / "empty"}
    assert evaluate(*(arg.format(**places) for arg in args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, blank, advice = err.rstrip("\n").split("\n")
    assert error.startswith("error: ")
    assert message in error
    assert blank == ""
    assert hint in advice


def test_records_stand_on_lines_of_their_own():
    document = {"bundles": [{"name": '"@1@"', "records": [{"id": "@0@"}, {"id": "b"}]}, {"records": []}], "run": {}}
    text = to_json(document)
    assert json.loads(text) == document
    assert '\n        {"id": "@0@"},\n        {"id": "b"}\n' in text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with report.progress(3, "answers") as advance:
        for _ in range(3):
            advance()
    assert ("3/3" in stream.getvalue()) == terminal
    assert terminal or stream.getvalue() == ""


def test_help_imports_nothing_heavy():
    code = "import sys; from reroute.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'PIL', 'tokenizers', 'onnxruntime', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_evaluation_lives_without_torch():
    forbidden = {"torch", "transformers", "onnx", "onnxscript", "safetensors", "polygraphy"}
    files = sorted((PACKAGE / "evaluation").rglob("*.py"))
    assert files
    for path in files:
        assert breaks(imports_of_file(path, "evaluation"), forbidden | {"reroute.export", "reroute.engines"}) == set()
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in files
    ]
    code = "import importlib, sys\n"
    code += f"sys.modules.update(dict.fromkeys({sorted(forbidden)!r}))\n"  # None: the import fails
    code += f"[importlib.import_module(name) for name in {modules!r}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
