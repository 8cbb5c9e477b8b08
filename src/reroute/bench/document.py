"""bench.json: what a run measured, with raw samples and everything that the figures depend on."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from reroute import __version__
from reroute.bench.statistics import LEVEL, RESAMPLES, paired_ratio, spread
from reroute.bench.workload import BOUNDARY, QUANTITIES
from reroute.errors import UserError
from reroute.manifest import decode

KIND = "bench"
SCHEMA_VERSION = 1
JSON_NAME = "bench.json"
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What was measured. Only the name is there for one that is not a bundle, such as a baseline of another library.

    Attributes:
        name: unique within a run; runs are compared by it.
        folder: name of the bundle's folder, without where it is.
        routing: as written at the export.
        action: "dense", "reroute" or "removal".
        average_visual_tokens: per layer, of one image.
        dtype: of weights and caches.
        backend: of the bundle.
        checkpoint_sha256: which model it is.
        check_passed: result of the build's check; None without one.
        versions: of what built the bundle.
        engine: library, version, provider and threads that ran it.
        memory: bytes by quantity, see `BOUNDARY`.
        load_ms: median, see `BOUNDARY`.
        memory_samples: what each process measured.
    """

    name: str
    folder: str = ""
    routing: str = ""
    action: str = ""
    average_visual_tokens: float | None = None
    dtype: str = ""
    backend: str = ""
    checkpoint_sha256: str = ""
    check_passed: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    engine: dict[str, str] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    load_ms: float | None = None
    memory_samples: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One candidate at one text length.

    Attributes:
        candidate: its name.
        text: text tokens of the prompt.
        kv_bytes: what the prompt fills of the caches; None where it is not known.
        samples: milliseconds of each round by quantity; sample i of all cells of a run is of round i.
        summary: by quantity, see `Spread`.
        speedup: by quantity, how many times faster than the dense bundle of the run at the same text, see `Ratio`.
    """

    candidate: str
    text: int
    kv_bytes: int | None = None
    samples: dict[str, tuple[float, ...]]
    summary: dict[str, Any]
    speedup: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `reroute compare` needs of a bench.json."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    candidates: dict[str, Candidate]
    cells: dict[tuple[str, int], Cell]

    @property
    def fingerprint(self) -> str:
        """Of the device."""
        return self.machine["fingerprint"]


def cell(candidate: str, text: int, samples: dict[str, list[float]]) -> Cell:
    """A cell with its summary."""
    rounded = {name: tuple(round(value, 5) for value in samples[name]) for name in QUANTITIES if name in samples}
    summary = {name: asdict(spread(values)) for name, values in rounded.items()}
    return Cell(candidate=candidate, text=text, samples=rounded, summary=summary)


def make(
    candidates: Sequence[Candidate], cells: Sequence[Cell], *, settings: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """The whole document."""
    dense = next((one.name for one in candidates if one.action == DENSE), None)
    by_key = {(one.candidate, one.text): one for one in cells}
    rows = []
    for one in cells:
        row = asdict(one)
        if dense is not None:
            base = by_key[dense, one.text].samples
            row["speedup"] = {
                name: asdict(paired_ratio(base[name], one.samples[name])) for name in one.samples if name in base
            }
        rows.append(row)
    names = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tokenizers")
    data = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "boundary": BOUNDARY,
        "statistics": {"speedup_over": dense, "level": LEVEL, "resamples": RESAMPLES, "unit": "round"},
        "settings": {**settings, "spinning": False},
        "machine": machine,
        "versions": {
            "reroute": __version__,
            "python": platform.python_version(),
            **{name: version for name in names if (version := _version(name))},
        },
        "candidates": [asdict(one) for one in candidates],
        "cells": rows,
    }
    return json.loads(json.dumps(data))  # what a reader of the file gets, no more


def to_json(data: Any) -> str:
    """Indented, with lists of numbers on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    number = r"-?\d[\d.eE+-]*"
    flat = re.compile(rf"\[\n\s*({number}(?:,\n\s*{number})*)\n\s*\]")  # text in JSON has no line breaks
    return flat.sub(lambda match: "[" + re.sub(r",\s+", ", ", match[1]) + "]", text) + "\n"


def read(path: Path) -> Run:
    """Read a bench.json, or the one in a folder that `reroute bench -o` made. Raises UserError."""
    file = path / JSON_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no {file}", hint="make one with `reroute bench BUNDLE... -o DIR`")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}", hint="measure again with `reroute bench`") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f"{file} is not a result of `reroute bench`", hint="give its bench.json")
    return parse(data, where=str(file))


def parse(data: dict[str, Any], *, where: str) -> Run:
    """The part of a document that can be compared. Raises UserError for one that is not whole."""
    again = "measure again with the installed version of `reroute bench`"
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version")
        raise UserError(f"{where} has schema version {found}, this Reroute reads {SCHEMA_VERSION}", hint=again)
    try:
        candidates = decode(tuple[Candidate, ...], data["candidates"], where="candidates")
        cells = decode(tuple[Cell, ...], data["cells"], where="cells")
        run = Run(
            settings=dict(data["settings"]),
            machine=dict(data["machine"]),
            candidates={one.name: one for one in candidates},
            cells={(one.candidate, one.text): one for one in cells},
        )
        if not isinstance(run.fingerprint, str):
            raise ValueError("the fingerprint is not text")
        _check(cells)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", hint=again) from error
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not whole: {error}", hint=again) from error
    return run


def _check(cells: Sequence[Cell]) -> None:
    """Every cell has equally many samples, all of them positive and finite. Raises ValueError."""
    lengths = {len(values) for one in cells for values in one.samples.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"quantities have {' and '.join(map(str, sorted(lengths)))} samples")
    if not all(0 < value < float("inf") for one in cells for values in one.samples.values() for value in values):
        raise ValueError("a sample is not a positive number")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
