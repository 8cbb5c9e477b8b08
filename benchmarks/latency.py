"""Latency and cache bytes of several bundles of one model, interleaved, against transformers' own dense forward.

    python benchmarks/latency.py out/dense out/ninth --checkpoint demo/model --json benchmarks/results/demo.json

What a figure includes:

* vision: `Backend.encode`, pixel values on the host to visual embeddings on the host.
* prefill: `Backend.step` of one image prompt, embeddings on the host to logits of the last row on the host; the
  caches are empty before it. Image decoding, tokenisation, sampling and the vision tower are not in it.
* decode: `Backend.step` of one text token, mean of `--tokens` steps that follow the prompt.
* torch rows: the language model of `LlavaForConditionalGeneration` with a cache, `logits_to_keep=1`, as many rows.

Every round runs every candidate once, in a new random order; figures are medians over rounds, with the quartiles in the
JSON next to the raw samples. One process, two warm-up rounds that are thrown away.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reroute import scenario as scenarios
from reroute.runtime.backend import BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions

Sample = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path, help="also time transformers on this checkpoint, fp32 and bf16")
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="decode steps")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    candidates: dict[str, Callable[[], Sample]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for path in args.bundles:
        name, run, about = engine(path, args)
        candidates[name], facts[name] = run, about
    if args.checkpoint:
        for dtype in ("float32", "bfloat16"):
            candidates[f"transformers {dtype}, dense"] = torch_dense(args.checkpoint, dtype, args)
    samples = interleave(candidates, args.rounds)
    result = {
        "boundary": (__doc__ or "").partition("What a figure includes:")[2].strip(),
        "machine": {"cpu": cpu_name(), "python": platform.python_version(), "system": platform.system()},
        "settings": {"text": args.text, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads},
        "rows": [{"name": name, **facts.get(name, {}), **summary(samples[name])} for name in candidates],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result["rows"]))


def engine(path: Path, args: argparse.Namespace) -> tuple[str, Callable[[], Sample], dict[str, Any]]:
    """A candidate that runs one bundle."""
    bundle = Bundle.open(path)
    manifest, model = bundle.manifest, bundle.manifest.model
    backend = open_backend(bundle, BackendOptions(threads=args.threads))
    probe = scenarios.probe(model)
    words = np.resize(probe.prompt_ids[probe.prompt_ids != model.tokens.image_token_id], args.text)
    ids = [*words[:2].tolist(), model.tokens.image_token_id, *words[2:].tolist()]
    prompt = lay_out(
        ids,
        image_token=model.tokens.image_token,
        image_token_id=model.tokens.image_token_id,
        num_images=1,
        tokens_per_image=manifest.schedule.entering(model.vision.tokens_per_image),
    )
    token = Layout.of_text(words[:1].tolist())
    positions = Positions(manifest)

    def run() -> Sample:
        backend.reset()
        start = time.perf_counter()
        visual = backend.encode(probe.pixel_values)
        vision = time.perf_counter() - start
        shift = positions.shift(visual)
        inputs = positions.inputs(prompt, visual, backend.lengths)
        start = time.perf_counter()
        backend.step(inputs)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(args.tokens):
            backend.step(positions.inputs(token, None, backend.lengths, shift=shift))
        decode = (time.perf_counter() - start) / args.tokens
        return {"vision_ms": vision * 1e3, "prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3}

    stages = manifest.schedule.stages
    entering = manifest.schedule.entering(model.vision.tokens_per_image)
    rows = sum(s.num_layers * (args.text + s.visual_rows(entering)) for s in stages)
    about = {
        "routing": manifest.routing,
        "average_visual_tokens": manifest.average_visual_tokens,
        "kv_bytes": rows * 2 * model.text.num_kv_heads * model.text.head_dim * 4,
        "cache_bytes": backend.cache_bytes,
    }
    return manifest.routing, run, about


def torch_dense(checkpoint: Path, dtype: str, args: argparse.Namespace) -> Callable[[], Sample]:
    """A candidate that runs transformers' language model, dense, on random embeddings of the same lengths."""
    import torch
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = args.text + model.config.image_seq_length
    embeds = torch.randn(1, rows, model.config.text_config.hidden_size).to(model.dtype)
    token = torch.tensor([[5]])

    @torch.no_grad()
    def run() -> Sample:
        start = time.perf_counter()
        out = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        cache = out.past_key_values
        assert cache.get_seq_length() == rows, "the dense baseline did not fill its cache"
        start = time.perf_counter()
        for _ in range(args.tokens):
            cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        decode = (time.perf_counter() - start) / args.tokens
        return {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3}

    return run


def interleave(candidates: dict[str, Callable[[], Sample]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run every candidate once a round, in a new order each time; two rounds of warm-up are dropped."""
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in candidates}
    order = random.Random(0)
    for number in range(rounds + 2):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            for key, value in candidates[name]().items():
                if number >= 2:
                    samples[name][key].append(value)
    return samples


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles of each quantity, and the raw samples."""
    result: dict[str, Any] = {}
    for key, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result |= {key: middle, f"{key}_quartiles": [low, high], f"{key}_samples": [round(v, 4) for v in values]}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | visual tokens per layer | vision ms | prefill ms | decode ms/token | KV of the prompt, KiB |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        average = f"{row['average_visual_tokens']:.1f}" if "average_visual_tokens" in row else "all"
        kv = f"{row['kv_bytes'] / 1024:.0f}" if "kv_bytes" in row else ""
        vision = f"{row['vision_ms']:.1f}" if "vision_ms" in row else ""
        cells = (row["name"], average, vision, f"{row['prefill_ms']:.1f}", f"{row['decode_ms']:.2f}", kv)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's name, from Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
