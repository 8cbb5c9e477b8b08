"""`reroute bench` with transformers' own dense forward beside the bundles, in the same rounds.

    python benchmarks/latency.py out/dense out/ninth --checkpoint demo/model --text 64 --repeat 30 -o out/latency

The bundles are measured by `reroute.bench`, which says what its figures include. The rows of transformers are the
language model of `LlavaForConditionalGeneration` with a cache and `logits_to_keep=1`, on random embeddings of as many
rows:

* prefill: the prompt's forward. Vision is not run, so there is no vision and no end-to-end figure.
* decode: forward of one token, mean over the decode steps.

Like the bundles, they run in the rounds' random order and start from empty caches; their memory is not measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from reroute.bench.bench_command import bench, settings_of, write, written
from reroute.bench.measure import Settings, names_of, open_bundles
from reroute.bench.report import to_markdown
from reroute.bench.workload import Sample
from reroute.cli import add_measurement
from reroute.errors import RerouteError
from reroute.folders import check_output
from reroute.report import print_error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path, required=True, help="time transformers on this, fp32 and bf16")
    add_measurement(parser, repeat=10)
    parser.add_argument("-o", "--output", type=Path, help="write bench.json, bench.csv and bench.md there")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    try:
        if args.output:
            check_output(args.output, force=args.force, written=written)
        settings = settings_of(args)
        bundles = open_bundles(args.bundles, settings)
        extras = {
            f"transformers {dtype}, dense": partial(torch_dense, args.checkpoint, dtype, settings)
            for dtype in ("float32", "bfloat16")
        }
        data = bench(dict(zip(names_of(bundles), bundles, strict=True)), settings, extras=extras)
        print(to_markdown(data), end="")
        if args.output:
            write(args.output, data, force=args.force)
    except RerouteError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)


def torch_dense(checkpoint: Path, dtype: str, settings: Settings, text: int) -> Callable[[], Sample]:
    """A candidate that runs transformers' language model, dense, on random embeddings of the prompt's length."""
    import torch
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows = text + settings.images * model.config.image_seq_length
    embeds = torch.randn(1, rows, model.config.text_config.hidden_size).to(model.dtype)
    token = torch.tensor([[5]])

    @torch.no_grad()
    def run() -> Sample:
        start = time.perf_counter()
        out = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        cache = out.past_key_values
        if cache.get_seq_length() != rows:
            raise RuntimeError(f"the dense baseline cached {cache.get_seq_length()} rows of {rows}")
        start = time.perf_counter()
        for _ in range(settings.tokens):
            cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        decode = (time.perf_counter() - start) / settings.tokens
        return {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3}

    return run


if __name__ == "__main__":
    main()
