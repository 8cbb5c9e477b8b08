"""The command `reroute compare`: two measurements or two bundles in, a verdict out; exit code 3 when the gate fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reroute.bench import document
from reroute.bench.bench_command import bench, settings_of
from reroute.bench.compare import Finding, Tolerance, baseline_name, compare_pair, compare_runs, confirm
from reroute.bench.compare_report import failures, to_markdown
from reroute.bench.document import Run
from reroute.bench.measure import Settings, names_of, open_bundles
from reroute.errors import EXIT_OK, GateError, UserError
from reroute.folders import check_output, whole_folder
from reroute.manifest import FILE_NAME

KIND = "comparison"
SCHEMA_VERSION = 1
JSON_NAME, MARKDOWN_NAME = "compare.json", "compare.md"
BASE, NEW = "base", "new"
PAIR_REPEAT = 20
_MEASUREMENT = ("text", "images", "tokens", "warmup", "repeat", "threads", "provider")
_FILES = ("baseline", "confirm", "any_device")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is written and printed.

    Attributes:
        findings: in the order of BASE.
        notes: what a reader should know besides.
        runs: documents of what was measured for it, with raw samples.
    """

    findings: list[Finding]
    notes: list[str]
    runs: list[dict[str, Any]]


def run(args: argparse.Namespace) -> int:
    """Compare, print, write, and raise GateError when something is worse."""
    if args.output is not None:
        check_output(args.output, force=args.force, written=written)
    tolerance = Tolerance(latency=args.latency, memory=args.memory)
    bundles = [path for path in (args.base, args.new) if (path / FILE_NAME).is_file()]
    if len(bundles) == 1:
        other = args.new if bundles[0] is args.base else args.base
        raise UserError(
            f"{bundles[0]} is a bundle, {other} is not", hint="give two bundles, or two results of `reroute bench`"
        )
    _refuse(args, _FILES if bundles else _MEASUREMENT, "two bundles" if bundles else "two bench.json files")
    result = pair(args, tolerance) if bundles else files(args, tolerance)
    failed = failures(result.findings)
    data = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "mode": "bundles" if bundles else "files",
        "passed": not failed,
        "tolerance": asdict(tolerance),
        "notes": result.notes,
        "findings": [_json(one) for one in result.findings],
        "runs": result.runs,
    }
    markdown = to_markdown(result.findings, result.notes)
    print(document.to_json(data) if args.json else markdown, end="", flush=True)
    if args.output is not None:
        with whole_folder(args.output, force=args.force, written=written) as folder:
            (folder / JSON_NAME).write_text(document.to_json(data), encoding="utf-8")
            (folder / MARKDOWN_NAME).write_text(markdown, encoding="utf-8")
        print(f"wrote {args.output / JSON_NAME} and {MARKDOWN_NAME}", file=sys.stderr)
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        hint = "the table on stdout has all figures"
        if not all(one.confirmed for one in failed):
            hint = "measure NEW again and give both: --confirm PATH; then only what is worse in both fails"
        raise GateError(f"regression: {describe(failed[0])}{more}", hint=hint)
    return EXIT_OK


def pair(args: argparse.Namespace, tolerance: Tolerance) -> Comparison:
    """Two bundles, measured here in the same rounds; a suspected regression again, with twice the rounds."""
    settings = settings_of(args)
    if args.repeat is None:
        settings = replace(settings, repeat=PAIR_REPEAT)
    base, new = open_bundles((args.base, args.new), settings, twice=True)
    runs: list[dict[str, Any]] = []

    def measure(settings: Settings) -> list[Finding]:
        runs.append(bench({BASE: base, NEW: new}, settings))
        return compare_pair(document.parse(runs[-1], where="the measurement"), BASE, NEW, tolerance)

    findings = confirm(measure(settings), lambda: measure(replace(settings, repeat=2 * settings.repeat)))
    one, other = base.manifest, new.manifest
    notes = [f"BASE is {one.routing}, NEW is {other.routing}, paired in {settings.repeat} rounds."]
    if one.checkpoint_sha256 != other.checkpoint_sha256:
        notes.append("They are of different checkpoints.")
    if len(runs) > 1:
        notes.append(f"What was suspected was measured again, in {2 * settings.repeat} rounds.")
    return Comparison(findings=findings, notes=notes, runs=runs)


