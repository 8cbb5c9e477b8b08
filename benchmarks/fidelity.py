"""What the profiles int8 and int4 do to the demo model: slots and answers of float32 that remain.

    python -m benchmarks.fidelity            -> benchmarks/results/fidelity.json and a table
    python -m benchmarks.fidelity --kernels out/plugins/cpu/libreroute_onnxruntime.so      and with the kernels

Each bundle is built as `reroute build EXPORT --profile P --evaluate` builds it, so int4 climbs to the first rung that
keeps 99 % of the slots. Questions are held-out scenes, which no rule was chosen by. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.shared.bundles import WITH_KERNELS
from reroute import report
from reroute.engines import build
from reroute.errors import GateError
from reroute.evaluation.fidelity import Fidelity, fidelity
from reroute.evaluation.scenes import SceneSet
from reroute.export import export_checkpoint
from reroute.folders import write_whole
from reroute.runtime import Session

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "fidelity.json"
ROUTINGS = ("reroute-pdrop:avg=1/9", "reroute-pdrop:avg=1/3", "reroute-fastv:avg=1/9")
PROFILES = ("int8", "int4")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--questions", type=int, default=200, help="for a box, and as many one-word ones (default 200)")
    parser.add_argument("--kernels", type=Path, help="library of plugins_cpp/onnxruntime: each profile also with it")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    args = parser.parse_args()
    questions = SceneSet(grounding=args.questions, vqa=args.questions, split="heldout")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for routing in ROUTINGS:
            export = Path(name) / "export"
            export_checkpoint(args.checkpoint, export, routing=routing, force=True)
            for kernels in (None, args.kernels) if args.kernels else (None,):
                rows += [measure(export, Path(name) / "bundle", profile, questions, kernels) for profile in PROFILES]
    data = {"kind": "fidelity", "questions": questions.name, "count": len(questions), "rows": rows}
    write_whole(args.output, (json.dumps(data, indent=2) + "\n").encode())
    print(to_markdown(data))


def measure(export: Path, bundle: Path, profile: str, questions: SceneSet, kernels: Path | None = None) -> Json:
    """Build a profile with its questions; a row of the result. Exits with 3 where no rung meets the gate."""
    tries: list[Json] = []

    def compare(base: Path, made: Path) -> Fidelity:
        opened = (partial(Session.open, path, verify=False) for path in (base, made))
        first, second = opened
        with report.progress(len(questions), f"questions, {profile}") as advance:
            found = fidelity(first, second, questions, advance=advance)
        tries.append(found.to_dict())
        return found

    try:
        manifest = build(export, bundle, profile=profile, kernels=kernels, evaluate=compare, force=True)
    except GateError as error:
        print(f"{profile}: {error.message}", file=sys.stderr)
        raise SystemExit(3) from error
    return {
        "routing": manifest.routing,
        "profile": profile,
        "built": manifest.profile + (WITH_KERNELS if manifest.kernels else ""),
        "bytes": manifest.estimates["weight_bytes"],
        "tries": tries,
    }


def to_markdown(data: Json) -> str:
    """The table of the README."""
    lines = [
        "| routing | profile | kept tokens that float32 keeps | equal answers | grounding, % (float32) "
        "| one-word, % (float32) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        last = row["tries"][-1]
        pairs = [last["scores"][skill] for skill in ("grounding", "vqa")]
        scores = [f"{100 * own:.1f} ({100 * base:.1f})" for base, own in pairs]
        names = [f"`{row['routing']}`", f"`{row['built']}`"]
        cells = [*names, f"{100 * last['slots']:.2f} %", f"{100 * last['answers']:.1f} %"]
        lines.append("| " + " | ".join([*cells, *scores]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
