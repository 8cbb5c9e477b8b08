"""The command line: what it prints where, what it imports, and how it exits."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reroute import __version__, commands, dialogue, report
from reroute.boxes import iou
from reroute.cli import build_parser, main
from reroute.doctor import COMMANDS, cpu_features, l4t_version, usable_commands
from reroute.errors import GateError, UserError
from tests.conftest import REPOSITORY
from tests.test_manifest import manifest_of

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "tokenizers", "jinja2", "PIL")


def reroute(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "reroute.cli", *args],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def assert_error(text: str, message: str, hint: str) -> None:
    """`error: ...`, a blank line, `hint: ...`, and nothing else."""
    lines = text.rstrip("\n").split("\n")
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1] == ""
    assert lines[2].startswith("hint: ")
    assert hint in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"], ["doctor"]])
def test_help_and_doctor_import_nothing_heavy(args: list[str]):
    code = f"""
import sys
from reroute.cli import main
try:
    code = main({args!r})
except SystemExit as leave:
    code = leave.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else code or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        before = os.times()
        reroute("--help")
        after = os.times()
        # Processor time: what else the machine does is not the command's fault.
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(used)
    assert 0 < min(seconds) < 0.3


def test_help_names_every_command():
    text = reroute("--help").stdout
    for name in ("export", "build", "run", "check", "eval", "bench", "compare", "inspect", "doctor"):
        assert f"\n    {name} " in text


def test_version_is_the_packages():
    done = reroute("--version")
    assert done.stdout == f"reroute {__version__}\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ([], "required: COMMAND", "reroute --help"),
        (["exprot"], "invalid choice: 'exprot'", "reroute --help"),
        (["export"], "required: CHECKPOINT, --routing", "reroute export --help"),
        (["export", "x", "--routing", "dense"], "export needs -o DIR", "--dry-run"),
        (
            ["export", "x", "--routing", "rerout@2", "--dry-run"],
            "unknown routing action 'rerout'",
            "'reroute'",
        ),
        (["export", "x", "--routing", "dense", "-o", "y", "--max-text", "0"], "0 is less than 1", "--help"),
        (
            ["export", "x", "--routing", "dense", "-o", "y", "--max-text", "many"],
            "'many' is not a whole",
            "--help",
        ),
        (["export", "no-such-folder", "--routing", "dense", "--dry-run"], "no-such-folder", "checkpoint"),
        (["build", "no-such-folder"], "no-such-folder does not exist", "export"),
        (["check", "no-such-folder"], "no-such-folder does not exist", "bundle"),
        (["inspect", "no-such-folder"], "no-such-folder does not exist", "bundle"),
        (["run", "x"], "nothing to ask", "--prompt"),
        (["run", "x", "--image", "a.png"], "the image a.png has no question", "--prompt"),
        (["run", "x", "--prompt", "q", "--picture", "p.png"], "--picture needs an image", "--image"),
        (["run", "x", "--interactive", "--prompt", "q"], "--interactive reads its own turns", "--prompt"),
        (["run", "no-such-folder", "--prompt", "q"], "no folder no-such-folder", "reroute build"),
        (["run", "x", "--prompt", "q", "--temperature", "-1"], "the temperature is -1.0", "0 is greedy"),
        (["run", "x", "--prompt", "q", "--max-new", "3"], "unrecognized arguments: --max-new 3", "--help"),
    ],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str, hint: str):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_error(err, message, hint)


def test_errors_have_the_same_form_from_a_process():
    done = reroute("inspect", "no-such-folder")
    assert done.returncode == 2
    assert done.stdout == ""
    assert_error(done.stderr, "no-such-folder", "folder")


@pytest.mark.parametrize("args", [["--debug", "inspect", "nowhere"], ["inspect", "--debug", "nowhere"]])
def test_debug_shows_the_traceback_on_either_side_of_the_command(args: list[str]):
    done = reroute(*args)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("bad input", hint="mend it"), 2, "error: bad input\n\nhint: mend it\n"),
        (GateError("gate failed"), 3, "error: gate failed\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "error: this command needs torch, which is not installed\n\nhint: `reroute doctor` says what to install\n",
        ),
        (
            ZeroDivisionError("a defect"),
            1,
            "error: ZeroDivisionError: a defect\n\nhint: this is a defect; `--debug` shows the traceback\n",
        ),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
):
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(commands, "inspect", fail)
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr().err == text


