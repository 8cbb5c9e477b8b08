"""tune.json: everything that was looked at and what became of it; and the winner as routing.toml."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from reroute import __version__
from reroute.bench.workload import BOUNDARY
from reroute.evaluation.questions import Question
from reroute.evaluation.statistics import LEVEL, RESAMPLES, Bootstrap
from reroute.manifest import Model
from reroute.published import METHODS
from reroute.tuning.bounds import Bounds
from reroute.tuning.budgets import Split
from reroute.tuning.screening import MARGIN, PROBE_ROUNDS
from reroute.tuning.search import Outcome, nearest
from reroute.tuning.space import Space
from reroute.tuning.trace import Entry, front

KIND = "tuning"
SCHEMA_VERSION = 1
JSON_NAME, MARKDOWN_NAME, ROUTING_NAME, BUNDLE_NAME = "tune.json", "tune.md", "routing.toml", "bundle"
Json = dict[str, Any]
_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "transformers", "tokenizers", "pillow")


def make(
    outcome: Outcome,
    *,
    space: Space,
    bounds: Bounds,
    model: Model,
    checkpoint_sha256: str,
    questions: Split,
    set_name: str,
    settings: Json,
    machine: Json,
) -> Json:
    """The whole document. `settings` are all options that shape the search, with the seeds."""
    found = nearest(outcome.entries, bounds) if outcome.winner is None else None
    data = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": outcome.seconds,
        "model": {
            "model_type": model.model_type,
            "checkpoint_sha256": checkpoint_sha256,
            "num_layers": model.text.num_layers,
            "visual_tokens": model.vision.tokens_per_image,
        },
        "machine": machine,
        "versions": versions(),
        "settings": settings,
        "bounds": {"words": bounds.words(), **asdict(bounds), "ties": bounds.quantity},
        "space": {"space": asdict(space), "probe_rounds": PROBE_ROUNDS, "early_margin": MARGIN},
        "boundary": {name: BOUNDARY[name] for name in (*_quantities(outcome), "excluded")},
        "statistics": {"level": LEVEL, "resamples": RESAMPLES, "unit": "image; round for latency"},
        "questions": {
            "set": set_name,
            "sha256": hashlib.sha256(
                json.dumps([asdict(one) for one in (*questions.search, *questions.fresh)]).encode()
            ).hexdigest(),
            "search": [question.id for question in questions.search],
            "fresh": [question.id for question in questions.fresh],
            "fresh_asked": outcome.fresh,
        },
        "rounds": [{**asdict(one), "run": number < outcome.run} for number, one in enumerate(outcome.planned)],
        "notes": outcome.notes,
        "batches": [asdict(batch) for batch in outcome.batches],
        "candidates": [_entry(entry) for entry in outcome.entries],
        "front": [entry.name for entry in front(outcome.entries, bounds.quantity)],
        "result": {
            "winner": outcome.winner.name if outcome.winner else None,
            "nearest": {"name": found[0].name, "miss": found[1].miss, "words": str(found[1])} if found else None,
            "routing_toml": to_toml(outcome.winner.name) if outcome.winner else None,
            "fresh": _fresh(outcome, questions.fresh[: outcome.fresh]),
        },
    }
    return json.loads(json.dumps(_finite(data)))  # what a reader of the file gets, no more


def space_of(outcome: Outcome, bounds: Bounds) -> Json:
    """What a dry run says: the space, what the plans rule out, and the rounds that would follow at most."""
    return {
        "kind": f"{KIND} plan",
        "bounds": asdict(bounds),
        "candidates": [_entry(entry) for entry in outcome.entries],
        "rounds": [asdict(one) for one in outcome.planned],
    }


def to_toml(spec: str) -> str:
    """A routing spec as a file that `--routing` takes and that means the same."""
    head, *options = spec.split(":")
    name, _, layers = head.partition("@")
    if name == "published":
        lines = [f'published = "{spec.partition(":")[2]}"']
    else:
        lines = [f'{"method" if name in METHODS else "action"} = "{name}"']
        if layers:
            lines.append(f"layers = [{', '.join(layers.split(','))}]")
        for option in options:
            key, _, value = option.partition("=")
            lines.append(f'{key} = "{value}"')
    return "\n".join(["[routing]", *lines]) + "\n"


def versions() -> dict[str, str]:
    """Of what shaped the result."""
    found = {"reroute": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _quantities(outcome: Outcome) -> list[str]:
    latency = outcome.dense.latency
    return list(latency.samples) if latency is not None else []


def _entry(entry: Entry) -> Json:
    plan, latency = entry.plan, entry.latency
    return {
        "name": entry.name,
        "also": list(entry.also),
        "status": entry.status,
        "reason": entry.reason,
        "schedule": asdict(entry.schedule) if entry.schedule is not None else None,
        "plan": None
        if plan is None
        else {
            "average_visual_tokens": plan.average_visual_tokens,
            "decoder_flops": plan.decoder_flops,
            "decoder_ratio": plan.decoder_ratio,
            "kv_bytes": plan.kv_bytes,
            "kv_ratio": plan.kv_ratio,
            "peak_bytes": plan.peak_bytes,
        },
        "latency": None if latency is None else asdict(latency),
        "rounds": [{"questions": questions, "score": score} for questions, score in entry.rounds],
        "score": entry.score,
        "scores": entry.scores,
        "fresh_scores": entry.fresh,
    }


def _fresh(outcome: Outcome, questions: Sequence[Question]) -> list[Json]:
    """Score on the fresh questions of the finalists and the dense engine, and the paired difference to dense."""
    if outcome.winner is None:
        return []
    dense = outcome.dense
    rows = list(outcome.finalists) + ([dense] if dense not in outcome.finalists else [])
    found = []
    for entry in rows:
        row: Json = {"name": entry.name, "score": _estimate(entry.fresh, questions)}
        for skill in ("grounding", "vqa"):
            chosen = [number for number, question in enumerate(questions) if question.skill == skill]
            row[skill] = _estimate([entry.fresh[i] for i in chosen], [questions[i] for i in chosen])
        pairs = [own - other for own, other in zip(entry.fresh, dense.fresh, strict=True)]
        row["minus_dense"] = None if entry is dense else _estimate(pairs, questions)
        found.append(row)
    return found


def _estimate(values: Sequence[float], questions: Sequence[Question]) -> Json | None:
    estimate = Bootstrap().estimate(values, [question.image for question in questions])
    return None if estimate is None else asdict(estimate)


def _finite(value: Any) -> Any:
    """JSON has no infinity: the open end of an interval is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
