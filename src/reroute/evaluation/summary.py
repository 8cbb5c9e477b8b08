"""From answers to numbers: scores, agreement with the dense engine, paired differences, and what decisions kept.

Everything here is a plain JSON value, in the order in which a report shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from reroute.boxes import iou
from reroute.evaluation.records import Record
from reroute.evaluation.runner import Run
from reroute.evaluation.statistics import Bootstrap
from reroute.manifest import Manifest

SIZES = ("small", "medium", "large")
MIN_IOU = 0.5

Measure = Callable[[Record], float | None]
Json = dict[str, Any]


def summarise(runs: Sequence[Run], bootstrap: Bootstrap) -> Json:
    """All tables of an evaluation: `bundles`, in the order of `runs`, and `differences`."""
    names = names_of(runs)
    reference = reference_of(runs)
    bundles = []
    for name, run in zip(names, runs, strict=True):
        row = {"name": name, **facts(run), "scores": scores(run.records, bootstrap)}
        if reference is not None and runs[reference] is not run:
            row["agreement"] = {"with": names[reference], **agreement(run, runs[reference], bootstrap)}
        row["decisions"] = decisions(run, bootstrap)
        bundles.append(row)
    return {"bundles": bundles, "differences": differences(names, runs, bootstrap)}


def is_dense(manifest: Manifest) -> bool:
    """Whether every visual token runs in every layer."""
    return manifest.average_visual_tokens == manifest.model.vision.tokens_per_image


def reference_of(runs: Sequence[Run]) -> int | None:
    """Index of the first dense bundle, with which the others are compared."""
    return next((index for index, run in enumerate(runs) if is_dense(run.bundle.manifest)), None)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Short names: the routing, with the folder's name or path where two bundles route alike."""
    bundles = [run.bundle for run in runs]
    routings = [bundle.manifest.routing for bundle in bundles]
    folders = [f"{bundle.manifest.routing} ({bundle.path.name})" for bundle in bundles]
    paths = [f"{bundle.manifest.routing} ({bundle.path})" for bundle in bundles]
    return [
        next((form[index] for form in (routings, folders) if form.count(form[index]) == 1), path)
        for index, path in enumerate(paths)
    ]


def facts(run: Run) -> Json:
    """What a bundle is, and what it measurably ran and stored."""
    manifest = run.bundle.manifest
    layers = np.asarray([stage.num_layers for stage in manifest.schedule.stages])
    rows = np.asarray([record.rows for record in run.records], dtype=np.float64)
    return {
        "path": str(run.bundle.path),
        "routing": manifest.routing,
        "schedule": asdict(manifest.schedule),
        "average_visual_tokens": manifest.average_visual_tokens,
        "measured": {
            "visual_tokens_per_layer": float((rows @ layers).mean() / layers.sum()),
            "visual_tokens_per_stage": rows.mean(axis=0).tolist(),
            "kv_bytes": float(np.mean([record.kv_bytes for record in run.records])),
        },
        "backend": manifest.backend,
        "dtype": manifest.dtype,
        "engine": run.engine,
        "model_type": manifest.model.model_type,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "versions": manifest.versions,
    }


def scores(records: Sequence[Record], bootstrap: Bootstrap) -> Json:
    """Grounding: accuracy at IoU 0.5 and mean IoU, whole and by size of the object. VQA: accuracy, by kind."""
    result = by_group(records, bootstrap, score=lambda r: r.score, overlap=lambda r: r.iou)
    if "grounding" in result:
        result["grounding"]["no_box"] = sum(r.skill == "grounding" and r.box is None for r in records)
    return result


def agreement(run: Run, reference: Run, bootstrap: Bootstrap) -> Json:
    """Share of questions that two bundles answer with the same text, by skill; `same_place`: with boxes of IoU 0.5."""
    result: Json = {
        "same_checkpoint": run.bundle.manifest.checkpoint_sha256 == reference.bundle.manifest.checkpoint_sha256
    }
    other = {record.id: record for record in reference.records}

    def same_place(record: Record) -> float:
        theirs = other[record.id].box
        return float(record.box is not None and theirs is not None and iou(record.box, theirs) >= MIN_IOU)

    for skill in ("grounding", "vqa"):
        part = [record for record in run.records if record.skill == skill]
        if part:
            result[skill] = mean(part, lambda r: float(r.answer == other[r.id].answer), bootstrap)
            if skill == "grounding":
                result["same_place"] = mean(part, same_place, bootstrap)
    return result


