"""Prefill as the work grows: against the visual tokens, 144 to 2304, and against the text, dense and routed.

    python -m benchmarks.scaling --profiles fp32,int8

The decoder graph is dynamic in both, so one dense and one routed bundle run every size, on random embeddings; the
vision tower is not run. Budgets are numbers of tokens and stay those of 576 visual tokens: a routed engine's later
stages do not grow with the image, and the rest of its growth is the layers before the first decision and the scoring.
Writes the JSON, and the figure docs/scaling.svg (see plot_scaling.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plot_scaling
from benchmarks.shared import results
from benchmarks.shared.bundles import DENSE, REPOSITORY, TIERS
from benchmarks.shared.own import OwnEngine, make_prompt
from reroute.bench.report import table
from reroute.bench.workload import Sample
from reroute.cli import grid
from reroute.errors import RerouteError, UserError

TEXT, VISUAL = 64, 576
QUANTITY = "prefill_ms"
BOUNDARY = {
    QUANTITY: "the decoder's first step: token ids and embeddings of the visual rows on the host to logits of the last "
    "row on the host, caches empty before; the vision tower is not run"
}


def main() -> None:
    """Measure, write, draw."""
    parser = results.options(__doc__, "scaling", repeat=10)
    parser.add_argument(
        "--visual", type=grid, default=(144, 288, 576, 1152, 2304), metavar="N,N", help=f"at {TEXT} text"
    )
    parser.add_argument("--text", type=grid, default=(32, 64, 128, 256, 512, 1024), metavar="T,T", help=f"at {VISUAL}")
    parser.add_argument("--tiers", default="64", metavar="A,A", help=f"of {', '.join(TIERS)}")
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "docs" / "scaling.svg")
    args = parser.parse_args()
    tiers = tuple(args.tiers.split(","))
    if unknown := [tier for tier in tiers if tier not in TIERS]:
        raise UserError(f"there is no tier {unknown[0]!r}", hint=f"tiers are {', '.join(TIERS)}")
    machine = results.machine_facts()
    longest = max(args.visual)
    shop = results.workshop(args, max_text=max(args.text) + 128, max_images=-(-longest // VISUAL))
    engines = {
        f"own {profile}, {tier}": OwnEngine(shop.bundle(tier, profile), threads=args.threads, spinning=args.spinning)
        for profile in args.profiles
        for tier in (DENSE, *tiers)
    }
    by_visual = {(name, size): prefill(engine, TEXT, size) for name, engine in engines.items() for size in args.visual}
    by_text = {(name, size): prefill(engine, size, VISUAL) for name, engine in engines.items() for size in args.text}
    visual = results.run_rounds(by_visual, args, "visual tokens")
    text = results.run_rounds(by_text, args, "text tokens")
    data = results.document(
        "scaling",
        args,
        machine,
        boundary=BOUNDARY,
        candidates={name: engine.facts() for name, engine in engines.items()},
        tiers=tiers,
        visual={"text": TEXT, "cells": results.cells(visual)},
        text={"visual": VISUAL, "cells": results.cells(text)},
    )
    results.write(args.output, data)
    data = json.loads(json.dumps(data))
    plot_scaling.draw(data, args.figure)
    print("\n".join(markdown(data)))


def prefill(engine: OwnEngine, text: int, visual: int) -> Callable[[], Sample]:
    """One prefill of `text` + `visual` rows, whose rows are counted."""
    model = engine.manifest.model.text
    prompt = make_prompt(text=text, visual=visual, hidden=model.hidden_size, vocab=model.vocab_size)
    schedule = engine.manifest.schedule
    rows = schedule.visual_rows([visual])
    expected = [text + rows[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers)]

    def run() -> Sample:
        ms, _ = engine.prefill(prompt)
        if engine.kept != expected:
            raise RerouteError(f"{engine.manifest.routing} kept {engine.kept} rows, not {expected}")
        return {QUANTITY: ms}

    return run


def markdown(data: dict[str, Any]) -> list[str]:
    """One table for each axis."""
    lines: list[str] = []
    for axis, other in (("visual", "text"), ("text", "visual")):
        cells = data[axis]["cells"]
        sizes = sorted({cell["size"] for cell in cells})
        medians = {(cell["candidate"], cell["size"]): cell["summary"][QUANTITY]["median"] for cell in cells}
        head = f"prefill, ms, by {axis} tokens ({data[axis][other]} {other})"
        rows = [(name, *(f"{medians[name, size]:.0f}" for size in sizes)) for name in data["candidates"]]
        lines += [*table((head, *map(str, sizes)), rows), ""]
    return lines[:-1]


if __name__ == "__main__":
    results.guarded(main)
