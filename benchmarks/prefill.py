"""Prefill: our engine, transformers dense, and the authors' code on equal weights and budgets, in the same rounds.

    python -m benchmarks.prefill --profiles fp32,int8 --authors CODE --transformers TF

CODE is a clone of github.com/elmma/mllm-reroute, TF a folder with transformers 5.4.0, which it needs (see README.md
here). Everything else is made: checkpoint, exports, bundles. The prompt is 576 visual and 64 text tokens; tiers are
averages of visual tokens per layer, and every candidate of a tier has the same decision layers and budgets.

The authors' code has two ways to run a reroute schedule, compact_route and compact_route_stagewise. Both are measured;
`speedup_over_authors_bf16` is against the faster one of each tier. Its "dense" is against transformers' dense bf16:
what their code is without routing.

In every single run the rows in each layer's cache are compared with what the schedule says, on both sides: an engine
that did not route, or kept another number of tokens, ends the measurement. Before the rounds each candidate's last
logits and kept tokens are compared with those of the float32 models (`agreement`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import results
from benchmarks.shared.bundles import DENSE, REPOSITORY, TIERS, best_of
from benchmarks.shared.own import OwnEngine, Prompt, compare_logits, make_prompt
from benchmarks.shared.worker import Worker
from reroute.bench.report import table
from reroute.bench.statistics import spread
from reroute.bench.workload import Sample
from reroute.errors import RerouteError
from reroute.manifest import Manifest

TEXT, VISUAL = 64, 576
ACTIONS = ("compact_route", "compact_route_stagewise")
DTYPES = ("bfloat16", "float32")
SCRIPT = REPOSITORY / "benchmarks" / "peers" / "torch_worker.py"
BOUNDARY = {
    "own": "the decoder's first step: token ids and embeddings of the visual rows on the host to logits of the last "
    "row on the host, caches empty before",
    "transformers": "forward of LlavaForConditionalGeneration (sdpa, use_cache, logits_to_keep=1): token ids to logits "
    "of the last row, from an empty cache; image features are given, `get_image_features` returns stored ones",
    "authors": "the same forward with their patches on; putting them on and off is not in it",
    "excluded": "in none of them: the vision tower, loading, tokenizing, making positions' tables (ours: they are made "
    "once; torch makes its own in each forward)",
}


def main() -> None:
    """Measure and write."""
    parser = results.options(__doc__, "prefill", repeat=30)
    peers = REPOSITORY / "out" / "benchmark"
    parser.add_argument("--authors", type=Path, default=peers / "mllm-reroute", help="clone of their code")
    parser.add_argument(
        "--transformers", type=Path, default=peers / "transformers-5.4.0", help="folder to import it from"
    )
    parser.add_argument("--without-authors", action="store_true", help="our engine and transformers only")
    args = parser.parse_args()
    if not args.without_authors:
        results.need([args.authors / "models" / "patching.py"], "the authors' code")
        results.need([args.transformers / "transformers" / "__init__.py"], "transformers 5.4.0")
    machine = results.machine_facts()
    shop = results.workshop(args)
    bundles = {(tier, profile): shop.bundle(tier, profile) for profile in args.profiles for tier in (DENSE, *TIERS)}
    with ExitStack() as stack:
        logs = args.work / "logs"
        start = [sys.executable, str(SCRIPT), str(shop.model()), str(args.threads), ",".join(DTYPES)]
        hf = stack.enter_context(Worker(start, log=logs / "transformers.log", threads=args.threads))
        authors = None
        if not args.without_authors:
            path = (args.transformers, args.authors)
            authors = stack.enter_context(Worker(start, log=logs / "authors.log", threads=args.threads, path=path))
        engines = {key: OwnEngine(path, threads=args.threads, spinning=args.spinning) for key, path in bundles.items()}
        manifests = {tier: engines[tier, args.profiles[0]].manifest for tier in (DENSE, *TIERS)}
        text = manifests[DENSE].model.text
        prompt = make_prompt(text=TEXT, visual=VISUAL, hidden=text.hidden_size, vocab=text.vocab_size)
        file = str(prompt.save(args.work / "prefill.npz", manifests[DENSE].model.tokens.image_token_id))
        agreement = agree(engines, hf, authors, prompt, file)
        runs: dict[tuple[str, int], Callable[[], Sample]] = {}
        for (tier, profile), engine in engines.items():
            runs[own_name(profile, tier), TEXT] = own_run(engine, prompt)
        for dtype in DTYPES:
            runs[hf_name(dtype), TEXT] = torch_run(hf, file, dtype, manifests[DENSE], None)
            for tier in TIERS if authors is not None else ():
                for action in ACTIONS:
                    assert authors is not None
                    runs[authors_name(dtype, action, tier), TEXT] = torch_run(
                        authors, file, dtype, manifests[tier], action
                    )
        samples = results.run_rounds(runs, args, "prefill")
        facts = {own_name(profile, tier): engine.facts() for (tier, profile), engine in engines.items()}
        workers = {"transformers": hf.facts, **({"authors": authors.facts} if authors else {})}
    data = results.document(
        "prefill",
        args,
        machine,
        boundary=BOUNDARY,
        shape={"text": TEXT, "visual": VISUAL},
        schedules={
            tier: {"layers": list(one.schedule.decision_layers), "keep": list(one.schedule.budgets),
                   "average_visual_tokens": one.average_visual_tokens}
            for tier, one in manifests.items()
        },
        candidates=facts,
        workers=workers,
        agreement=agreement,
        **speedups(samples, args.profiles, with_authors=authors is not None),
        cells=results.cells(samples),
    )  # fmt: skip
    results.write(args.output, data)
    print("\n".join(markdown(json.loads(json.dumps(data)))))


def own_name(profile: str, tier: str) -> str:
    """`own int8, 64`."""
    return f"own {profile}, {tier}"


def hf_name(dtype: str) -> str:
    """`transformers bfloat16, dense`."""
    return f"transformers {dtype}, dense"


def authors_name(dtype: str, action: str, tier: str) -> str:
    """`authors bfloat16 compact_route, 64`."""
    return f"authors {dtype} {action}, {tier}"


def expected_rows(manifest: Manifest) -> list[int]:
    """Cache rows of each layer after the prompt."""
    rows = manifest.schedule.visual_rows([VISUAL])
    schedule = manifest.schedule
    return [TEXT + rows[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers)]


def check_rows(who: str, found: list[int], manifest: Manifest) -> None:
    """Refuse a run that kept something else. Raises RerouteError."""
    if found != (expected := expected_rows(manifest)):
        layer = next((at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise RerouteError(
            f"{who} cached {found[layer] if layer < len(found) else 0} rows in layer {layer}, the schedule "
            f"{manifest.routing} says {expected[layer] if layer < len(expected) else 0}",
            hint="it did not route, or not with these budgets: the figures would not compare",
        )


def own_run(engine: OwnEngine, prompt: Prompt) -> Callable[[], Sample]:
    """One of our prefills."""

    def run() -> Sample:
        ms, _ = engine.prefill(prompt)
        check_rows("our engine", engine.kept, engine.manifest)
        return {"prefill_ms": ms}

    return run


def torch_run(worker: Worker, file: str, dtype: str, manifest: Manifest, action: str | None) -> Callable[[], Sample]:
    """One prefill of a torch worker; `action` None is dense."""
    schedule = schedule_of(manifest, action)

    def run() -> Sample:
        found = worker.call("prefill", prompt=file, dtype=dtype, schedule=schedule)
        check_rows("transformers" if action is None else "the authors' code", found["rows"], manifest)
        return {"prefill_ms": found["prefill_ms"]}

    return run


def schedule_of(manifest: Manifest, action: str | None) -> dict[str, Any] | None:
    """What the authors' router needs."""
    if action is None:
        return None
    schedule = manifest.schedule
    return {"action": action, "layers": list(schedule.decision_layers), "keep": list(schedule.budgets)}


