"""The command `reroute eval`: bundles and a question set in, scores out as Markdown and JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from reroute import __version__, report
from reroute.errors import EXIT_OK, UserError, nearest
from reroute.evaluation.markdown import to_markdown
from reroute.evaluation.questions import QuestionSet
from reroute.evaluation.runner import Run, run_bundles
from reroute.evaluation.statistics import LEVEL, Bootstrap
from reroute.evaluation.summary import summarise
from reroute.folders import check_output, whole_folder
from reroute.manifest import Boxes
from reroute.runtime import Bundle, Session

SCHEMA_VERSION = 1
KIND = "evaluation"
JSON_NAME, MARKDOWN_NAME = "eval.json", "eval.md"
SCENES = "scenes"
# Options that have a meaning for generated scenes only, and those for a dataset on disk only.
SCENE_OPTIONS = ("grounding", "vqa", "objects", "seed", "split")
DATA_OPTIONS = ("data", "images", "dataset_split", "protocol", "limit")


def run(args: argparse.Namespace) -> int:
    """Check everything, ask, print, write."""
    if args.output is not None:
        check_output(args.output, force=args.force, written=written)
    bundles = open_bundles(args.bundles, args.tier)
    questions = question_set(args, boxes_of(bundles))
    start = time.perf_counter()
    with report.progress(len(bundles) * len(questions), "answers") as advance:
        runs = run_bundles(
            bundles,
            questions,
            open_engine=lambda bundle: Session.open(
                bundle.path, tier=bundle.manifest.tier or None, threads=args.threads, provider=args.provider
            ),
            advance=advance,
        )
    run_facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": platform.machine(),
        "threads": args.threads,
    }
    document = document_of(runs, questions, Bootstrap()) | {"run": run_facts}
    text = to_json(document)
    markdown = to_markdown(document)
    print(text if args.json else markdown, end="", flush=True)
    if args.output is not None:
        with whole_folder(args.output, force=args.force, written=written) as folder:
            (folder / JSON_NAME).write_text(text, encoding="utf-8")
            (folder / MARKDOWN_NAME).write_text(markdown, encoding="utf-8")
        print(f"wrote {args.output / JSON_NAME} and {MARKDOWN_NAME}", file=sys.stderr)
    return EXIT_OK


def open_bundles(paths: Sequence[Path], tier: str | None = None) -> list[Bundle]:
    """Manifests of all bundles; their files are hashed when they are loaded. Raises UserError, also for duplicates.

    A bundle with tiers is there once in each of them, or in `tier` alone.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is given twice", hint="give every bundle once")
    opened = [Bundle.open(path, verify=False) for path in paths]
    if tier is not None:
        return [bundle.at(tier) for bundle in opened]
    return [bundle.at(one.tier or None) for bundle in opened for one in bundle.manifest.all_tiers]


def boxes_of(bundles: Sequence[Bundle]) -> Boxes:
    """How all bundles write boxes. Raises UserError where they differ: they would not be asked the same questions."""
    written: dict[Boxes, Path] = {bundle.manifest.model.boxes: bundle.path for bundle in bundles}
    if len(written) > 1:
        (one, first), (other, second) = list(written.items())[:2]
        raise UserError(
            f"{first} writes boxes in {one}, {second} in {other}: they are not asked in the same words",
            hint="evaluate them one after the other",
        )
    return next(iter(written))


def question_set(args: argparse.Namespace, boxes: Boxes = "shares") -> QuestionSet:
    """The set that --set names, with its options, for models that write `boxes`.

    Raises UserError, also for options of the other kind of set.
    """
    from reroute.evaluation.datasets import DATASETS

    if args.set != SCENES and args.set not in DATASETS:
        raise UserError(f"unknown question set {args.set!r}", hint=nearest(args.set, (SCENES, *DATASETS)))
    foreign = DATA_OPTIONS if args.set == SCENES else SCENE_OPTIONS
    for name in foreign:
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} has no meaning with --set {args.set}",
                hint=f"leave it out, or choose another set: {', '.join((SCENES, *DATASETS))}",
            )
    if args.set == SCENES:
        from reroute.evaluation.scenes import SceneSet

        given = {name: value for name in SCENE_OPTIONS if (value := getattr(args, name)) is not None}
        if "objects" in given:
            given["objects"] = parse_objects(given["objects"])
        return SceneSet(**given, boxes=boxes)
    if args.data is None:
        raise UserError(f"--set {args.set} needs --data PATH", hint="where its annotations are; nothing is downloaded")
    if not args.data.exists():
        raise UserError(f"there is no {args.data}", hint="check --data")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"{args.images} is not a folder", hint="check --images")
    # POPE and GQA ask and judge all models alike.
    own = "qwen" if boxes != "shares" and args.set not in ("pope", "gqa") else None
    given = {"protocol": protocol} if (protocol := args.protocol or own) is not None else {}
    return DATASETS[args.set](args.data, images=args.images, split=args.dataset_split, limit=args.limit, **given)


def parse_objects(text: str) -> tuple[int, int]:
    """`3-7` is at least 3 and at most 7, `4` is 4. Raises UserError."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise UserError(f"--objects {text!r} is not a range", hint="for example 3-7") from None


def document_of(runs: Sequence[Run], questions: QuestionSet, bootstrap: Bootstrap) -> dict[str, Any]:
    """Everything of an evaluation that does not depend on when and where it ran.

    `questions.sha256` covers what was asked and what counts as right: evaluations with the same one can be compared.
    """
    asked = [asdict(question) for question in questions]
    summary = summarise(runs, bootstrap)
    for row, done in zip(summary["bundles"], runs, strict=True):
        row["records"] = [asdict(record) for record in done.records]
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "questions": {
            "set": questions.name,
            "grounding": sum(question["skill"] == "grounding" for question in asked),
            "vqa": sum(question["skill"] == "vqa" for question in asked),
            "images": len({question["image"] for question in asked}),
            "sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        },
        "statistics": {"level": LEVEL, "resamples": bootstrap.resamples, "seed": bootstrap.seed, "unit": "image"},
        "versions": {
            "reroute": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numpy", "pillow", "tokenizers")},
        },
        **summary,
    }


def to_json(document: dict[str, Any]) -> str:
    """JSON for people and programs: indented, with every record on a line of its own."""
    rows = [row["records"] for row in document["bundles"]]
    marked = [{**row, "records": f"@{number}@"} for number, row in enumerate(document["bundles"])]

    def lines(match: re.Match[str]) -> str:
        records = (json.dumps(record, ensure_ascii=False) for record in rows[int(match[1])])
        return "[\n        " + ",\n        ".join(records) + "\n      ]"

    text = json.dumps({**document, "bundles": marked}, indent=2, ensure_ascii=False)
    return re.sub(r'(?<="records": )"@(\d+)@"', lines, text) + "\n"


def written(folder: Path) -> set[str]:
    """Names in an earlier output of this command; nothing for any other folder."""
    try:
        data = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {JSON_NAME, MARKDOWN_NAME} if isinstance(data, dict) and data.get("kind") == KIND else set()
