"""The report: Markdown of the same document that tune.json holds, and the table of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from reroute import report
from reroute.bench.report import machine_line, table
from reroute.report import format_bytes, format_flops
from reroute.tuning.trace import Entry

Json = dict[str, Any]
NOT_BUILT = ("pruned", "unreachable", "not tried", "failed")
_TIMES = {"prefill_ms": "prefill", "end_to_end_ms": "end to end"}


def to_markdown(data: Json) -> str:
    """The whole report."""
    result, model = data["result"], data["model"]
    parts = [
        f"# Tuning of a {model['model_type']} model, {model['visual_tokens']} visual tokens",
        f"Bound: {'; '.join(data['bounds']['words'])}.",
        _verdict(data),
    ]
    parts += [f"**{note}**" for note in data["notes"]]
    if result["fresh"]:
        parts += ["## Score on fresh questions", _fresh(data)]
    if data["batches"]:
        parts += ["## Measured candidates", _measured(data)]
    if data["front"]:
        parts += ["## Pareto front: score against latency", _front(data)]
    if rest := [one for one in data["candidates"] if one["status"] in NOT_BUILT]:
        rows = [(_name(one), one["status"], one["reason"]) for one in rest]
        parts += ["## Not measured", "\n".join(table(("schedule", "", "why"), rows, text=3))]
    parts += ["## How this was found", _method(data)]
    return "\n\n".join(parts) + "\n"


def print_space(entries: Sequence[Entry], stream: TextIO, *, title: str) -> None:
    """What a dry run shows: every schedule with what the plan knows of it, and what the plan alone rules out."""
    rows = []
    for entry in entries:
        plan = entry.plan
        fate = entry.reason if entry.status == "candidate" else f"{entry.status}: {entry.reason}"
        same = f" = {', '.join(entry.also)}" if entry.also else ""
        if plan is None:
            rows.append((entry.name, fate, "", "", "", ""))
            continue
        flops = f"{format_flops(plan.decoder_flops)} ({plan.decoder_ratio:.3f})"
        sizes = (format_bytes(plan.kv_bytes), format_bytes(plan.peak_bytes))
        rows.append((entry.name + same, fate or "to be tried", f"{plan.average_visual_tokens:.1f}", flops, *sizes))
    columns = ("schedule", "", "average", "prefill (of dense)", "KV", "memory, est.")
    report.print_table(columns, rows, stream, title=title, text=2)


def _verdict(data: Json) -> str:
    result = data["result"]
    if result["winner"] is None:
        near = result["nearest"]
        words = f" The nearest is `{near['name']}`: {near['words']} ({near['miss']:.2f} times it)." if near else ""
        skipped = sum(one["status"] == "not tried" for one in data["candidates"])
        some = f" ({skipped} were not tried for lack of time.)" if skipped else ""
        return f"**No candidate keeps the bound.**{words}{some}"
    one = _find(data, result["winner"])
    latency = one["latency"]
    times = ", ".join(
        f"{words} {_span(latency['times'][name])} ms ({latency['speedup'][name]['value']:.2f}x dense)"
        for name, words in _TIMES.items()
    )
    fresh = result["fresh"][0]
    plan = one["plan"]
    score = f"{_percent(fresh['score'])} % of {fresh['score']['questions']} fresh questions right"
    if fresh["minus_dense"] is not None:
        dense = next(row for row in result["fresh"] if row["name"] == data["candidates"][0]["name"])
        score += (
            f" (dense: {_percent(dense['score'])} %; difference {_percent(fresh['minus_dense'], signed=True)} points)"
        )
    lines = [
        f"**Best: `{one['name']}`**, {score}; {times}; {plan['average_visual_tokens']:.1f} visual tokens per layer, "
        f"KV of the prompt {format_bytes(plan['kv_bytes'])}."
    ]
    if unsure := _unsure(data, latency):
        lines.append(f"The bound holds for the median only: {unsure}. Give more --repeat, or a little room.")
    lines.append("Export it with `reroute export CHECKPOINT -o OUT --routing routing.toml`.")
    return "\n\n".join(lines)


def _unsure(data: Json, latency: Json) -> str:
    """The latency bounds that lie inside the interval, in words."""
    bounds, found = data["bounds"], []
    for bound in ("prefill_ms", "end_to_end_ms", "speedup"):
        limit = bounds[bound]
        value = latency["speedup"]["prefill_ms"] if bound == "speedup" else latency["times"][bound]
        if limit is not None and (value["high"] is None or value["low"] <= limit <= value["high"]):
            found.append(f"{bound} {_span(value)} contains {limit:g}")
    return ", ".join(found)


def _fresh(data: Json) -> str:
    rows = []
    for row in data["result"]["fresh"]:
        mark = " (winner)" if row["name"] == data["result"]["winner"] else ""
        search = _find(data, row["name"])["score"]
        rows.append(
            (
                f"`{row['name']}`{mark}",
                _percent(row["score"]),
                _percent(row["grounding"]),
                _percent(row["vqa"]),
                _percent(row["minus_dense"], signed=True),
                f"{100 * search:.1f}" if search is not None else "-",
            )
        )
    columns = ("schedule", "right, %", "boxes, %", "answers, %", "minus dense, points", "in the search, %")
    note = (
        "Brackets: 95 % bootstrap intervals over images. The winner was chosen before these questions were asked, by "
        "the score in the last column, which flatters it."
    )
    return "\n".join(table(columns, rows)) + "\n\n" + note


def _measured(data: Json) -> str:
    rows = []
    for one in data["candidates"]:
        latency, plan = one["latency"], one["plan"]
        if latency is None:
            continue
        rows.append(
            (
                _name(one),
                _fate(one),
                f"{plan['average_visual_tokens']:.1f}",
                f"{plan['decoder_ratio']:.3f}",
                format_bytes(plan["kv_bytes"]),
                _span(latency["times"]["prefill_ms"]),
                f"{latency['speedup']['prefill_ms']['value']:.2f}x",
                _span(latency["times"]["end_to_end_ms"]),
                f"{100 * one['score']:.1f} ({len(one['scores'])})" if one["scores"] else "-",
            )
        )
    columns = ("schedule", "", "visual tokens", "FLOPs of dense", "KV", "prefill, ms", "speed", "end to end, ms")
    note = (
        "Medians with 95 % intervals; speed is the prefill's against dense, paired by round. Right: of the search "
        "questions asked, their number in brackets; only rows with the same number compare directly."
    )
    return "\n".join(table((*columns, "right, %"), rows, text=2)) + "\n\n" + note


def _front(data: Json) -> str:
    quantity = data["bounds"]["ties"]
    rows = []
    for name in data["front"]:
        one = _find(data, name)
        latency = one["latency"]
        rows.append(
            (
                f"`{name}`",
                _span(latency["times"][quantity]),
                f"{latency['speedup'][quantity]['value']:.2f}x",
                f"{100 * one['score']:.1f} ({len(one['scores'])})",
            )
        )
    note = (
        "Of the candidates that keep the bound; the others were not asked. Two are compared on the questions that both "
        "answered, and by their latency against dense."
    )
    columns = ("schedule", f"{_TIMES[quantity]}, ms", "speed against dense", "right, % (questions)")
    return "\n".join(table(columns, rows)) + "\n\n" + note


def _method(data: Json) -> str:
    settings, questions, counts = data["settings"], data["questions"], {}
    for one in data["candidates"]:
        counts[one["status"]] = counts.get(one["status"], 0) + 1
    fates = ", ".join(f"{status} {number}" for status, number in counts.items())
    merged = sum(len(one["also"]) for one in data["candidates"])
    lines = [
        f"- Schedules, dense among them: {len(data['candidates'])} ({fates})"
        + (f"; {merged} more specs mean one of these." if merged else "."),
    ]
    if data["batches"]:
        lines.append(
            f"- Latency: {settings['repeat']} interleaved rounds after {settings['warmup']} of warm-up, a prompt of "
            f"one image and {settings['text']} text tokens, {settings['tokens']} decode steps; batches, dense in each: "
            f"{len(data['batches'])}; threads: {settings['threads'] or 'default'}, provider: {settings['provider']}."
        )
    lines.append(
        f"- Questions: {questions['set']}; {len(questions['search'])} to search with, {len(questions['fresh'])} about "
        f"other images kept back, of which {questions['fresh_asked']} were asked."
    )
    if data["rounds"]:
        plan = "; ".join(
            f"{one['candidates']} candidates to {one['questions']} questions" + ("" if one["run"] else " (not run)")
            for one in data["rounds"]
        )
        lines.append(f"- Rounds: {plan}. The better half goes on; equal scores go to the lower latency.")
    took = ", ".join(f"{name} {value:.0f} s" for name, value in data["seconds"].items())
    lines += [
        f"- Seed {settings['seed']}." + (f" Took: {took}." if took else ""),
        f"- Machine: {machine_line(data['machine'])}.",
    ]
    if data["batches"]:
        lines += [f"- {name}: {words}." for name, words in data["boundary"].items()]
    return "\n".join(lines)


def _fate(one: Json) -> str:
    return one["status"] + (f" ({one['reason']})" if one["reason"] else "")


def _name(one: Json) -> str:
    return f"`{one['name']}`" + (f" (= {', '.join(f'`{name}`' for name in one['also'])})" if one["also"] else "")


def _find(data: Json, name: str) -> Json:
    return next(one for one in data["candidates"] if one["name"] == name)


def _span(ratio: Json) -> str:
    high = "" if ratio["high"] is None else f" [{ratio['low']:.3g}-{ratio['high']:.3g}]"
    return f"{ratio['value']:.3g}{high}"


def _percent(estimate: Json | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    form = "+.1f" if signed else ".1f"
    text = format(100 * estimate["value"], form)
    if estimate["low"] is None:
        return text
    return f"{text} [{format(100 * estimate['low'], form)}, {format(100 * estimate['high'], form)}]"
