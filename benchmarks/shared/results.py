"""What every measurement shares: options, rounds, and the JSON file with raw samples and the machine's facts."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.shared.bundles import KERNELS, METHOD, PROFILES, WORK, Workshop
from benchmarks.shared.worker import WorkerError
from reroute import __version__, report
from reroute.bench.document import to_json
from reroute.bench.machine import facts
from reroute.bench.measure import Key, interleave
from reroute.bench.statistics import LEVEL, RESAMPLES, paired_ratio, spread
from reroute.bench.workload import Sample
from reroute.errors import EXIT_FAILURE, RerouteError, UserError
from reroute.folders import write_whole

RESULTS = Path(__file__).resolve().parents[1] / "results"
Samples = Mapping[Key, Mapping[str, list[float]]]


def options(doc: str | None, name: str, *, repeat: int) -> argparse.ArgumentParser:
    """A parser with what all of them take."""
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--profiles", type=profiles, default="fp32", metavar="P,P", help=f"of {', '.join(PROFILES)}")
    parser.add_argument("--checkpoint", type=Path, help="instead of the shape small24")
    parser.add_argument("--method", default=METHOD, help="head of the routed specs, METHOD:avg=SHARE")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for checkpoints, exports and bundles")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="library for the profiles with +kernels")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every candidate")
    parser.add_argument("--spinning", action="store_true", help="let ONNX Runtime's threads spin, ours and others'")
    parser.add_argument("--warmup", type=int, default=3, help="rounds thrown away")
    parser.add_argument("--repeat", type=int, default=repeat, help="rounds that count")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def profiles(text: str) -> tuple[str, ...]:
    """`fp32,int8`. Raises argparse's error."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PROFILES]:
        raise argparse.ArgumentTypeError(f"there is no profile {unknown[0]!r}, only {', '.join(PROFILES)}")
    return names


def workshop(args: argparse.Namespace, **capacity: int) -> Workshop:
    """Where the options say to work."""
    return Workshop(folder=args.work, checkpoint=args.checkpoint, method=args.method, kernels=args.kernels, **capacity)


def run_rounds(runs: Mapping[Key, Callable[[], Sample]], args: argparse.Namespace, label: str) -> Samples:
    """Everything once a round, in a new order each time, with a progress bar."""
    with report.progress(len(runs) * (args.warmup + args.repeat), label) as advance:
        return interleave(runs, warmup=args.warmup, repeat=args.repeat, advance=advance)


def cells(samples: Samples) -> list[dict[str, Any]]:
    """One entry a candidate and size: raw samples and their summary."""
    return [
        {
            "candidate": name,
            "size": size,
            "samples": {quantity: [round(value, 5) for value in values] for quantity, values in quantities.items()},
            "summary": {quantity: asdict(spread(values)) for quantity, values in quantities.items()},
        }
        for (name, size), quantities in samples.items()
    ]


def ratio(samples: Samples, over: Key, under: Key, quantity: str) -> dict[str, float]:
    """Median over rounds of over / under with its interval; see `reroute.bench.statistics`."""
    return asdict(paired_ratio(samples[over][quantity], samples[under][quantity]))


def machine_facts() -> dict[str, Any]:
    """Before anything runs: the load average should be that of the neighbours, not our own."""
    return facts(gpu=False)


def document(kind: str, args: argparse.Namespace, machine: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The head of every results file, then `fields`."""
    names = ("numpy", "onnxruntime", "torch", "transformers")
    return {
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            **{name: getattr(args, name) for name in ("profiles", "threads", "spinning", "warmup", "repeat", "method")},
            "checkpoint": args.checkpoint.name if args.checkpoint else "small24",
        },
        "statistics": {"level": LEVEL, "resamples": RESAMPLES, "unit": "round"},
        "machine": machine,
        "versions": {
            "reroute": __version__,
            "python": platform.python_version(),
            **{name: version for name in names if (version := _version(name))},
        },
        **fields,
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a results file, whole."""
    write_whole(path, to_json(data).encode())
    print(f"wrote {path}", file=sys.stderr)


def guarded(main: Callable[[], None]) -> None:
    """Run a script: errors for the user in this project's form."""
    try:
        main()
    except RerouteError as error:
        report.print_error(error.message, error.hint)
        sys.exit(error.exit_code)
    except WorkerError as error:
        report.print_error(str(error), "benchmarks/README.md says what the other engines need")
        sys.exit(EXIT_FAILURE)


def need(paths: Iterable[Path], what: str) -> None:
    """Refuse before anything runs when something is not installed. Raises UserError."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{what} is not there: no {path}", hint="see benchmarks/README.md, or leave it out")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
