"""The command `reroute tune`: a checkpoint and a bound in, the best schedule of a search space out."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reroute import report
from reroute.bench import document as bench_document
from reroute.bench.machine import facts
from reroute.bench.workload import Shape
from reroute.cost import resolve
from reroute.errors import EXIT_OK, GateError, UserError
from reroute.evaluation.command import SCENES, question_set
from reroute.evaluation.questions import QuestionSet
from reroute.folders import check_output, whole_folder
from reroute.manifest import Boxes, Capacity, Grid, Model
from reroute.routing import RoutingSpec
from reroute.runtime.backend import BackendOptions
from reroute.tuning import document
from reroute.tuning.bounds import Bounds
from reroute.tuning.budgets import rounds_of, split
from reroute.tuning.document import BUNDLE_NAME, JSON_NAME, MARKDOWN_NAME, ROUTING_NAME
from reroute.tuning.report import print_space, to_markdown
from reroute.tuning.search import Outcome, Settings, nearest, prune, search
from reroute.tuning.space import entries_of, parse_space
from reroute.tuning.trace import Entry
from reroute.tuning.workshop import Workshop

MIB = 1 << 20
QUESTIONS = 400  # of each kind on generated scenes
VALIDATION = "validation"


def run(args: argparse.Namespace) -> int:
    """Check everything, search, write, print. Raises GateError when no candidate keeps the bounds."""
    start = time.monotonic()
    output: Path | None = None if args.dry_run else args.output
    if output is None and not args.dry_run:
        raise UserError("tune needs -o DIR", hint="or --dry-run, which writes nothing")
    if args.dry_run and args.keep_bundle:
        raise UserError("--keep-bundle has no meaning with --dry-run", hint="leave one of them out")
    bounds = bounds_of(args)
    space = parse_space(
        args.space, methods=args.methods, averages=args.averages, layers=args.layers, shapes=args.shapes
    )
    capacity = Capacity(max_text=args.max_text, max_images=args.max_images)
    shape = Shape(text=args.text, images=1, tokens=args.tokens)
    if shape.text + shape.tokens > capacity.max_text:
        raise UserError(
            f"a prompt of {shape.text} text tokens and {shape.tokens} decode steps do not fit --max-text "
            f"{capacity.max_text}",
            hint="lower --text or --tokens, or give a larger --max-text",
        )
    options = BackendOptions(threads=args.threads, provider=args.provider)
    if output is not None:
        check_output(output, force=args.force, written=written)
    from reroute.export import check_capacity, read_model
    from reroute.export.checkpoint import Checkpoint
    from reroute.export.grids import parse_grids

    grids = parse_grids(args.grids) if args.grids is not None else ()
    model = read_model(args.checkpoint, grids)
    check_capacity(capacity, model)
    entries = entries_of(space, model, capacity, num_text=shape.text)
    left = prune(entries, bounds)
    questions = questions_of(args, model.boxes)
    parts = split(questions, seed=args.seed or 0)
    rounds_of(len(left), len(parts.search), args.questions)
    if output is None:
        return dry_run(args, entries, bounds, len(left), len(parts.search), len(parts.fresh))

    # Before anything runs: the load average should be that of the neighbours, not our own.
    machine = facts(gpu=args.provider != "cpu")
    memory = machine["memory_bytes"]
    settings = Settings(
        warmup=args.warmup,
        repeat=args.repeat,
        questions=args.questions,
        seconds=None if args.budget_minutes is None else args.budget_minutes * 60 - (time.monotonic() - start),
        seed=args.seed or 0,
        memory_bytes=memory // 2 if memory else Settings().memory_bytes,
    )
    with whole_folder(output, force=args.force, written=written) as folder:
        work = folder / ".work"
        work.mkdir()
        workshop = Workshop(
            args.checkpoint,
            work,
            {entry.name: entry.plan for entry in entries if entry.plan is not None},
            questions,
            shape=shape,
            capacity=capacity,
            grids=grids,
            options=options,
        )
        outcome = search(entries, bounds, workshop, parts, settings, progress=report.progress, tell=progress)
        data = document.make(
            outcome,
            space=space,
            bounds=bounds,
            model=model,
            checkpoint_sha256=Checkpoint.open(args.checkpoint).sha256,
            questions=parts,
            set_name=questions.name,
            settings=settings_of(args, settings, capacity, grids),
            machine=machine,
        )
        if outcome.winner is not None:
            write_routing(folder / ROUTING_NAME, outcome.winner, model)
            if args.keep_bundle:
                workshop.keep(outcome.winner.name, folder / BUNDLE_NAME)
        shutil.rmtree(work)
        markdown = to_markdown(data)
        text = bench_document.to_json(data)
        (folder / JSON_NAME).write_text(text, encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(markdown, encoding="utf-8")
    print(text if args.json else markdown, end="", flush=True)
    also = f", {MARKDOWN_NAME} and {ROUTING_NAME}" if outcome.winner else f" and {MARKDOWN_NAME}"
    progress(f"wrote {output / JSON_NAME}{also}")
    if outcome.winner is None:
        raise no_candidate(outcome.entries, bounds)
    progress(f"next: reroute export {args.checkpoint} -o DIR --routing {output / ROUTING_NAME}")
    return EXIT_OK


def dry_run(
    args: argparse.Namespace, entries: list[Entry], bounds: Bounds, left: int, pool: int, kept_back: int
) -> int:
    """Print the space and how it would be searched."""
    rounds = rounds_of(left, pool, args.questions) if left else []
    if args.json:
        outcome = Outcome(entries=entries, planned=rounds)
        print(json.dumps(document.space_of(outcome, bounds), indent=2, ensure_ascii=False))
    else:
        print_space(entries, sys.stdout, title=f"search space under: {'; '.join(bounds.words())}")
        if left:
            first = f"{rounds[0].questions} of {pool} search questions in the first of at most {len(rounds)} rounds"
            print(f"{left} to build and measure beside dense; {first}; {kept_back} questions kept back.")
    if not left:
        raise no_candidate(entries, bounds)
    return EXIT_OK


def bounds_of(args: argparse.Namespace) -> Bounds:
    """The limits that were given. Raises UserError."""
    return Bounds(
        prefill_ms=args.prefill_ms,
        end_to_end_ms=args.end_to_end_ms,
        speedup=args.speedup,
        kv_bytes=None if args.kv_mib is None else args.kv_mib * MIB,
        memory_bytes=None if args.memory_mib is None else args.memory_mib * MIB,
    )


def questions_of(args: argparse.Namespace, boxes: Boxes = "shares") -> QuestionSet:
    """The set of `reroute eval`'s options, generated scenes from the validation split. Raises UserError."""
    own = copy.copy(args)
    if args.set != SCENES:
        own.seed = None  # it is tune's own, and the readers know none
        return question_set(own, boxes)
    if args.split not in (None, VALIDATION):
        raise UserError(
            f"--split {args.split}: tune searches on {VALIDATION} scenes only",
            hint="what a search has seen is no test any more: score the result with `reroute eval`, which asks the "
            "held-out ones",
        )
    own.split = VALIDATION
    own.grounding = QUESTIONS if args.grounding is None else args.grounding
    own.vqa = QUESTIONS if args.vqa is None else args.vqa
    return question_set(own, boxes)


