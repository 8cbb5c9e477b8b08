"""What routing costs: the gain that is left of what the measured costs of the layers allow, and a profile by op.

    python -m benchmarks.costs --profiles fp32,int8

The model. A prefill is what belongs to no layer (embedding, order of the rows, the output matrix for the last row) and
L layers, each of which costs what the number of its rows makes it cost. That cost is measured, not computed: in the
same rounds the *dense* engine of the same profile prefills prompts of exactly the rows of each stage. The last layer
of every engine has one row behind its attention, so it is a part `last` of a layer. With dense(R) the dense engine's
time at R rows, `fixed` what belongs to no layer, and a stage of L_s layers that run R_s = T + min(K_s, N) rows,

    layer(R) = (dense(R) - fixed) / (L - 1 + last)
    allowed = fixed + sum over stages of L_s * layer(R_s) - (1 - last) * layer(R of the last stage)

`fixed` and `last` come from the profile of the dense engine. `last` counts norms and quantisation as if all of them
stood before attention, which makes it larger and `allowed` smaller than they are. Without it `allowed` would have the
cost of one layer too little of its long first stage.

So `allowed` is the time of a routed engine whose routing is free: no scoring, no keys of rows that wait, no gather, no
scatter. `share_of_allowed` is (dense / routed) / (dense / allowed) = allowed / routed, round by round; the aim is 0.95.

Where the rest goes is in the profile, which ONNX Runtime's profiler takes in sessions of their own, because events cost
time: its figures are shares of a run. Routing itself is select, gather and scatter; keys of all rows at a decision
layer ("scoring projection") are a line of their own. The aim is 0.02 of routed prefill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.prefill import TEXT, VISUAL, check_rows
from benchmarks.shared import results
from benchmarks.shared.bundles import DENSE, TIERS
from benchmarks.shared.own import OwnEngine, Prompt, make_prompt
from benchmarks.shared.profile import BEHIND, FIXED, GROUPS, ROUTING, profile
from reroute.bench.report import table
from reroute.bench.statistics import paired_ratio, spread
from reroute.bench.workload import Sample
from reroute.runtime.backend import BackendOptions
from reroute.runtime.ort import OrtBackend
from reroute.schedule import Schedule

QUANTITY = "prefill_ms"
BOUNDARY = {
    QUANTITY: "the decoder's first step: token ids and embeddings of the visual rows on the host to logits of the last "
    "row on the host, caches empty before; profiler off",
    "profile": "shares of ONNX Runtime's `model_run` of the same step, profiler on, medians over runs",
}


def main() -> None:
    """Measure and write."""
    parser = results.options(__doc__, "costs", repeat=20)
    parser.add_argument(
        "--runs", type=int, default=10, help="profiled runs of each engine, after two that do not count"
    )
    args = parser.parse_args()
    machine = results.machine_facts()
    shop = results.workshop(args)
    bundles = {(tier, name): shop.bundle(tier, name) for name in args.profiles for tier in (DENSE, *TIERS)}
    engines = {key: OwnEngine(path, threads=args.threads, spinning=args.spinning) for key, path in bundles.items()}
    schedules = {tier: engines[tier, args.profiles[0]].manifest.schedule for tier in TIERS}
    text = engines[DENSE, args.profiles[0]].manifest.model.text

    def prompt(visual: int) -> Prompt:
        return make_prompt(text=TEXT, visual=visual, hidden=text.hidden_size, vocab=text.vocab_size)

    sizes = sorted({VISUAL, *(rows for one in schedules.values() for rows in one.visual_rows([VISUAL]))})
    runs: dict[tuple[str, int], Callable[[], Sample]] = {}
    for (tier, name), engine in engines.items():
        if tier == DENSE:
            runs |= {(dense_name(name, rows), TEXT): own_run(engine, prompt(rows)) for rows in sizes}
        else:
            runs[routed_name(name, tier), TEXT] = own_run(engine, prompt(VISUAL))
    samples = results.run_rounds(runs, args, "costs")
    candidates = {routed_name(name, tier): engine.facts() for (tier, name), engine in engines.items() if tier != DENSE}
    del engines, runs  # their memory, before the profiled ones load
    profiles: dict[str, Any] = {}
    for (tier, name), path in bundles.items():
        key = dense_name(name, VISUAL) if tier == DENSE else routed_name(name, tier)
        options = BackendOptions(threads=args.threads, spinning=args.spinning)
        profiles[key] = profiled(path, prompt(VISUAL), options, runs=args.runs)
    found = {}
    for name in args.profiles:
        whole = profiles[dense_name(name, VISUAL)]
        fixed = fixed_ms(whole, samples[dense_name(name, VISUAL), TEXT][QUANTITY])
        last = last_layer(whole, text.num_layers)
        for tier, schedule in schedules.items():
            key = routed_name(name, tier)
            dense = {rows: samples[dense_name(name, rows), TEXT][QUANTITY] for rows in sizes}
            found[key] = {
                "profile": name,
                "tier": tier,
                **against_allowed(schedule, dense, samples[key, TEXT][QUANTITY], fixed, last),
                "routing_share": routing_share(profiles[key]),
            }
    data = results.document(
        "costs", args, machine, boundary=BOUNDARY, model=(__doc__ or "").strip(), groups=GROUPS, routing=list(ROUTING),
        shape={"text": TEXT, "visual": VISUAL}, candidates=candidates, found=found, profiles=profiles,
        cells=results.cells(samples),
    )  # fmt: skip
    results.write(args.output, data)
    print("\n".join(markdown(json.loads(json.dumps(data)))))


def dense_name(name: str, visual: int) -> str:
    """`own int8, dense, 576 visual`."""
    return f"own {name}, dense, {visual} visual"


def routed_name(name: str, tier: str) -> str:
    """`own int8, 64`."""
    return f"own {name}, {tier}"


def own_run(engine: OwnEngine, prompt: Prompt) -> Callable[[], Sample]:
    """A prefill; where the prompt has the measured shape, its rows are counted."""

    def run() -> Sample:
        ms, _ = engine.prefill(prompt)
        if len(prompt.embeds) == VISUAL:
            check_rows("our engine", engine.kept, engine.manifest)
        return {QUANTITY: ms}

    return run


def profiled(path: Any, prompt: Prompt, options: BackendOptions, *, runs: int) -> dict[str, Any]:
    """Median milliseconds and shares of a run by group, over `runs` profiled runs."""

    def use(backend: OrtBackend) -> None:
        engine = OwnEngine.of(path, backend)
        for _ in range(runs + 2):
            engine.prefill(prompt)

    return summary(profile(path, use, options)[-runs:])


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over runs by group, and their shares of the median of the whole."""
    total = spread([run["total"] for run in runs]).median
    medians = {group: float(np.median([run.get(group, 0.0) for run in runs])) for group in GROUPS}
    return {
        "runs": len(runs),
        "total_ms": total,
        "ms": medians,
        "share": {group: value / total for group, value in medians.items()},
        "samples": [dict(run) for run in runs],
    }