def agree(
    engines: dict[tuple[str, str], OwnEngine], hf: Worker, authors: Worker | None, prompt: Prompt, file: str
) -> dict[str, Any]:
    """Each of our engines against the torch code of its tier in float32: last logits, and the share of kept tokens."""
    references: dict[str, Any] = {DENSE: hf.call("prefill", prompt=file, dtype="float32", logits=True)}
    found: dict[str, Any] = {}
    for (tier, profile), engine in engines.items():
        if tier != DENSE and authors is None:
            continue
        if tier not in references:
            assert authors is not None
            schedule = schedule_of(engine.manifest, ACTIONS[0])
            references[tier] = authors.call("prefill", prompt=file, dtype="float32", schedule=schedule, logits=True)
        check_rows("the reference in float32", references[tier]["rows"], engine.manifest)
        _, outputs = engine.prefill(prompt)
        entry = compare_logits(outputs.logits[0], references[tier]["logits"])
        if tier != DENSE:
            entry["kept_equal"] = kept_equal(outputs.routes, references[tier]["kept"], prompt)
        found[own_name(profile, tier)] = entry
    return found


def kept_equal(routes: tuple[np.ndarray, ...], theirs: list[list[int]], prompt: Prompt) -> list[float]:
    """For each decision the share of kept visual tokens that both sides kept."""
    shares = []
    for route, kept in zip(routes, theirs, strict=True):
        ours = {int(slot) - prompt.before for slot in route[0]} & set(range(len(prompt.embeds)))
        shares.append(len(ours & set(kept)) / len(kept))
    return shares


