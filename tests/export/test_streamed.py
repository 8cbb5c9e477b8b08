"""Weights that stay in the checkpoint: an export's memory does not follow from the model's size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.make_checkpoint import Shape, make_checkpoint
from reroute import cli, scenario
from reroute.errors import UserError
from reroute.export import read_model, resolve
from reroute.export import weights as export_weights
from reroute.export.checkpoint import Checkpoint
from reroute.export.models import family_of
from reroute.export.reference import encode, record
from reroute.export.weights import streamed_of, weights_of
from tests.conftest import TINY_ROUTING, TinyLlava, make_llava

MIB = 2**20
SMALL = Shape(
    layers=2, hidden=64, intermediate=128, heads=2, kv_heads=2, head_dim=32, vocab=300, positions=2048,
    tower_layers=2, tower_hidden=32, tower_intermediate=64, tower_heads=2, image_size=32, patch=8,
)  # fmt: skip
# 77 M parameters: 147 MiB in bfloat16, 294 MiB in float32, the largest matrix 32 MiB.
LARGE = Shape(
    layers=2, hidden=1024, intermediate=8192, heads=8, kv_heads=8, head_dim=128, vocab=8000, positions=2048,
    tower_layers=2, tower_hidden=32, tower_intermediate=64, tower_heads=2, image_size=32, patch=8,
)  # fmt: skip
EXPORT = """
import sys
from pathlib import Path
from reroute import cli
from reroute.export import weights
weights.RESIDENT_BYTES = 1 << 20
code = cli.main(["export", sys.argv[1], "-o", sys.argv[2], "--routing", "dense", "--reference-tokens", "2"])
status = Path("/proc/self/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("VmHWM:")))
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_does_not_hold_the_weights(tmp_path: Path) -> None:
    """In a process of its own, beside the same export of a model of next to nothing."""
    peaks = {}
    for name, shape in (("small", SMALL), ("large", LARGE)):
        (tmp_path / name).mkdir()
        make_checkpoint(tmp_path / name, shape, shard_bytes=64 * MIB)
        command = [sys.executable, "-c", EXPORT, str(tmp_path / name), str(tmp_path / f"{name}-export")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        match = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
        assert match is not None
        peaks[name] = int(match[1]) * 1024
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 2
    assert size > 140 * MIB
    # The reference's matrices of 32 MiB come and go, about 0.7 * size at the worst moment. Held in 16 bits the weights
    # would add 1 * size to that, in float32 2 * size.
    assert peaks["large"] - peaks["small"] < size
    exported = (tmp_path / "large-export" / "decoder.onnx.data").stat().st_size
    assert exported == pytest.approx(size, rel=0.02)


def test_a_streamed_model_runs_as_one_that_stays(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reference bit for bit, and nothing stays behind."""
    opened = Checkpoint.open(tiny_checkpoint)
    family = family_of(opened)
    model = family.read(opened)
    schedule = resolve(TINY_ROUTING, model)
    runs = []
    for budget in (1 << 30, 0):
        monkeypatch.setattr(export_weights, "RESIDENT_BYTES", budget)
        decoder = family.build_decoder(opened, model, schedule)
        tower = family.build_vision(opened, model, schedule)
        runs.append(record(decoder, tower, model, scenario.probe(model, num_tokens=4)))
        assert all(parameter.is_meta for part in (decoder, tower) for parameter in part.parameters())
        assert not streamed_of(decoder).kept
        encode(tower, torch.from_numpy(scenario.probe(model).pixel_values))
        assert bool(streamed_of(tower).kept) == (budget > 0)
    assert runs[0].keys() == runs[1].keys()
    # The embedding reads only the rows that are looked up where it does not stay; sums may then run in another order.
    for name, array in runs[0].items():
        assert abs(array - runs[1][name]).max(initial=0) <= 1e-6, name


def test_reading_a_tensor_and_its_rows(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reroute.export.checkpoint._BLOCK", 1000)  # several parts, the last one short
    opened = Checkpoint.open(tiny_checkpoint)
    stored = load_file(tiny_checkpoint / "model.safetensors")
    name = "language_model.embed_tokens.weight"
    expected = stored[opened.entries[name].key]
    assert torch.equal(opened.load(name, torch.float32), expected)
    assert torch.equal(opened.load(name, torch.float16), expected.half())
    assert torch.equal(opened.load_rows(name, [7, 3, 175], torch.float32), expected[[7, 3, 175]])


def test_a_shard_that_was_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    opened = Checkpoint.open(make_llava(tmp_path / "checkpoint", TinyLlava(layers=1)))
    path = tmp_path / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    last = max(opened.entries, key=lambda name: opened.entries[name].start)
    with pytest.raises(UserError, match=r"the shard model.safetensors ends within "):
        opened.load(last, torch.float32)


def test_a_plan_reads_headers_and_an_export_hashes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_llava(tmp_path / "checkpoint", TinyLlava(layers=2))
    read: list[str] = []
    monkeypatch.setattr("reroute.export.checkpoint.sha256_of", lambda path: read.append(path.name) or "0" * 64)
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a plan read a weight"))
    read_model(checkpoint)
    argv = ["export", str(checkpoint), "--routing", "reroute@1:keep=5"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert read == []
    monkeypatch.setattr(Checkpoint, "load", load)
    output = tmp_path / "export"
    assert cli.main([*argv, "-o", str(output), "--reference-tokens", "3"]) == 0
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert scenario.load(output / scenario.FILE_NAME)["tokens"].shape == (3,)
    capsys.readouterr()
    assert cli.main([*argv, "-o", str(tmp_path / "none"), "--reference-tokens", "0"]) == 2
    assert "0 is less than 1" in capsys.readouterr().err


def test_a_module_around_a_streamed_one(tiny_checkpoint: Path) -> None:
    opened = Checkpoint.open(tiny_checkpoint)
    family = family_of(opened)
    model = family.read(opened)
    tower = family.build_vision(opened, model, resolve("dense", model))
    around = torch.nn.ModuleDict({"tower": tower})
    assert weights_of(around).keys() == {name for name, _ in around.named_parameters()}
    assert streamed_of(around) is streamed_of(tower)
    with pytest.raises(ValueError, match="Linear holds 0 streamed modules"):
        streamed_of(torch.nn.Linear(1, 1))