def fixed_ms(dense: Mapping[str, Any], samples: Sequence[float]) -> float:
    """What belongs to no layer: its share of the dense profile, of the dense time without the profiler."""
    return sum(dense["share"][group] for group in FIXED) * spread(samples).median


def last_layer(dense: Mapping[str, Any], layers: int) -> float:
    """Which part of a layer the last one is: what stands before attention of it all, of what runs in all layers."""
    share = dense["share"]
    behind = sum(share[group] for group in BEHIND) / (layers - 1)
    before = (1 - sum(share[group] for group in (*BEHIND, *FIXED))) / layers
    return before / (before + behind)


def against_allowed(
    schedule: Schedule, dense: Mapping[int, Sequence[float]], routed: Sequence[float], fixed: float, last: float
) -> dict[str, Any]:
    """The module's model, round by round.

    Args:
        schedule: of the routed engine.
        dense: milliseconds of each round by visual rows, for the rows of every stage and for all of them.
        routed: milliseconds of each round.
        fixed: milliseconds that belong to no layer.
        last: part of a layer that the last one is.
    """
    rows = schedule.visual_rows([VISUAL])
    worth = schedule.num_layers - 1 + last

    def layer(count: int, at: int) -> float:
        return (dense[count][at] - fixed) / worth

    allowed = [
        fixed + sum(stage.num_layers * layer(count, at) for stage, count in zip(schedule.stages, rows, strict=True))
        - (1 - last) * layer(rows[-1], at)
        for at in range(len(routed))
    ]  # fmt: skip
    return {
        "fixed_ms": fixed,
        "last_layer": last,
        "allowed_ms": spread(allowed).median,
        "routed_ms": spread(routed).median,
        "dense_ms": spread(dense[VISUAL]).median,
        "speedup": asdict(paired_ratio(dense[VISUAL], routed)),
        "allowed_speedup": asdict(paired_ratio(dense[VISUAL], allowed)),
        "share_of_allowed": asdict(paired_ratio(allowed, routed)),
    }


def routing_share(profile: Mapping[str, Any]) -> float:
    """Select, gather and scatter of a routed prefill: the median over runs of their share of a run."""
    return float(
        np.median([sum(run.get(group, 0.0) for group in ROUTING) / run["total"] for run in profile["samples"]])
    )


def markdown(data: dict[str, Any]) -> list[str]:
    """What is left of the allowed gain, and the profile by op."""
    lines = table(
        ("", "dense / routed", "allowed", "share of allowed", "routing itself"),
        [
            (
                key,
                f"{one['speedup']['value']:.2f}",
                f"{one['allowed_speedup']['value']:.2f}",
                f"{one['share_of_allowed']['value']:.3f} "
                f"[{one['share_of_allowed']['low']:.3f}-{one['share_of_allowed']['high']:.3f}]",
                f"{one['routing_share']:.2%}",
            )
            for key, one in data["found"].items()
        ],
    )
    names = list(data["profiles"])
    rows = [
        (group, *(f"{data['profiles'][name]['ms'][group]:.2f} ({data['profiles'][name]['share'][group]:.1%})"
                  for name in names))
        for group in data["groups"]
        if any(data["profiles"][name]["ms"][group] for name in names)
    ]  # fmt: skip
    lines += ["", *table(("ms of a run (share)", *names), rows), ""]
    return lines + [f"- {group}: {words}." for group, words in data["groups"].items()]


if __name__ == "__main__":
    results.guarded(main)