def speedups(samples: results.Samples, profiles: tuple[str, ...], *, with_authors: bool) -> dict[str, Any]:
    """`speedup_over_authors_bf16`: by tier for one profile, and by profile with intervals.

    The one is int8 where measured, with kernels rather than without.
    """
    by_profile: dict[str, Any] = {}
    baselines = {DENSE: hf_name("bfloat16")}
    for tier in TIERS if with_authors else ():
        names = [authors_name("bfloat16", action, tier) for action in ACTIONS]
        baselines[tier] = min(names, key=lambda name: spread(samples[name, TEXT]["prefill_ms"]).median)
    for profile in profiles:
        by_profile[profile] = {
            tier: results.ratio(samples, (name, TEXT), (own_name(profile, tier), TEXT), "prefill_ms")
            for tier, name in baselines.items()
        }
    chosen = best_of("int8", profiles) or profiles[0]
    return {
        "speedup_over_authors_bf16": {tier: one["value"] for tier, one in by_profile[chosen].items()},
        "speedup_profile": chosen,
        "speedup_by_profile": by_profile,
        "speedup_baselines": baselines,
    }


def markdown(data: dict[str, Any]) -> list[str]:
    """Medians by candidate and tier, then the ratios."""
    medians = {cell["candidate"]: cell["summary"]["prefill_ms"]["median"] for cell in data["cells"]}
    rows: dict[str, dict[str, str]] = {}
    for name, value in medians.items():
        who, _, tier = name.rpartition(", ")
        rows.setdefault(who, {})[tier] = f"{value:.0f}"
    tiers = (DENSE, *reversed(list(TIERS)))
    lines = table(("prefill, ms", *tiers), [(who, *(row.get(tier, "") for tier in tiers)) for who, row in rows.items()])
    lines.append("")
    found = data["speedup_by_profile"]
    lines += table(
        ("times faster than the authors' bf16 (dense: transformers' bf16)", *tiers),
        [(name, *(_times(one.get(tier)) for tier in tiers)) for name, one in found.items()],
    )
    return lines


def _times(ratio: dict[str, float] | None) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}-{ratio['high']:.2f}]" if ratio else ""


if __name__ == "__main__":
    results.guarded(main)
