"""TensorRT-LLM (1.0 to 1.2.x, the last versions with an engine backend): what it can take of this project.

    python -m reroute.engines.tensorrt_llm baseline EXPORT -o DIR    the dense model, for `trtllm-build`
    python -m reroute.engines.tensorrt_llm engine BUNDLE -o DIR      a TensorRT bundle's decoder in its engine layout

*baseline* writes `config.json` and `rank0.safetensors` under the names of TensorRT-LLM's LLaMA model: the same weights
without routing, built and timed by its own tools, for side-by-side numbers. *engine* writes `config.json` and
`rank0.engine`. Its `runtime.Session` drives such an engine, which to it is a TensorRT engine like any other:
`infer_shapes`, then `run` with past and present of a name at one address. Its GenerationSession and executor do not:
they have one cache length and one sequence length for all layers, and routing has one for each stage. From 1.3
engines are not loaded.

Sources: NVIDIA/TensorRT-LLM, tensorrt_llm/models/llama/convert.py and runtime/session.py.

| here, [in, out] | TensorRT-LLM, [out, in] |
|---|---|
| embed.weight [V, D] | transformer.vocab_embedding.weight [V, D] |
| layers.i.{q,k,v}_proj | transformer.layers.i.attention.qkv, rows of q, then k, then v |
| layers.i.o_proj | transformer.layers.i.attention.dense |
| layers.i.gate_proj, up_proj, down_proj | transformer.layers.i.mlp.fc, .gate, .proj (fc is what goes through SiLU) |
| layers.i.input_norm, post_norm; norm | transformer.layers.i.input_layernorm, .post_layernorm; transformer.ln_f |
| lm_head | lm_head |
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reroute.engines.weights import load_graph
from reroute.errors import RerouteError, UserError
from reroute.folders import whole_folder
from reroute.manifest import Manifest

VERSIONS = ">=1.0,<1.3"
_DTYPES = {"float16": "F16", "float32": "F32"}
CONFIG, ENGINE, WEIGHTS = "config.json", "rank0.engine", "rank0.safetensors"


def write_baseline(export_dir: Path, output: Path, *, dtype: str = "float16", force: bool = False) -> None:
    """Write the dense model of an export as a checkpoint for `trtllm-build`. Raises UserError."""
    manifest = Manifest.load(export_dir)
    if manifest.kind != "export":
        raise UserError(f"{export_dir} is a {manifest.kind}, not an export", hint="give what `reroute export` wrote")
    if dtype not in _DTYPES:
        raise UserError(f"no checkpoint of dtype {dtype!r}", hint=f"supported: {', '.join(_DTYPES)}")
    manifest.verify_files(export_dir)
    weights = Weights(export_dir / manifest.parts["decoder"].file, manifest.model.text.num_layers)
    with whole_folder(output, force=force, written=_written) as folder:
        tensors = dict(baseline_tensors(weights, manifest.model.text.num_layers))
        biases = {part: f"transformer.layers.0.{part}.bias" in tensors for part in ("attention.qkv", "mlp.fc")}
        config = {
            **model_config(manifest, dtype),
            "attn_bias": biases["attention.qkv"],
            "mlp_bias": biases["mlp.fc"],
        }
        _save_json(folder / CONFIG, config)
        save_safetensors(folder / WEIGHTS, tensors, dtype)


def write_engine_directory(bundle: Path, output: Path, *, force: bool = False) -> None:
    """Write a TensorRT bundle's decoder in TensorRT-LLM's engine layout. Raises UserError."""
    manifest = Manifest.load(bundle)
    if manifest.kind != "bundle" or manifest.backend != "tensorrt" or manifest.engine is None:
        raise UserError(
            f"{bundle} is a {manifest.kind} for {manifest.backend}, not a TensorRT bundle",
            hint="build one with `reroute build DIR --backend tensorrt --target T`",
        )
    manifest.verify_files(bundle)
    text, capacity = manifest.model.text, manifest.capacity
    tensors = json.loads(manifest.to_json())
    config = {
        "version": VERSIONS,
        "pretrained_config": {**model_config(manifest, manifest.dtype), "architecture": "RerouteDecoder"},
        "build_config": {
            "max_batch_size": 1,
            "max_beam_width": 1,
            "max_input_len": max(manifest.cache_rows),
            "max_seq_len": max(manifest.cache_rows),
            "max_num_tokens": max(manifest.cache_rows),
            "strongly_typed": True,
            "plugin_config": {},
        },
        # What a loop over runtime.Session needs and the fields above cannot say.
        "reroute": {
            "tensorrt": manifest.engine.tensorrt,
            "plugin_file": manifest.engine.plugin_file,
            "schedule": tensors["schedule"],
            "cache_rows": tensors["cache_rows"],
            "max_text": capacity.max_text,
            "rope_theta": text.rope_theta,
            "profiles": tensors["lowering"]["profiles"]["decoder"],
            "inputs": tensors["parts"]["decoder"]["inputs"],
            "outputs": tensors["parts"]["decoder"]["outputs"],
        },
    }
    with whole_folder(output, force=force, written=_written) as folder:
        _save_json(folder / CONFIG, config)
        shutil.copyfile(bundle / manifest.parts["decoder"].file, folder / ENGINE)
        if manifest.engine.plugin_file:
            shutil.copyfile(bundle / manifest.engine.plugin_file, folder / manifest.engine.plugin_file)


def model_config(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """The `PretrainedConfig` of TensorRT-LLM's LLaMA for an export's text model, on one GPU."""
    text = manifest.model.text
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_size": text.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": text.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": text.rope_theta,
        "rotary_scaling": None,
        "max_position_embeddings": text.max_position_embeddings,
        "share_embedding_table": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def baseline_tensors(weights: Weights, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors, [out, in]; see the table in the module docstring."""
    yield "transformer.vocab_embedding.weight", weights.named("embed.weight")
    for layer in range(layers):
        ours, theirs = f"layers.{layer}", f"transformer.layers.{layer}"
        yield f"{theirs}.input_layernorm.weight", weights.norm(2 * layer)
        yield f"{theirs}.post_layernorm.weight", weights.norm(2 * layer + 1)
        parts = {
            "attention.qkv": ("q_proj", "k_proj", "v_proj"),
            "attention.dense": ("o_proj",),
            "mlp.fc": ("gate_proj",),
            "mlp.gate": ("up_proj",),
            "mlp.proj": ("down_proj",),
        }
        for name, sources in parts.items():
            matrices = [weights.named(f"{ours}.{source}.weight").T for source in sources]
            yield f"{theirs}.{name}.weight", np.concatenate(matrices)
            biases = [weights.optional(f"{ours}.{source}.bias") for source in sources]
            if found := [bias for bias in biases if bias is not None]:
                if len(found) != len(biases):
                    raise RerouteError(f"{ours} has only some of its biases", hint="export again")
                yield f"{theirs}.{name}.bias", np.concatenate(found)
    yield "transformer.ln_f.weight", weights.norm(2 * layers)
    yield "lm_head.weight", weights.named("lm_head.weight").T


