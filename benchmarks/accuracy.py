"""Accuracy of every method at every tier, dense, removal and reroute, from exported engines: one command.

    python benchmarks/accuracy.py                     the table: benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --ablation          decision layers, scoring, positions: accuracy-ablation.json

The paper's table, for whoever has LLaVA-1.5 and the data, one dataset at a time (docs/evaluation.md):

    python benchmarks/accuracy.py --checkpoint llava-1.5-7b-hf --published --set refcoco --data RefCOCO --json out.json

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

from reroute.cli import add_question_set
from reroute.cost import plan_for
from reroute.engines import build
from reroute.evaluation.command import SCENES, question_set
from reroute.evaluation.questions import QuestionSet
from reroute.evaluation.runner import TOGETHER_BYTES, Run, run_bundles
from reroute.evaluation.statistics import Bootstrap
from reroute.evaluation.summary import summarise
from reroute.export import export_checkpoint
from reroute.folders import write_whole
from reroute.published import PUBLISHED
from reroute.report import progress
from reroute.runtime import Bundle, Session

TIERS = {"1/3": 192, "2/9": 128, "1/9": 64}
PAIRS = {"fastv": "reroute-fastv", "pdrop": "reroute-pdrop", "nuwa": "reroute-nuwa"}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what to export and how to call it."""

    method: str
    action: str
    tier: str | None
    routing: str


def table_cases(*, published: bool = False) -> list[Case]:
    """Dense, and each method's removal and reroute at each tier; `published`: with LLaVA-1.5-7B's printed ratios."""
    cases = [Case(method="dense", action="dense", tier=None, routing="dense")]
    for tier, tokens in TIERS.items():
        for removal, reroute in PAIRS.items():
            for action, name in (("removal", removal), ("reroute", reroute)):
                printed = f"llava15/avg{tokens}/{name}"
                use = published and printed in PUBLISHED  # reroute-nuwa is this project's
                routing = f"published:{printed}" if use else f"{name}:avg={tier}"
                cases.append(Case(method=removal, action=action, tier=tier, routing=routing))
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
            tier = next((tier for tier in TIERS if f"avg={tier}" in routing), None)
            cases.append(Case(method=f"{change}: {method}", action=action, tier=tier, routing=routing))
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
            **scores_of(entry["scores"]),
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


def scores_of(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores of the skills that the questions have."""
    row: dict[str, Any] = {}
    if grounding := scores.get("grounding"):
        row["grounding"] = grounding["accuracy"]["value"]
        row["grounding_interval"] = interval(grounding["accuracy"])
        row["mean_iou"] = grounding["mean_iou"]["value"]
        row["mean_iou_interval"] = interval(grounding["mean_iou"])
        row["grounding_by_size"] = {size: part["accuracy"]["value"] for size, part in grounding["by_size"].items()}
    if vqa := scores.get("vqa"):
        row["vqa"] = vqa["accuracy"]["value"]
        row["vqa_interval"] = interval(vqa["accuracy"])
        row["vqa_by_kind"] = {kind: part["value"] for kind, part in vqa["by_kind"].items()}
    return row


def difference(differences: dict[tuple[str, str], Any], first: str, second: str) -> dict[str, Any]:
    """first - second on the same questions, with its interval."""
    sign = 1 if (first, second) in differences else -1
    entry = differences[(first, second) if sign == 1 else (second, first)]
    result = {}
    for skill in ("grounding", "vqa"):
        if skill in entry:
            estimate = entry[skill]["accuracy"]
            result[skill] = sign * estimate["value"] + 0.0  # no minus in front of zero
            result[f"{skill}_interval"] = sorted(sign * bound + 0.0 for bound in interval(estimate))
    return result


def interval(estimate: dict[str, Any]) -> list[float]:
    return [estimate["low"], estimate["high"]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table."""

    def cell(row: dict[str, Any], skill: str) -> str:
        if skill not in row:
            return ""
        low, high = row[f"{skill}_interval"]
        return f"{100 * row[skill]:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    lines = [
        "| method | action | visual tokens | grounding, % | one-word, % | reroute - removal, points |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.get("gain_over_removal")
        points = (
            " / ".join(f"{100 * gain[skill]:+.1f}" for skill in ("grounding", "vqa") if skill in gain) if gain else ""
        )
        average = f"{row['average_visual_tokens']:.1f}" + (f" ({row['tier']})" if row["tier"] else "")
        cells = (row["method"], row["action"], average, cell(row, "grounding"), cell(row, "vqa"), points)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/ablation.md: what was changed, the scores, and what each decision brought back and kept."""
    lines = [
        "| change | routing | grounding, % | one-word, % | kept (came back) at each decision | object kept, % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        decisions = [decision for decision in row["decisions"] if decision["layer"] is not None]
        kept = ", ".join(f"{d['layer']}: {d['kept']:.0f} ({d['returned']:.0f})" for d in decisions)
        found = ", ".join(f"{100 * d['object']['grounding']['any']['value']:.0f}" for d in decisions)
        scores = [f"{100 * row[skill]:.1f}" for skill in ("grounding", "vqa")]
        change = row["method"].partition(":")[0]
        lines.append(f"| {change} | `{row['routing']}` | {scores[0]} | {scores[1]} | {kept} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/model"))
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument(
        "--published", action="store_true", help="the ratios printed for LLaVA-1.5-7B, where there are any"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="default: in benchmarks/results")
    add_question_set(parser)
    args = parser.parse_args()
    cases = ablation_cases() if args.ablation else table_cases(published=args.published)
    if args.set == SCENES and args.ablation and args.split is None:
        args.split = "validation"
    output = args.json or RESULTS / ("accuracy-ablation.json" if args.ablation else "accuracy.json")
    questions = question_set(args)
    bootstrap = Bootstrap()
    runs = run_cases(args.checkpoint, cases, questions, args.threads)
    manifest = runs[0].bundle.manifest
    skills = [question.skill for question in questions]
    document = {
        "boundary": "share of questions answered right, greedy, by the exported fp32 engines in ONNX Runtime",
        "questions": {"set": questions.name, "grounding": skills.count("grounding"), "vqa": skills.count("vqa")},
        "statistics": {"interval": "95 % bootstrap over images", "resamples": bootstrap.resamples},
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "versions": manifest.versions,
        "engine": runs[0].engine,
        "rows": rows_of(cases, runs, bootstrap),
    }
    write_whole(output, (json.dumps(document, indent=1) + "\n").encode())
    print(ablation_table(document["rows"]) if args.ablation else table(document["rows"]))


def run_cases(checkpoint: Path, cases: Sequence[Case], questions: QuestionSet, threads: int | None) -> list[Run]:
    """Build and ask every case: small models all at once, large ones one after the other, each deleted when done."""
    runs: list[Run] = []
    left = list(cases)
    together = 1
    while left:
        with tempfile.TemporaryDirectory() as folder:
            bundles: list[Bundle] = []
            while left and len(bundles) < together:
                print(
                    f"building {len(runs) + len(bundles) + 1} of {len(cases)}: {left[0].routing}",
                    file=sys.stderr,
                    flush=True,
                )
                bundles.append(make_bundle(checkpoint, left.pop(0).routing, Path(folder) / str(len(bundles))))
                size = sum(file.bytes for file in bundles[0].manifest.files.values())
                together = max(1, TOGETHER_BYTES // size)
            with progress(len(bundles) * len(questions), "answers") as advance:
                runs += run_bundles(
                    bundles,
                    questions,
                    open_engine=lambda bundle: Session.open(bundle.path, threads=threads),
                    advance=advance,
                )
    return runs


if __name__ == "__main__":
    main()