def differences(names: Sequence[str], runs: Sequence[Run], bootstrap: Bootstrap) -> list[Json]:
    """Every bundle minus every later one, question by question; dense bundles count as the last."""
    order = sorted(range(len(runs)), key=lambda index: is_dense(runs[index].bundle.manifest))
    result = []
    for first, second in combinations(order, 2):
        other = {record.id: record for record in runs[second].records}

        def score(record: Record, other: dict[str, Record] = other) -> float:
            return record.score - other[record.id].score

        def overlap(record: Record, other: dict[str, Record] = other) -> float | None:
            theirs = other[record.id].iou
            return None if record.iou is None or theirs is None else record.iou - theirs

        values = by_group(runs[first].records, bootstrap, score=score, overlap=overlap)
        result.append({"first": names[first], "second": names[second], **values})
    return result


def by_group(records: Sequence[Record], bootstrap: Bootstrap, *, score: Measure, overlap: Measure) -> Json:
    """Means of two measures of a record, in the groups that a report shows; groups without a question are left out."""
    result: Json = {}
    boxes = [record for record in records if record.skill == "grounding"]
    words = [record for record in records if record.skill == "vqa"]
    if boxes:
        groups = {size: [r for r in boxes if r.size == size] for size in SIZES}
        result["grounding"] = {
            "accuracy": mean(boxes, score, bootstrap),
            "mean_iou": mean(boxes, overlap, bootstrap),
            "by_size": {
                size: {"accuracy": mean(part, score, bootstrap), "mean_iou": mean(part, overlap, bootstrap)}
                for size, part in groups.items()
                if part
            },
        }
    if words:
        kinds = dict.fromkeys(record.kind for record in words)
        result["vqa"] = {
            "accuracy": mean(words, score, bootstrap),
            "by_kind": {kind: mean([r for r in words if r.kind == kind], score, bootstrap) for kind in kinds},
        }
    return result


def decisions(run: Run, bootstrap: Bootstrap) -> list[Json]:
    """For each decision: tokens kept, returned and recovered on average, and what became of the object's tokens.

    `object` has, by skill, over the questions with an object that the model sees: the share of its tokens that are
    kept, and the share of questions of whose object at least one token is kept. With a vision stage that drops
    tokens, a first entry with the layer null says the same of what entered the decoder.
    """
    manifest = run.bundle.manifest
    rows: list[Json] = []
    if manifest.schedule.entering(total := manifest.model.vision.tokens_per_image) < total:
        entered = float(np.mean([record.rows[0] for record in run.records]))
        rows.append(
            {
                "layer": None,
                "kept": entered,
                "returned": 0.0,
                "recovered": 0.0,
                "object": kept_objects(run.records, lambda r: r.entered, bootstrap),
            }
        )
    for index, layer in enumerate(manifest.schedule.decision_layers):
        own = [record.decisions[index] for record in run.records]
        rows.append(
            {
                "layer": layer,
                "kept": float(np.mean([decision.kept for decision in own])),
                "returned": float(np.mean([decision.returned for decision in own])),
                "recovered": float(np.mean([decision.recovered for decision in own])),
                "object": kept_objects(run.records, lambda r, i=index: r.decisions[i].share, bootstrap),
            }
        )
    return rows


def kept_objects(records: Iterable[Record], share: Measure, bootstrap: Bootstrap) -> Json:
    """By skill: mean share of the object's tokens, and share of questions with at least one of them."""
    result: Json = {}
    for skill in ("grounding", "vqa"):
        part = [record for record in records if record.skill == skill and share(record) is not None]
        if part:
            result[skill] = {
                "share": mean(part, share, bootstrap),
                "any": mean(part, lambda r: float((share(r) or 0) > 0), bootstrap),
            }
    return result


def mean(records: Iterable[Record], measure: Measure, bootstrap: Bootstrap) -> Json | None:
    """Estimate of a measure over the records that have it, or None."""
    pairs = [(value, record.image) for record in records if (value := measure(record)) is not None]
    estimate = bootstrap.estimate([value for value, _ in pairs], [image for _, image in pairs])
    return None if estimate is None else asdict(estimate)