def test_a_reader_that_leaves_is_not_an_error(tmp_path: Path):
    manifest_of(tmp_path).save(tmp_path)
    writer = subprocess.Popen(
        [sys.executable, "-m", "reroute.cli", "inspect", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Buffered, as usual: then Python flushes once more when it exits.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 0


def test_inspect_describes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "decoder.onnx").write_bytes(b"x" * 2048)
    manifest_of(tmp_path, check={"passed": False, "reference": "recorded at export"}).save(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "63.9 (measured average)" in out
    assert "FAILED (reference: recorded at export)" in out
    for text in (
        str(tmp_path),
        "reroute@2,7,15,23:avg=1/9",
        "decoder.onnx",
        "2 KiB",
        "input_ids",
        "[B, T]",
        "2.13.0",
    ):
        assert text in out


def test_inspect_json_is_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = manifest_of(tmp_path)
    manifest.save(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(manifest.to_json())


def test_inspect_of_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(tmp_path)]) == 2
    assert_error(capsys.readouterr().err, "neither reroute.json nor config.json", "checkpoint")


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spec, output = "reroute@2,7,15,23:avg=1/9", tmp_path / "out"
    assert main(["export", str(demo_checkpoint), "-o", str(output), "--routing", spec, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert spec in out
    assert "64.0 of 576 (measured average)" in out
    assert err == ""
    assert not output.exists()


def test_the_json_of_a_dry_run_is_the_plan(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    spec = "reroute@2,7,15,23:keep=23,22,11,5"
    assert main(["export", str(demo_checkpoint), "--routing", spec, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [stage["budget"] for stage in plan["stages"]] == [None, 23, 22, 11, 5]
    assert plan["num_visual"] == 576
    # fp32, 2 KV heads of 32: 512 bytes a row and layer.
    rows = 2 * 640 + 5 * 87 + 8 * 86 + 8 * 75 + 1 * 69
    assert plan["kv_bytes"] == 512 * rows


def test_the_plan_fits_a_pipe_of_any_width(demo_checkpoint: Path):
    args = ("export", str(demo_checkpoint), "--routing", "reroute@2,7,15,23:avg=1/9", "--dry-run")
    text = reroute(*args).stdout
    assert text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "\x1b" not in text


@pytest.mark.parametrize("passed", [True, False])
def test_check_exits_with_3_when_a_gate_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, passed: bool
):
    import reroute.check as checks

    row = checks.CheckRow(part="decoder", quantity="slots", measured="3 differ", gate="identical", passed=passed)
    result = checks.CheckReport(reference="recorded at export", rows=(row,))
    monkeypatch.setattr(checks, "check_bundle", lambda *args, **options: result)
    assert main(["check", str(tmp_path)]) == (0 if passed else 3)
    out = capsys.readouterr().out
    assert ("check passed" in out) == passed
    assert ("FAILED" in out) != passed
    assert main(["check", str(tmp_path), "--json"]) == (0 if passed else 3)
    assert json.loads(capsys.readouterr().out)["rows"][0]["measured"] == "3 differ"


def test_build_passes_its_arguments_on_and_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import reroute.engines

    calls: list[tuple[Any, ...]] = []

    def fake(export_dir: Path, output: Path, **options: Any) -> Any:
        options.pop("progress")
        calls.append((export_dir, output, options))
        return manifest_of(tmp_path)

    monkeypatch.setattr(reroute.engines, "build", fake)
    folder = tmp_path / "my-export"
    folder.mkdir()
    assert main(["build", str(folder)]) == 0
    assert main(["build", str(folder), "-o", "there", "--no-check", "--force", "--profile", "int4:0"]) == 0
    assert main(["build", str(folder), "--profile", "int4:0"]) == 0
    given = {"backend": "ort", "check": True, "force": False, "tensorrt": None, "profile": "fp32", "kernels": None}
    plain = {**given, "evaluate": None}
    assert calls == [
        (folder, tmp_path / "my-export-ort", plain),
        (folder, Path("there"), {**plain, "check": False, "force": True, "profile": "int4:0"}),
        (folder, tmp_path / "my-export-ort-int4-0", {**plain, "profile": "int4:0"}),
    ]


def turns(*args: str) -> list[tuple[str, tuple[str, ...]]]:
    parsed = build_parser().parse_args(["run", "bundle", *args])
    return [(turn.prompt, tuple(map(str, turn.images))) for turn in dialogue.turns_of(parsed.turns)]


def test_images_go_with_the_prompt_before_them_or_the_first():
    assert turns("--prompt", "a") == [("a", ())]
    assert turns("--image", "1", "--prompt", "a") == [("a", ("1",))]
    assert turns("--prompt", "a", "--image", "1", "--image", "2") == [("a", ("1", "2"))]
    assert turns("--image", "1", "--prompt", "a", "--prompt", "b", "--image", "2") == [
        ("a", ("1",)),
        ("b", ("2",)),
    ]
    assert turns("--image=1", "--prompt=a", "--prompt=b") == [("a", ("1",)), ("b", ())]


class FakeSession:
    """Answers with the number of images, and refuses the prompt "fail"."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.resets = 0

    def reset(self, *, prefix: object) -> None:
        assert prefix is None
        self.resets += 1

    def stream(self, prompt: str, images: list[Path], **_: Any) -> Any:
        if prompt == "fail":
            raise UserError("no room", hint="reset")
        self.asked.append((prompt, [path.name for path in images]))
        return FakeStream([f"{len(images)}", " images"])


class FakeStream:
    def __init__(self, pieces: list[str]) -> None:
        self.answer = SimpleNamespace(text="".join(pieces), views=())
        self._pieces = iter(pieces)

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Any:
        return SimpleNamespace(text=next(self._pieces))


def test_an_interactive_dialogue_goes_on_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = tmp_path / "a b.png"
    image.write_bytes(b"")
    lines = f"/image {image}\nfail\nq1\n\nq2\n/image /nowhere.png\n/reset\n/rest\nq3\n/quit\nq4\n"
    session = FakeSession()
    replies = dialogue.interactive(session, io.StringIO(lines), None, 8)  # type: ignore[arg-type]
    assert session.asked == [("q1", ["a b.png"]), ("q2", []), ("q3", [])]
    assert session.resets == 1
    assert len(replies) == 3
    out, err = capsys.readouterr()
    assert out == "1 images\n0 images\n0 images\n"
    for text in ("error: no room", "error: there is no image /nowhere.png", "unknown command '/rest'"):
        assert text in err


def test_run_answers_on_stdout_and_reports_on_stderr(tiny_bundle: Path, tmp_path: Path):
    image, picture = REPOSITORY / "demo" / "images" / "scene1.png", tmp_path / "new" / "route.png"
    question = ("--image", str(image), "--prompt", "where is the red star ?")
    done = reroute("run", str(tiny_bundle), *question, "--max-new-tokens", "5", "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "prefill ms" in done.stderr
    assert "prefill ms" not in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in picture.parent.iterdir()] == ["route.png"]


def test_run_writes_a_page_that_steps_through_the_stages(tiny_bundle: Path, tmp_path: Path):
    image, page = REPOSITORY / "demo" / "images" / "scene1.png", tmp_path / "route.html"
    question = ["--image", str(image), "--prompt", "where is the red star ?", "--max-new-tokens", "2"]
    assert main(["run", str(tiny_bundle), *question, "--picture", str(page)]) == 0
    first = page.read_bytes()
    assert first.startswith(b"<!doctype html>")
    assert b"where is the red star ?" in first
    assert main(["run", str(tiny_bundle), *question, "--picture", str(page)]) == 0
    assert page.read_bytes() == first


def test_run_json_holds_every_turn(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    image = REPOSITORY / "demo" / "images" / "scene1.png"
    question = [
        "--image",
        str(image),
        "--prompt",
        "where is the red star ?",
        "--prompt",
        "how many stars are there ?",
    ]
    assert main(["run", str(tiny_bundle), *question, "--max-new-tokens", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    first, second = data["turns"]
    assert first["visual_tokens"] == 36
    assert first["routes"] == [7, 4]
    assert first["images"] == [str(image)]
    assert second["visual_tokens"] == 0
    assert len(first["token_ids"]) == len(second["token_ids"]) == 3 or "eos" in (
        first["stop_reason"],
        second["stop_reason"],
    )
    assert first["timings"]["prefill_ms"] > 0
    assert 0 < data["cache_bytes_used"] < data["cache_bytes"]


def test_doctor_exits_with_0_here_and_with_1_without_an_engine_library(monkeypatch: pytest.MonkeyPatch):
    assert main(["doctor", "--json"]) == 0
    monkeypatch.setattr("reroute.doctor._providers", lambda: ())
    assert main(["doctor"]) == 1


def test_doctor_says_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("reroute.doctor.package_version", lambda name: None if name == "torch" else "1.0")
    monkeypatch.setattr("reroute.doctor._providers", lambda: ("CPUExecutionProvider",))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "needs torch: pip install 'reroute[export]'" in out
    assert "not proven" in out
    assert "Jetson" in out


def test_doctor_json_agrees_with_the_table(capsys: pytest.CaptureFixture[str]):
    main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["runtime_usable"] == data["commands"]["run"]["ok"]
    assert data["packages"]["numpy"] == np.__version__
    assert data["machine"]["Python"].startswith(".".join(map(str, sys.version_info[:3])))


def test_an_engine_library_that_does_not_load_counts_as_missing():
    packages = {
        "numpy": "1",
        "pillow": "1",
        "tokenizers": "1",
        "jinja2": "1",
        "rich": "1",
        "onnxruntime-gpu": "1",
    }
    run = {usable.command: usable for usable in usable_commands(packages, ())}["run"]
    assert run.missing == ("onnxruntime or onnxruntime-gpu",)
    run = {usable.command: usable for usable in usable_commands(packages, ("CUDAExecutionProvider",))}["run"]
    assert run.ok


def test_the_doctor_knows_the_requirements_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        # A marker is for other Pythons than most: tomli on 3.10.
        return {requirement.split(">")[0] for requirement in requirements if ";" not in requirement}

    core = names(project["dependencies"])
    for extra, needed in COMMANDS.values():
        single = {need for need in needed if isinstance(need, str)}
        choices = {need for choice in needed if isinstance(choice, tuple) for need in choice}
        wanted = core.union(*(names(project["optional-dependencies"][one]) for one in extra.split(",")))
        assert single | (choices & wanted) == wanted
    assert names(project["optional-dependencies"]["ort-gpu"]) == {"onnxruntime-gpu"}


def test_cpu_features_of_x86_and_arm():
    assert cpu_features("processor : 0\nflags\t\t: fpu avx2 avx512f amx_tile\n") == (
        "avx2",
        "avx512f",
        "amx_tile",
    )
    assert cpu_features("Features\t: fp asimd asimddp\n") == ("asimd", "asimddp")
    assert cpu_features("") == ()


def test_l4t_version_of_jetpack_6():
    assert l4t_version("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic") == "36.4.3"
    assert l4t_version("") == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20, "1 MiB"),
        (200 * 2**20, "200 MiB"),
        (13.5 * 2**30, "13.5 GiB"),
    ],
)
def test_sizes_are_binary(count: float, text: str):
    assert report.format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 FLOP"), (7.05e9, "7.05 GFLOP"), (385e6, "385 MFLOP"), (1.2e13, "12 TFLOP")]
)
def test_flops_are_decimal(count: float, text: str):
    assert report.format_flops(count) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_errors_are_coloured_on_a_terminal_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    report.print_error("x", "y", terminal := Terminal())
    assert "\x1b[1;31merror:\x1b[0m x" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    report.print_error("x", "y", terminal := Terminal())
    assert terminal.getvalue() == "error: x\n\nhint: y\n"


def test_markup_in_data_is_printed_as_it_is():
    out = io.StringIO()
    report.print_table(("file", "size"), [("[red]weights[/red].onnx", "1 B")], out)
    assert "[red]weights[/red].onnx" in out.getvalue()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
    ],
)
def test_iou_by_hand(first: tuple[float, ...], second: tuple[float, ...], expected: float):
    assert iou(first, second) == pytest.approx(expected)
    assert iou(second, first) == pytest.approx(expected)