def settings_of(
    args: argparse.Namespace, settings: Settings, capacity: Capacity, grids: tuple[Grid, ...]
) -> dict[str, Any]:
    """Everything that shapes the search besides space, bounds and questions."""
    return {
        **asdict(settings),
        "budget_minutes": args.budget_minutes,
        "text": args.text,
        "images": 1,
        "tokens": args.tokens,
        "threads": args.threads,
        "provider": args.provider,
        "spinning": False,
        "capacity": asdict(capacity),
        "grids": [list(grid) for grid in grids],
    }


def write_routing(path: Path, winner: Entry, model: Model) -> None:
    """The winner as TOML, read back: it must mean the schedule that was measured."""
    path.write_text(document.to_toml(winner.name), encoding="utf-8")
    if resolve(RoutingSpec.parse(str(path)), model) != winner.schedule:
        raise RuntimeError(f"{winner.name} does not survive being written as TOML")


def no_candidate(entries: list[Entry], bounds: Bounds) -> GateError:
    """What to say when nothing keeps the bounds."""
    found = nearest(entries, bounds)
    if found is None:
        tried = next((entry for entry in entries if entry.status in ("failed", "not tried")), None)
        why = f"; {tried.name}: {tried.reason}" if tried else ""
        return GateError(f"no candidate was measured{why}", hint="give more time, or look at the failed builds")
    entry, missed = found
    by = f"a factor of {missed.miss:.3g}"
    skipped = sum(entry.status == "not tried" for entry in entries)
    what = f"no candidate of those tried keeps the bound, {skipped} were not tried for lack of time" if skipped else ""
    return GateError(
        f"{what or 'no candidate keeps the bound'}; the nearest is {entry.name}: {missed}, missed by {by}",
        hint="loosen the bound, or widen the search space (smaller --averages, earlier --layers)",
    )


def progress(line: str) -> None:
    """One line of log."""
    print(line, file=sys.stderr, flush=True)


def written(folder: Path) -> set[str]:
    """Names in an earlier output of this command; nothing for any other folder."""
    try:
        data = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(data, dict) or data.get("kind") != document.KIND:
        return set()
    return {JSON_NAME, MARKDOWN_NAME, ROUTING_NAME, BUNDLE_NAME}