class Weights:
    """The initializers of a neutral decoder graph, read one at a time.

    Equal tensors were merged when the graph was made, usually norms of ones, so norms are found by their nodes, which
    stand in the order of the layers: input and post norm of each, then the last. A layer that scores has its input norm
    twice: of all rows, and of those of them that run.
    """

    def __init__(self, path: Path, layers: int) -> None:
        model, self._weights = load_graph(path)
        gathered = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "RerouteGather"}
        norms = (node.input for node in model.graph.node if node.op_type == "RerouteRMSNorm")
        self._norms = [weight for _, weight in dict.fromkeys((gathered.get(x, x), weight) for x, weight in norms)]
        if len(self._norms) != 2 * layers + 1:
            raise RerouteError(f"{len(self._norms)} norms in a decoder of {layers} layers", hint="export again")

    def named(self, name: str) -> np.ndarray:
        """A weight by name. Raises RerouteError."""
        if name not in self._weights.stored:
            raise RerouteError(f"the decoder graph has no weight {name}", hint="export again; if it stays, report it")
        return self._weights.read(name)

    def optional(self, name: str) -> np.ndarray | None:
        """A weight by name, None if there is none."""
        return self.named(name) if name in self._weights.stored else None

    def norm(self, index: int) -> np.ndarray:
        """The weight of the index-th norm of the graph."""
        return self.named(self._norms[index])


def save_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write a safetensors file: the length of a JSON header, the header, the data; all little-endian, deterministic."""
    size = np.dtype(dtype).itemsize
    header: dict[str, Any] = {}
    offset = 0
    for name, array in sorted(tensors.items()):
        end = offset + array.size * size
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(tensors.items()):
            stream.write(np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())


def _written(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    return {CONFIG, ENGINE, WEIGHTS, "reroute_plugin.so"} if CONFIG in names and names & {ENGINE, WEIGHTS} else set()


def _save_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Write directories that TensorRT-LLM 1.0 to 1.2.x reads.")
    parser.add_argument("what", choices=("baseline", "engine"))
    parser.add_argument("folder", type=Path, metavar="DIR", help="an export for baseline, a TensorRT bundle for engine")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--dtype", default="float16", choices=sorted(_DTYPES), help="of the baseline")
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    args = parser.parse_args()
    try:
        if args.what == "baseline":
            write_baseline(args.folder, args.output, dtype=args.dtype, force=args.force)
        else:
            write_engine_directory(args.folder, args.output, force=args.force)
    except RerouteError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
