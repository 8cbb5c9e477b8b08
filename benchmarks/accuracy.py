"""Accuracy of every method at every tier, dense, removal and reroute, from exported engines: one command.

    python benchmarks/accuracy.py                     the table: benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --ablation          decision layers, scoring, positions: accuracy-ablation.json

Each schedule is exported, built, checked against the torch reference and asked the same questions about generated
scenes; answers are greedy. The table asks held-out scenes, which nothing was tuned on; the ablation asks validation
scenes, so that whoever chooses by it has not looked at the held-out ones. Intervals are 95 % bootstrap intervals over
scenes. FLOPs are those of the plan for one image and 64 text tokens; KV rows are measured from the engine's caches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroute.cost import plan_for
from reroute.engines import build
from reroute.evaluation.command import progress
from reroute.evaluation.runner import Run, run_bundles
from reroute.evaluation.scenes import SceneSet
from reroute.evaluation.statistics import Bootstrap
from reroute.evaluation.summary import summarise
from reroute.export import export_checkpoint
from reroute.folders import write_whole
from reroute.runtime import Bundle, Session

TIERS = ("1/3", "2/9", "1/9")
PAIRS = {"fastv": "reroute-fastv", "pdrop": "reroute-pdrop", "nuwa": "reroute-nuwa"}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what to export and how to call it."""

    method: str
    action: str
    tier: str | None
    routing: str


def table_cases() -> list[Case]:
    """Dense, and each method's removal and reroute at each tier."""
    cases = [Case(method="dense", action="dense", tier=None, routing="dense")]
    for tier in TIERS:
        for removal, reroute in PAIRS.items():
            cases.append(Case(method=removal, action="removal", tier=tier, routing=f"{removal}:avg={tier}"))
            cases.append(Case(method=removal, action="reroute", tier=tier, routing=f"{reroute}:avg={tier}"))
    return cases


def ablation_cases() -> list[Case]:
    """One change at a time at 1/9, for the demo model's 24 layers."""
    changes = {
        "reference": (
            "reroute-fastv:avg=1/9",
            "reroute-pdrop:avg=1/9",
            "fastv:avg=1/9",
            "pdrop:avg=1/9",
            "nuwa:avg=1/9",
        ),
        "decision layers": (
            "reroute@2,5:avg=1/9:shape=uniform",
            "reroute@2,11:avg=1/9:shape=uniform",
            "reroute@2,17:avg=1/9:shape=uniform",
            "reroute@2,5,11:avg=1/9:shape=uniform",
            "reroute@2,8,14,20:avg=1/9:shape=uniform",
            "reroute@1,5,11,17:avg=1/9:shape=uniform",
            "reroute@0,5,11,17:avg=1/9:shape=uniform",
            "reroute@2,4,6,8,10,12,14,16,18,20,22:avg=1/9:shape=uniform",
            "removal@17:avg=.74",
            "reroute-nuwa@12,17:avg=1/9",
        ),
        "shape": (
            "reroute-pdrop:avg=1/9:shape=uniform",
            "reroute-pdrop:avg=1/9:shape=geometric",
            "pdrop:avg=1/9:shape=uniform",
        ),
        "scoring": (
            "fastv:avg=1/9:score=previous",
            "reroute-fastv:avg=1/9:score=previous",
            "reroute-pdrop:avg=1/9:score=previous",
            "nuwa:avg=1/9:score=own",
        ),
        "positions": (
            "pdrop:avg=1/9:positions=renumbered",
            "fastv:avg=1/9:positions=renumbered",
            "pdrop:avg=1/3",
            "pdrop:avg=1/3:positions=renumbered",
        ),
    }
    cases = []
    for change, routings in changes.items():
        for routing in routings:
            method = next((name for name in PAIRS if name in routing.partition(":")[0]), "own layers")
            action = "reroute" if routing.startswith("reroute") else "removal"
            cases.append(Case(method=f"{change}: {method}", action=action, tier="1/9", routing=routing))
    return cases


def make_bundle(checkpoint: Path, routing: str, folder: Path) -> Bundle:
    """Export and build; the build's check must pass."""
    export_checkpoint(checkpoint, folder / "export", routing=routing)
    build(folder / "export", folder / "bundle")
    shutil.rmtree(folder / "export")
    return Bundle.open(folder / "bundle")


