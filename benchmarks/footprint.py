"""Memory and start: peak RSS of a session by profile and tier, bundle load time, time of `import reroute.runtime`.

    python -m benchmarks.footprint --profiles fp32,int8,int4

Every figure is of fresh processes. A session is `python -m reroute.bench.memory`, as in `reroute bench`: it opens the
bundle, answers once about one image with 64 words of text, and ends. The bound is `SHARE` of weights and caches plus
`SLACK_BYTES`, both as the issue has them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.shared import results
from benchmarks.shared.bundles import DENSE, TIERS
from reroute import report
from reroute.bench.measure import Settings, measure, steps
from reroute.bench.report import table
from reroute.bench.workload import BOUNDARY
from reroute.report import format_bytes
from reroute.runtime.bundle import Bundle

SHARE, SLACK_BYTES = 1.15, 150_000_000
IMPORT = "import time; start = time.perf_counter(); import reroute.runtime; print(time.perf_counter() - start)"


def main() -> None:
    """Measure and write."""
    parser = results.options(__doc__, "footprint", repeat=1)
    parser.add_argument("--imports", type=int, default=15, help="processes that import the runtime")
    args = parser.parse_args()
    machine = results.machine_facts()
    imports = import_seconds(args.imports)
    shop = results.workshop(args)
    candidates = []
    for profile in args.profiles:  # one after the other: the sessions of a profile may be large
        bundles = {f"own {profile}, {tier}": Bundle.open(shop.bundle(tier, profile)) for tier in (DENSE, *TIERS)}
        settings = Settings(text=(64,), images=1, tokens=8, warmup=0, repeat=1, threads=args.threads)
        with report.progress(steps(settings, bundles=len(bundles)), profile) as advance:
            candidates += measure(bundles, settings, advance=advance)[0]
    sessions = {one.name: session_entry(one.memory, one.load_ms or 0.0, one.memory_samples) for one in candidates}
    data = results.document(
        "footprint",
        args,
        machine,
        boundary={
            **{name: BOUNDARY[name] for name in ("peak_rss_bytes", "cache_bytes", "weight_bytes", "load_ms")},
            "import_s": "`import reroute.runtime` in a fresh interpreter, files in the system's cache; median",
        },
        bound={"share": SHARE, "slack_bytes": SLACK_BYTES},
        import_s={"median": statistics.median(imports), "samples": imports},
        sessions=sessions,
    )
    results.write(args.output, data)
    print("\n".join(markdown(json.loads(json.dumps(data)))))


def session_entry(memory: dict[str, float], load_ms: float, samples: Any) -> dict[str, Any]:
    """What the results say of a session, with its bound."""
    bound = bound_bytes(memory["weight_bytes"], memory["cache_bytes"])
    return {**memory, "bound_bytes": bound, "within": memory["peak_rss_bytes"] <= bound, "load_ms": load_ms,
            "samples": list(samples)}  # fmt: skip


def bound_bytes(weights: float, caches: float) -> float:
    """The issue's bound on the peak."""
    return SHARE * (weights + caches) + SLACK_BYTES


def import_seconds(count: int) -> list[float]:
    """Seconds of `import reroute.runtime`, each in a process of its own; one more goes first and does not count."""
    found = []
    for _ in range(count + 1):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    return found[1:]


def markdown(data: dict[str, Any]) -> list[str]:
    """A row for each session, then the import."""
    rows = [
        (
            name,
            *(format_bytes(one[key]) for key in ("weight_bytes", "cache_bytes", "peak_rss_bytes", "bound_bytes")),
            "yes" if one["within"] else "no",
            f"{one['load_ms']:.0f}",
        )
        for name, one in data["sessions"].items()
    ]
    lines = table(("session", "weights", "caches", "peak RSS", "bound", "within", "load, ms"), rows)
    return [*lines, "", f"`import reroute.runtime`: {1e3 * data['import_s']['median']:.0f} ms."]


if __name__ == "__main__":
    results.guarded(main)
