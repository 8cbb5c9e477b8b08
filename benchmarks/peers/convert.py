"""The text model of a LLaVA checkpoint in the formats of other engines.

    python convert.py llama CHECKPOINT DIR     a Hugging Face folder of the Llama text model alone, float32
    python convert.py gguf CHECKPOINT FILE     llama.cpp's format, float16, without a tokenizer
    python convert.py quantise FILE OUT Q8_0   llama.cpp's own quantiser (q8_0, q4_0), through llama_cpp

Runs in the environment of the other engines: numpy, safetensors, gguf, llama-cpp-python; no Reroute.

GGUF's llama rotates pairs of neighbours, the checkpoints rotate a head's first half with its second, so the rows of
every query and key head change places: half, pair -> pair, half.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Names in GGUF by the end of a checkpoint's name.
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def text_name(name: str) -> str | None:
    """A LLaVA tensor's name in the text model alone; None for a tensor that is not of it."""
    if "vision_tower" in name or "multi_modal_projector" in name:
        return None
    # language_model.model.layers (on disk, once), model.language_model.layers (now), both with lm_head beside or in it.
    inner = re.sub(r"^(?:model\.language_model|language_model\.model|model)\.", "", name)
    head = re.fullmatch(r"(?:language_model\.)?lm_head\.weight", name)
    return "lm_head.weight" if head else f"model.{inner}"


def gguf_name(name: str) -> str:
    """The name of a tensor of the text model in GGUF."""
    if name in WHOLE:
        return f"{WHOLE[name]}.weight"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in BLOCK:
        raise ValueError(f"no place in GGUF for {name}")
    return f"blk.{match[1]}.{BLOCK[match[2]]}.weight"


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H*d, in] of rotate-half heads in the order of rotate-neighbours heads."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The text model's tensors by name, float32, one at a time."""
    from safetensors import safe_open

    found = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                if (inner := text_name(name)) is not None:
                    found += 1
                    yield inner, np.asarray(shard.get_tensor(name), dtype=np.float32)
    if not found:
        raise SystemExit(f"error: no safetensors of a text model in {checkpoint}")


def text_config(checkpoint: Path) -> dict[str, Any]:
    """`text_config` of the checkpoint. Only a plain Llama is handled."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    if config["model_type"] != "llama":
        raise SystemExit(f"error: the text model is {config['model_type']}, not llama")
    return config


def write_llama(checkpoint: Path, folder: Path) -> None:
    """A checkpoint of LlamaForCausalLM."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = text_config(checkpoint) | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(dict(tensors(checkpoint)), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def write_gguf(checkpoint: Path, file: Path) -> None:
    """float16 matrices, float32 norms."""
    import gguf  # pyright: ignore[reportMissingImports]

    config = text_config(checkpoint)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 1e4
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, tensor in tensors(checkpoint):
        if name.endswith("q_proj.weight"):
            tensor = interleave_halves(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = interleave_halves(tensor, groups)
        writer.add_tensor(gguf_name(name), tensor if tensor.ndim == 1 else tensor.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: str) -> None:
    """Every matrix in `kind`: the output matrix too, which llama.cpp would give more bits."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    lib: Any = llama_cpp
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = True
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"error: llama.cpp could not quantise {source} to {kind}")


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("llama", "gguf", "quantise"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind", nargs="?", choices=("Q8_0", "Q4_0"))
    args = parser.parse_args()
    if args.what == "quantise":
        quantise(args.source, args.target, args.kind)
    else:
        {"llama": write_llama, "gguf": write_gguf}[args.what](args.source, args.target)


if __name__ == "__main__":
    main()
