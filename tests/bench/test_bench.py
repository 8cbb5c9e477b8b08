"""`reroute bench` as a user meets it: the structure of its figures and what is exact, never how fast anything was."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reroute.bench import measure as measuring
from reroute.bench.machine import cpu_model, facts, fingerprint
from reroute.bench.memory import peak_rss_bytes
from reroute.bench.workload import BOUNDARY, QUANTITIES, Shape, Workload
from reroute.cli import main
from reroute.manifest import Manifest
from reroute.runtime.backend import open_backend
from reroute.runtime.bundle import Bundle

SETTINGS = ("--text", "9,20", "--tokens", "3", "--warmup", "1", "--repeat", "4")


@pytest.fixture(scope="module")
def output(tiny_bundle: Path, tiny_dense_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two bundles. Do not change it."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    assert main(["bench", str(tiny_dense_bundle), str(tiny_bundle), *SETTINGS, "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def data(output: Path) -> dict:
    return json.loads((output / "bench.json").read_text(encoding="utf-8"))


def test_the_output_has_all_forms_and_nothing_else(output: Path):
    assert sorted(path.name for path in output.iterdir()) == ["bench.csv", "bench.json", "bench.md"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_every_round_of_everything_is_there(data: dict):
    assert [(cell["candidate"], cell["text"]) for cell in data["cells"]] == [
        (name, text) for name in ("dense", "reroute@2,4:keep=7,4") for text in (9, 20)
    ]
    for cell in data["cells"]:
        assert tuple(cell["samples"]) == QUANTITIES
        assert {len(values) for values in cell["samples"].values()} == {4}
        for name, values in cell["samples"].items():
            assert cell["summary"][name]["median"] == pytest.approx(np.median(values))
        # One span around all of it is at least as long as its parts.
        for parts in zip(*(cell["samples"][name] for name in QUANTITIES), strict=True):
            vision, prefill, decode, whole = parts
            assert whole >= vision + prefill + 3 * decode - 1e-3


def test_ratios_are_to_the_dense_bundle_of_the_run(data: dict):
    assert data["statistics"]["speedup_over"] == "dense"
    for cell in data["cells"]:
        assert tuple(cell["speedup"]) == QUANTITIES
        if cell["candidate"] == "dense":
            assert all(one == {"value": 1.0, "low": 1.0, "high": 1.0} for one in cell["speedup"].values())


def test_bytes_are_exact(data: dict, tiny_bundle: Path, tiny_dense_bundle: Path):
    for one, folder in zip(data["candidates"], (tiny_dense_bundle, tiny_bundle), strict=True):
        parts = [path for path in folder.iterdir() if ".onnx" in path.name]
        assert len(parts) == 4
        assert one["memory"]["weight_bytes"] == sum(path.stat().st_size for path in parts)
        manifest = Manifest.load(folder)
        text = manifest.model.text
        row = 2 * text.num_kv_heads * text.head_dim * 4
        layers = zip(manifest.schedule.stages, manifest.cache_rows, strict=True)
        assert one["memory"]["cache_bytes"] == sum(stage.num_layers * rows * row for stage, rows in layers)
        prompts = {cell["text"]: cell["kv_bytes"] for cell in data["cells"] if cell["candidate"] == one["name"]}
        rows = {
            length: sum(stage.num_layers * (length + stage.visual_rows(36)) for stage in manifest.schedule.stages)
            for length in (9, 20)
        }
        assert prompts == {length: count * row for length, count in rows.items()}


def test_peak_memory_is_of_fresh_processes(data: dict):
    for one in data["candidates"]:
        peaks = [sample["peak_rss_bytes"] for sample in one["memory_samples"]]
        assert len(peaks) == 3
        assert one["memory"]["peak_rss_bytes"] == np.median(peaks)
        assert all(sample["start_rss_bytes"] < sample["peak_rss_bytes"] for sample in one["memory_samples"])
        # This process has torch and more: a peak that came with it would be as high.
        assert max(peaks) < peak_rss_bytes()


def test_the_machine_and_the_bundles_are_described(data: dict, tiny_bundle: Path):
    machine, manifest = data["machine"], Manifest.load(tiny_bundle)
    assert machine["cores_usable"] >= 1
    assert machine["memory_bytes"] > 2**28
    assert machine["fingerprint"] == fingerprint(machine)
    assert len(machine["load_average_before"]) == 3
    one = data["candidates"][1]
    assert one["routing"] == manifest.routing
    assert one["average_visual_tokens"] == manifest.average_visual_tokens
    assert one["checkpoint_sha256"] == manifest.checkpoint_sha256
    assert one["versions"] == manifest.versions
    assert one["engine"]["spinning"] == "within a run"
    assert data["versions"].keys() >= {"reroute", "python", "numpy"}
    assert data["settings"]["text"] == [9, 20]
    assert set(data["boundary"]) == {*QUANTITIES, *one["memory"], "load_ms", "excluded"} == set(BOUNDARY)


def test_no_host_name_and_no_path_is_written(output: Path):
    for path in output.iterdir():
        text = path.read_text(encoding="utf-8")
        assert str(output.parent.parent) not in text
        assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_markdown_and_csv_have_the_same_figures(output: Path, data: dict):
    markdown = (output / "bench.md").read_text(encoding="utf-8")
    table = list(csv.DictReader(io.StringIO((output / "bench.csv").read_text(encoding="utf-8"))))
    for cell in data["cells"]:
        for name in QUANTITIES:
            median = cell["summary"][name]["median"]
            assert f"{median:.3g} [" in markdown
            (row,) = (
                row
                for row in table
                if (row["candidate"], row["text"], row["quantity"]) == (cell["candidate"], str(cell["text"]), name)
            )
            assert float(row["median"]) == pytest.approx(median, rel=1e-3)
            assert row["rounds"] == "4"
    assert {row["quantity"] for row in table} == {*QUANTITIES, "kv_bytes", *data["candidates"][0]["memory"]}
    for words in BOUNDARY.values():
        assert words in markdown


def test_raw_samples_are_on_one_line_each(output: Path):
    lines = (output / "bench.json").read_text(encoding="utf-8").splitlines()
    assert sum('"prefill_ms": [' in line and line.count(",") >= 3 for line in lines) == 4


def test_two_bundles_are_compared_in_one_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only the structure: what it finds depends on the machine, so the tolerance allows everything."""
    wide = ("--latency", "99%", "--memory", "50%")
    code = main(
        ["compare", str(tiny_bundle), str(tiny_bundle), *SETTINGS, *wide, "-o", str(tmp_path / "out"), "--json"]
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert code == (0 if result["passed"] else 3)
    assert err.startswith("wrote ")
    assert out == (tmp_path / "out" / "compare.json").read_text()
    assert result["mode"] == "bundles"
    assert result["tolerance"] == {"latency": 0.99, "memory": 0.5}
    assert len(result["findings"]) == 2 * len(QUANTITIES) + 3
    exact = {one["quantity"]: one["ratio"]["value"] for one in result["findings"] if one["text"] is None}
    assert exact["cache_bytes"] == exact["weight_bytes"] == 1
    assert result["runs"][0]["settings"]["repeat"] == 4


def test_files_of_real_runs_can_be_compared(output: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(output), str(output / "bench.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {one["ratio"]["value"] for one in found} == {1.0}


# Parts.


def test_candidates_of_a_round_stand_side_by_side_in_changing_order():
    calls: list[tuple[str, int]] = []

    def call(key: tuple[str, int]) -> Callable[[], dict[str, float]]:
        return lambda: calls.append(key) or {"decode_ms": float(len(calls))}

    keys = [(name, text) for name in "abc" for text in (1, 2)]
    samples = measuring.interleave({key: call(key) for key in keys}, warmup=2, repeat=20)
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert len(rounds) == 22
    for round_ in rounds:
        assert sorted(round_) == sorted(keys)
        assert [text for _, text in round_[:3]] in ([1] * 3, [2] * 3)
    assert len({tuple(round_) for round_ in rounds}) > 5
    # The two rounds of warm-up are not in the samples, and sample i is of round i.
    for key in keys:
        assert len(samples[key]["decode_ms"]) == 20
        assert all(12 + 6 * i < value <= 18 + 6 * i for i, value in enumerate(samples[key]["decode_ms"]))


def test_a_peak_of_the_parent_is_not_the_childs():
    """ru_maxrss would say 400 MB: it survives fork and exec."""
    code = """
import subprocess, sys
block = b"x" * 400_000_000
child = "from reroute.bench.memory import peak_rss_bytes; print(peak_rss_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**22 < int(done.stdout) < 200_000_000


def test_a_text_only_prompt_has_no_vision(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    workload = Workload(bundle.manifest, open_backend(bundle), Shape(text=1, images=0, tokens=2))
    assert tuple(workload.run()) == QUANTITIES[1:]


def test_several_images_enter(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    backend = open_backend(bundle)
    Workload(bundle.manifest, backend, Shape(text=1, images=2, tokens=1)).run()
    assert backend.lengths.tolist() == [2 + 72, 2 + 7, 2 + 4]


def test_names_tell_bundles_apart(tmp_path: Path):
    def bundle(routing: str, folder: str) -> SimpleNamespace:
        return SimpleNamespace(manifest=SimpleNamespace(routing=routing), path=tmp_path / folder)

    bundles = [bundle("dense", "a"), bundle("fastv:avg=1/3", "b"), bundle("dense", "c"), bundle("dense", "x/c")]
    names = measuring.names_of(bundles)  # type: ignore[arg-type]
    assert names == ["dense (a)", "fastv:avg=1/3", "dense (c)", "dense (c) #2"]


def test_a_fingerprint_tells_devices_apart_and_updates_not():
    machine = facts(gpu=False)
    assert fingerprint({**machine, "system": "Linux 9", "load_average_before": None}) == machine["fingerprint"]
    for name, value in (("cpu", "other"), ("cores_usable", 99), ("memory_bytes", 2**40), ("power_mode", "MAXN")):
        assert fingerprint({**machine, name: value}) != machine["fingerprint"]
    jetson = {"cpu": "Jetson Orin Nano", "cores_usable": 6, "memory_bytes": 7.4 * 2**30, "power_mode": "NV: 15W"}
    assert fingerprint(jetson) == "jetson-orin-nano-6c-8gib-nv-15w"


def test_the_processors_name_of_x86_and_arm():
    assert cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
    assert cpu_model("processor\t: 0\nBogoMIPS\t: 31.25\n") == ""


def test_an_earlier_output_is_replaced_only_by_force(output: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "nowhere", "-o", str(output)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(["bench", "nowhere", "-o", str(output), "--force"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert (output / "bench.json").is_file()


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ([], "required: BUNDLE", "--help"),
        (["nowhere"], "there is no folder nowhere", "reroute build"),
        (["{bundle}", "{bundle}"], "is given twice", "once"),
        (["{empty}"], "holds no reroute.json", "reroute build"),
        (["{bundle}", "--text", "64,"], "'' is not a whole number", "--help"),
        (["{bundle}", "--text", "0"], "0 is less than 1", "--help"),
        (["{bundle}", "--text", "490"], "490 text and 32 decoded tokens do not fit", "--max-text"),
        (["{bundle}", "--images", "3"], "3 images do not fit", "--max-images"),
        (["{bundle}", "--images", "-1"], "-1 is less than 0", "--help"),
        (["{bundle}", "--repeat", "0"], "0 is less than 1", "--help"),
        (["{bundle}", "--provider", "gpu"], "unknown provider 'gpu'", "supported"),
        (["{bundle}", "-o", "{empty}/.."], "is not an earlier output of this command", "another output"),
    ],
)
def test_bad_input_is_one_error_with_a_hint(
    args: list[str], message: str, hint: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["bench", *(arg.format(bundle=tiny_bundle, empty=tmp_path / "empty") for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, blank, advice = err.rstrip("\n").split("\n")
    assert error.startswith("error: ")
    assert message in error
    assert blank == ""
    assert hint in advice


def test_a_session_that_cannot_run_is_one_error(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken wheel')")
    assert main(["bench", str(tiny_bundle), *SETTINGS]) == 2
    err = capsys.readouterr().err
    assert "could not be measured in a process of its own" in err
    assert "reroute run" in err


@pytest.mark.parametrize("command", ["bench", "compare"])
def test_help_imports_nothing_heavy(command: str):
    code = f"""
import sys
from reroute.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit:
    pass
sys.exit(str([name for name in ("numpy", "onnxruntime", "rich", "torch") if name in sys.modules]).strip("[]"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert f"reroute {command}" in done.stdout
