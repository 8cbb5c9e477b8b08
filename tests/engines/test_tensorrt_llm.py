"""Directories for TensorRT-LLM: the baseline's weights are the checkpoint's, under the names that its LLaMA reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from reroute.engines import TensorRTOptions, build
from reroute.engines.targets import LoweringOptions
from reroute.engines.tensorrt_llm import write_baseline, write_engine_directory
from reroute.errors import UserError
from reroute.export import export_checkpoint
from tests import tensorrt_fakes as fakes
from tests.conftest import TINY_ROUTING, TinyLlava, make_llava


@pytest.mark.parametrize(
    "size", [TinyLlava(), TinyLlava(attention_bias=True, tied=True)], ids=["plain", "biases, tied"]
)
def test_the_baseline_has_the_checkpoints_weights(size: TinyLlava, tmp_path: Path) -> None:
    """Against the Hugging Face file itself: [out, in], q k v stacked, gate under fc and up under gate."""
    checkpoint = make_llava(tmp_path / "checkpoint", size)
    export_checkpoint(checkpoint, tmp_path / "export", routing=TINY_ROUTING)
    write_baseline(tmp_path / "export", tmp_path / "baseline", dtype="float32")
    made = load_file(tmp_path / "baseline" / "rank0.safetensors")
    source = {
        name.removeprefix("model.").removeprefix("language_model.").removeprefix("model."): array
        for name, array in load_file(checkpoint / "model.safetensors").items()
    }
    embed = source["embed_tokens.weight"]
    expected = {
        "transformer.vocab_embedding.weight": embed,
        "transformer.ln_f.weight": source["norm.weight"],
        "lm_head.weight": embed if size.tied else source["lm_head.weight"],
    }
    for layer in range(size.layers):
        ours, theirs = f"layers.{layer}", f"transformer.layers.{layer}"
        attention = [f"{ours}.self_attn.{part}_proj" for part in "qkv"]
        expected[f"{theirs}.attention.qkv.weight"] = np.concatenate([source[f"{name}.weight"] for name in attention])
        names = {
            "attention.dense": "self_attn.o_proj",
            "mlp.fc": "mlp.gate_proj",
            "mlp.gate": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
            "input_layernorm": "input_layernorm",
            "post_layernorm": "post_attention_layernorm",
        }
        expected |= {f"{theirs}.{name}.weight": source[f"{ours}.{other}.weight"] for name, other in names.items()}
        if size.attention_bias:
            expected[f"{theirs}.attention.qkv.bias"] = np.concatenate([source[f"{name}.bias"] for name in attention])
            expected[f"{theirs}.attention.dense.bias"] = source[f"{ours}.self_attn.o_proj.bias"]
    assert made.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array, err_msg=name)
    config = json.loads((tmp_path / "baseline" / "config.json").read_text())
    assert (config["architecture"], config["dtype"], config["attn_bias"]) == (
        "LlamaForCausalLM", "float32", size.attention_bias
    )  # fmt: skip
    assert (config["num_key_value_heads"], config["head_size"]) == (2, 16)


def test_the_baseline_in_half(tiny_export: Path, tmp_path: Path) -> None:
    write_baseline(tiny_export, tmp_path / "baseline")
    made = load_file(tmp_path / "baseline" / "rank0.safetensors")
    assert {array.dtype for array in made.values()} == {np.dtype(np.float16)}
    with pytest.raises(UserError, match="exists already"):
        write_baseline(tiny_export, tmp_path / "baseline")
    write_baseline(tiny_export, tmp_path / "baseline", force=True)


def test_the_engine_directory_says_what_a_loop_over_session_needs(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install(monkeypatch)
    options = TensorRTOptions(lowering=LoweringOptions(target="datacenter"))
    build(tiny_export, tmp_path / "bundle", backend="tensorrt", tensorrt=options, check=False)
    write_engine_directory(tmp_path / "bundle", tmp_path / "llm")
    assert {path.name for path in (tmp_path / "llm").iterdir()} == {"config.json", "rank0.engine"}
    assert (tmp_path / "llm" / "rank0.engine").read_bytes() == (tmp_path / "bundle" / "decoder.engine").read_bytes()
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    assert config["pretrained_config"]["architecture"] == "RerouteDecoder"
    assert config["build_config"]["max_seq_len"] == 512 + 72
    assert config["reroute"]["cache_rows"] == [584, 526, 520]
    assert list(config["reroute"]["profiles"]) == ["prefill", "decode"]
    assert {tensor["name"] for tensor in config["reroute"]["outputs"]} >= {"logits", "next_token", "present.5.value"}


def test_other_folders_are_refused(tiny_export: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bundle for ort, not a TensorRT bundle"):
        write_engine_directory(tiny_bundle, tmp_path / "out")
    with pytest.raises(UserError, match="is a bundle, not an export"):
        write_baseline(tiny_bundle, tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint of dtype"):
        write_baseline(tiny_export, tmp_path / "out", dtype="int8")