def rows_of(cases: Sequence[Case], runs: Sequence[Run], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """One row per case: scores with intervals, agreement, cost, what the decisions kept, and what reroute gains."""
    summary = summarise(runs, bootstrap)
    differences = {(d["first"], d["second"]): d for d in summary["differences"]}
    rows = []
    for case, run, entry in zip(cases, runs, summary["bundles"], strict=True):
        manifest = run.bundle.manifest
        plan = plan_for(manifest.model, manifest.schedule, manifest.capacity)
        grounding, vqa = entry["scores"]["grounding"], entry["scores"]["vqa"]
        row: dict[str, Any] = {
            "method": case.method,
            "action": case.action,
            "tier": case.tier,
            "routing": case.routing,
            "decision_layers": list(manifest.schedule.decision_layers),
            "budgets": list(manifest.schedule.budgets),
            "nuwa": manifest.schedule.nuwa,
            "average_visual_tokens": manifest.average_visual_tokens,
            "measured_visual_tokens": entry["measured"]["visual_tokens_per_layer"],
            "kv_bytes": plan.kv_bytes,
            "prefill_flops": plan.decoder_flops + plan.vision_flops,
            "grounding": grounding["accuracy"]["value"],
            "grounding_interval": interval(grounding["accuracy"]),
            "mean_iou": grounding["mean_iou"]["value"],
            "mean_iou_interval": interval(grounding["mean_iou"]),
            "vqa": vqa["accuracy"]["value"],
            "vqa_interval": interval(vqa["accuracy"]),
            "grounding_by_size": {k: v["accuracy"]["value"] for k, v in grounding["by_size"].items()},
            "vqa_by_kind": {k: v["value"] for k, v in vqa["by_kind"].items()},
            "decisions": entry["decisions"],
        }
        if "agreement" in entry:
            row["agreement"] = {k: v["value"] for k, v in entry["agreement"].items() if isinstance(v, dict)}
        twin = next((c for c in cases if (c.method, c.tier, c.action) == (case.method, case.tier, "removal")), None)
        if case.action == "reroute" and twin is not None and case.method in PAIRS:
            gain = difference(differences, case.routing, twin.routing)
            row["gain_over_removal"] = gain
        rows.append(row)
    return rows


def difference(differences: dict[tuple[str, str], Any], first: str, second: str) -> dict[str, Any]:
    """first - second on the same questions, with its interval."""
    sign = 1 if (first, second) in differences else -1
    entry = differences[(first, second) if sign == 1 else (second, first)]
    result = {}
    for skill in ("grounding", "vqa"):
        estimate = entry[skill]["accuracy"]
        bounds = sorted(sign * bound for bound in interval(estimate))
        result[skill] = sign * estimate["value"]
        result[f"{skill}_interval"] = bounds
    return result


def interval(estimate: dict[str, Any]) -> list[float]:
    return [estimate["low"], estimate["high"]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table."""

    def cell(value: float, bounds: Sequence[float]) -> str:
        return f"{100 * value:.1f} ({100 * bounds[0]:.1f}-{100 * bounds[1]:.1f})"

    lines = [
        "| method | action | visual tokens | grounding, % | one-word, % | reroute - removal, points |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.get("gain_over_removal")
        points = f"{100 * gain['grounding']:+.1f} / {100 * gain['vqa']:+.1f}" if gain else ""
        average = f"{row['average_visual_tokens']:.1f}" + (f" ({row['tier']})" if row["tier"] else "")
        lines.append(
            f"| {row['method']} | {row['action']} | {average} | {cell(row['grounding'], row['grounding_interval'])} | "
            f"{cell(row['vqa'], row['vqa_interval'])} | {points} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/model"))
    parser.add_argument("--questions", type=int, default=1000, help="of each skill")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--split", choices=("heldout", "validation"), help="default: what the docstring says")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = ablation_cases() if args.ablation else table_cases()
    split = args.split or ("validation" if args.ablation else "heldout")
    output = args.json or RESULTS / ("accuracy-ablation.json" if args.ablation else "accuracy.json")
    questions = SceneSet(grounding=args.questions, vqa=args.questions, split=split)
    bootstrap = Bootstrap()
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for number, case in enumerate(cases):
            print(f"building {number + 1} of {len(cases)}: {case.routing}", file=sys.stderr, flush=True)
            bundles.append(make_bundle(args.checkpoint, case.routing, Path(folder) / str(number)))
        with progress(len(bundles) * len(questions)) as advance:
            runs = run_bundles(
                bundles,
                questions,
                open_engine=lambda bundle: Session.open(bundle.path, threads=args.threads),
                advance=advance,
            )
        rows = rows_of(cases, runs, bootstrap)
    manifest = runs[0].bundle.manifest
    document = {
        "boundary": "share of questions answered right, greedy, by the exported fp32 engines in ONNX Runtime",
        "questions": {"set": questions.name, "grounding": args.questions, "vqa": args.questions},
        "statistics": {"interval": "95 % bootstrap over scenes", "resamples": bootstrap.resamples},
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "versions": manifest.versions,
        "engine": runs[0].engine,
        "rows": rows,
    }
    write_whole(output, (json.dumps(document, indent=1) + "\n").encode())
    print(table(rows))


if __name__ == "__main__":
    main()