def files(args: argparse.Namespace, tolerance: Tolerance) -> Comparison:
    """Two results of `reroute bench`, and a third one where the second is suspected and --confirm says how."""
    new = document.read(args.new)
    base = document.read(baseline_of(args.base, new))
    notes: list[str] = []
    if base.fingerprint != new.fingerprint:
        if not args.any_device:
            raise UserError(
                f"BASE was measured on {base.fingerprint}, NEW on {new.fingerprint}",
                hint="keep a baseline for each device (a folder of DEVICE.json), or add --any-device",
            )
        notes.append(f"BASE is of another device: {base.fingerprint}, NEW of {new.fingerprint}.")
    changed = [
        name
        for name, one in base.candidates.items()
        if name in new.candidates and one.checkpoint_sha256 != new.candidates[name].checkpoint_sha256
    ]
    if changed:
        notes.append(f"Of other checkpoints than in BASE: {', '.join(changed)}.")
    runs: list[dict[str, Any]] = []

    def against(side: Run) -> list[Finding]:
        return compare_runs(base, side, tolerance, baseline=args.baseline)

    findings = against(new)
    if args.confirm:
        second = second_run(args.confirm, new, runs)
        findings = confirm(findings, lambda: against(second()))
    if added := sorted({name for name, _ in new.cells} - {name for name, _ in base.cells}):
        notes.append(f"Not in BASE, so not compared: {', '.join(added)}.")
    notes += baseline_notes(base, new, baseline_name(base, new, args.baseline))
    return Comparison(findings=findings, notes=notes, runs=runs)


def baseline_notes(base: Run, new: Run, name: str) -> list[str]:
    """What happened to the baseline itself, which its ratios cannot show."""
    notes = []
    for (candidate, text), cell in base.cells.items():
        if candidate == name:
            pairs = {
                quantity: (cell.summary[quantity]["median"], new.cells[name, text].summary[quantity]["median"])
                for quantity in cell.samples
            }
            words = ", ".join(f"{quantity} {one:.3g} to {other:.3g}" for quantity, (one, other) in pairs.items())
            notes.append(f"Not judged, the baseline `{name}` at {text} text tokens: {words}.")
    return notes


def second_run(paths: Sequence[Path], new: Run, runs: list[dict[str, Any]]) -> Callable[[], Run]:
    """What measures NEW again when it is called, or hands out the second run that was given. Raises UserError."""
    if not all((path / FILE_NAME).is_file() for path in paths):
        if len(paths) > 1:
            raise UserError(
                f"--confirm takes one bench.json, or bundles only; it got {len(paths)} paths",
                hint="give the second run of NEW, or all bundles of NEW",
            )
        second = document.read(paths[0])
        if second.fingerprint != new.fingerprint:
            raise UserError(
                f"--confirm was measured on {second.fingerprint}, NEW on {new.fingerprint}",
                hint="measure it where NEW was",
            )
        return lambda: second
    settings = Settings(
        **{name: new.settings[name] for name in _MEASUREMENT if name != "text"}, text=tuple(new.settings["text"])
    )
    settings = replace(settings, repeat=2 * settings.repeat)
    bundles = open_bundles(paths, settings)
    names = names_of(bundles)
    if missing := sorted({name for name, one in new.candidates.items() if one.memory} - set(names)):
        raise UserError(
            f"--confirm lacks {missing[0]}, which NEW has", hint="give all bundles that NEW was measured of"
        )

    def measure() -> Run:
        runs.append(bench(dict(zip(names, bundles, strict=True)), settings))
        found = document.parse(runs[-1], where="the second run")
        if found.fingerprint != new.fingerprint:
            raise UserError(
                f"this machine is {found.fingerprint}, NEW was measured on {new.fingerprint}", hint="confirm it there"
            )
        return found

    return measure


def baseline_of(path: Path, new: Run) -> Path:
    """`path`, or in a folder of baselines by device the one of NEW's device. Raises UserError."""
    if not path.is_dir() or (path / document.JSON_NAME).is_file():
        return path
    places = (path / f"{new.fingerprint}.json", path / new.fingerprint / document.JSON_NAME)
    if found := [place for place in places if place.is_file()]:
        return found[0]
    known = sorted(
        {*(one.stem for one in path.glob("*.json")), *(one.parent.name for one in path.glob("*/bench.json"))}
    )
    raise UserError(
        f"{path} has no baseline of this device, {new.fingerprint}; it has {', '.join(known) or 'none'}",
        hint=f"keep NEW's bench.json as {path.name}/{new.fingerprint}.json",
    )


def describe(one: Finding) -> str:
    """`prefill_ms of dense at 64 text tokens is 10.2 % above BASE, 5 % are allowed`."""
    where = f" at {one.text} text tokens" if one.text is not None else ""
    return (
        f"{one.quantity} of {one.candidate}{where} is {100 * (one.ratio.value - 1):.1f} % above BASE, "
        f"{100 * one.tolerance:.3g} % are allowed"
    )


def written(folder: Path) -> set[str]:
    """Names in an earlier output of this command; nothing for any other folder."""
    try:
        data = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {JSON_NAME, MARKDOWN_NAME} if isinstance(data, dict) and data.get("kind") == KIND else set()


def _refuse(args: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Options without a meaning here are an error, not ignored. Raises UserError."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} has no meaning with {what}", hint="leave it out")


def _json(one: Finding) -> dict[str, Any]:
    """A finding for JSON, which has no infinity."""
    data = asdict(one)
    data["ratio"] = {key: value if value < float("inf") else None for key, value in data["ratio"].items()}
    return data
