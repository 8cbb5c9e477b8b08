"""The report as Markdown tables. Numbers in brackets are the bounds of the interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from reroute.evaluation.regions import LARGE_SIDE, MEDIUM_SIDE
from reroute.evaluation.summary import SIZES

Json = dict[str, Any]


def to_markdown(document: Json) -> str:
    """All tables of a document of `reroute eval`."""
    asked, statistics, bundles = document["questions"], document["statistics"], document["bundles"]
    parts = [
        f"# {asked['set']}",
        f"{asked['grounding']} questions for a box and {asked['vqa']} for an answer, on {asked['images']} images. "
        f"Brackets: {statistics['level']:.0%} intervals, {statistics['resamples']} bootstrap resamples of images.",
        "## Bundles\n\n" + _bundles(bundles),
    ]
    if asked["grounding"]:
        parts += ["## Grounding\n\n" + _grounding(bundles)]
    if asked["vqa"]:
        parts += ["## Answers, % right\n\n" + _vqa(bundles)]
    if compared := [row for row in bundles if "agreement" in row]:
        parts += ["## Agreement with the dense engine\n\n" + _agreement(compared)]
    if document["differences"]:
        parts += ["## Differences, question by question\n\n" + _differences(document["differences"])]
    if any(row["decisions"] for row in bundles):
        parts += ["## Decisions\n\n" + _decisions(bundles)]
    return "\n\n".join(parts) + "\n"


def _bundles(bundles: Sequence[Json]) -> str:
    rows = [
        (
            _code(row["name"]),
            f"{row['measured']['visual_tokens_per_layer']:.1f}",
            f"{row['measured']['kv_bytes'] / 2**20:.3g}",
            f"{row['backend']} {row['dtype']}",
            row["checkpoint_sha256"][:12],
        )
        for row in bundles
    ]
    columns = ("bundle", "visual tokens per layer", "KV cache, MiB", "engine", "checkpoint")
    return _table(columns, rows, text=(0, 3, 4)) + "\n\nTokens and cache are measured means over the questions."


def _grounding(bundles: Sequence[Json]) -> str:
    columns = ["bundle", "IoU >= 0.5, %", "mean IoU", *(f"{size}, %" for size in SIZES), "no box"]
    rows = []
    for row in bundles:
        own = row["scores"]["grounding"]
        sizes = (_percent(own["by_size"].get(size, {}).get("accuracy")) for size in SIZES)
        overlap = _number(own["mean_iou"])
        rows.append((_code(row["name"]), _percent(own["accuracy"]), overlap, *sizes, str(own["no_box"])))
    ious = [
        (
            _code(row["name"]),
            *(_number(row["scores"]["grounding"]["by_size"].get(size, {}).get("mean_iou")) for size in SIZES),
        )
        for row in bundles
    ]
    counts = ", ".join(
        f"{size} {part['accuracy']['questions']}" for size, part in bundles[0]["scores"]["grounding"]["by_size"].items()
    )
    note = (
        f"Sizes: mean side of the true box below {MEDIUM_SIDE}, below {LARGE_SIDE}, and larger, as shares of the "
        f"image's. Questions: {counts}."
    )
    by_size = _table(("mean IoU by size", *SIZES), ious)
    return "\n\n".join((_table(columns, rows), by_size, note))


def _vqa(bundles: Sequence[Json]) -> str:
    kinds = bundles[0]["scores"]["vqa"]["by_kind"]
    columns = ("bundle", "all", *(f"{kind} ({estimate['questions']})" for kind, estimate in kinds.items()))
    rows = [
        (
            _code(row["name"]),
            _percent(row["scores"]["vqa"]["accuracy"]),
            *(_percent(row["scores"]["vqa"]["by_kind"][kind]) for kind in kinds),
        )
        for row in bundles
    ]
    return _table(columns, rows)


def _agreement(bundles: Sequence[Json]) -> str:
    rows = []
    for row in bundles:
        own = row["agreement"]
        values = (_percent(own.get(what)) for what in ("grounding", "same_place", "vqa"))
        rows.append((_code(row["name"]), *values))
    text = _table(("bundle", "equal boxes, %", "boxes of IoU >= 0.5, %", "equal answers, %"), rows)
    if strangers := [row for row in bundles if not row["agreement"]["same_checkpoint"]]:
        names = ", ".join(_code(row["name"]) for row in strangers)
        text += f"\n\nOf another checkpoint than {_code(strangers[0]['agreement']['with'])}: {names}."
    return text


def _differences(differences: Sequence[Json]) -> str:
    rows = []
    for row in differences:
        grounding, vqa = row.get("grounding", {}), row.get("vqa", {})
        values = (
            _percent(grounding.get("accuracy"), signed=True),
            _number(grounding.get("mean_iou"), signed=True),
            _percent(vqa.get("accuracy"), signed=True),
        )
        rows.append((f"{_code(row['first'])} - {_code(row['second'])}", *values))
    columns = ("first minus second", "IoU >= 0.5, points", "mean IoU", "answers, points")
    return _table(columns, rows) + "\n\nBold: the interval excludes 0."


def _decisions(bundles: Sequence[Json]) -> str:
    rows = []
    for row in bundles:
        for decision in row["decisions"]:
            objects = decision["object"]
            values = (
                _percent(objects.get(skill, {}).get(what))
                for skill in ("grounding", "vqa")
                for what in ("share", "any")
            )
            rows.append(
                (
                    _code(row["name"]),
                    "vision" if decision["layer"] is None else str(decision["layer"]),
                    f"{decision['kept']:.1f}",
                    f"{decision['returned']:.1f}",
                    f"{decision['recovered']:.1f}",
                    *values,
                )
            )
    columns = (
        "bundle",
        "layer",
        "kept",
        "came back",
        "were out before",
        "object kept, % (grounding)",
        "any of it, %",
        "object kept, % (answers)",
        "any of it, %",
    )
    note = (
        "Visual tokens, means over the questions. Came back: did not run in the stage before. Were out before: did not "
        "run in some earlier stage. Object: its tokens, where the question is about one."
    )
    return _table(columns, rows) + "\n\n" + note


def _percent(estimate: Json | None, *, signed: bool = False) -> str:
    return _estimate(estimate, 100, 1, signed)


def _number(estimate: Json | None, *, signed: bool = False) -> str:
    return _estimate(estimate, 1, 3, signed)


def _estimate(estimate: Json | None, scale: float, digits: int, signed: bool) -> str:
    if estimate is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    text = format(estimate["value"] * scale, form)
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return text
    text = f"{text} [{format(low * scale, form)}, {format(high * scale, form)}]"
    return f"**{text}**" if signed and (low > 0 or high < 0) else text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    marks = ["---" if index in text else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")
