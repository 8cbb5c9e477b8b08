"""Random checkpoints of a named shape: transformers and the exporter load them, equal arguments give equal bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from benchmarks.make_checkpoint import SHAPES, make_checkpoint, make_config
from reroute.export import read_model
from tests.conftest import REPOSITORY
from tests.export.test_streamed import SMALL


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_is_what_transformers_loads(tmp_path: Path, dtype: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_checkpoint(tmp_path / name, SMALL, dtype=dtype, shard_bytes=100_000)
    folder = tmp_path / "one"
    assert len(list(folder.glob("*.safetensors"))) > 2
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    found: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, loaded = found
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    text = "USER: <image>\nWhere is it? ASSISTANT:"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids.count(4) == 1
    described = read_model(folder)
    assert described.vision.tokens_per_image == 16
    assert described.tokens.image_token_id == 4


@pytest.mark.parametrize(("name", "millions"), [("llava-1.5-7b", 7063), ("small24", 416)])
def test_named_shapes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(make_config(SHAPES[name], "bfloat16"))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert model.config.image_seq_length == 576


def test_the_command_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep")
    script = REPOSITORY / "benchmarks" / "make_checkpoint.py"
    command = [sys.executable, str(script), "small24", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "exists and is not an earlier output of this command" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
