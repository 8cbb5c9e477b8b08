"""The command `reroute bench`: bundles in, figures out as Markdown, CSV and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reroute import report
from reroute.bench import document
from reroute.bench.document import JSON_NAME, KIND
from reroute.bench.machine import facts
from reroute.bench.measure import Extra, Settings, every_tier, measure, names_of, open_bundles, steps
from reroute.bench.report import to_csv, to_markdown
from reroute.errors import EXIT_OK
from reroute.folders import check_output, whole_folder
from reroute.runtime.bundle import Bundle

CSV_NAME, MARKDOWN_NAME = "bench.csv", "bench.md"
_OPTIONS = ("text", "images", "tokens", "warmup", "repeat", "threads", "provider")


def run(args: argparse.Namespace) -> int:
    """Check everything, measure, print, write."""
    if args.output is not None:
        check_output(args.output, force=args.force, written=written)
    settings = settings_of(args)
    bundles = every_tier(open_bundles(args.bundles, settings))
    data = bench(dict(zip(names_of(bundles), bundles, strict=True)), settings)
    markdown = to_markdown(data)
    print(document.to_json(data) if args.json else markdown, end="", flush=True)
    if args.output is not None:
        write(args.output, data, force=args.force)
        print(f"wrote {args.output / JSON_NAME}, {CSV_NAME} and {MARKDOWN_NAME}", file=sys.stderr)
    return EXIT_OK


def bench(
    bundles: Mapping[str, Bundle], settings: Settings, *, extras: Mapping[str, Extra] | None = None
) -> dict[str, Any]:
    """Measure, with a progress bar, and make the document. Arguments as in `measure`."""
    # Before anything runs: the load average should be that of the neighbours, not our own.
    machine = facts(gpu=settings.provider != "cpu" or any(b.manifest.backend == "tensorrt" for b in bundles.values()))
    total = steps(settings, bundles=len(bundles), extras=len(extras or {}))
    with report.progress(total, "measuring") as advance:
        candidates, cells = measure(bundles, settings, extras=extras, advance=advance)
    return document.make(candidates, cells, settings=asdict(settings), machine=machine)


def settings_of(args: argparse.Namespace) -> Settings:
    """The options that were given, and defaults for the others."""
    return Settings(**{name: value for name in _OPTIONS if (value := getattr(args, name)) is not None})


def write(output: Path, data: dict[str, Any], *, force: bool) -> None:
    """All three forms, whole or not at all."""
    with whole_folder(output, force=force, written=written) as folder:
        (folder / JSON_NAME).write_text(document.to_json(data), encoding="utf-8")
        (folder / CSV_NAME).write_text(to_csv(data), encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(to_markdown(data), encoding="utf-8")


def written(folder: Path) -> set[str]:
    """Names in an earlier output of this command; nothing for any other folder."""
    try:
        data = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {JSON_NAME, CSV_NAME, MARKDOWN_NAME} if isinstance(data, dict) and data.get("kind") == KIND else set()
