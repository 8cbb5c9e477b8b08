"""What `reroute bench` prints and writes besides its JSON: Markdown and CSV of the same document."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from reroute.bench.workload import QUANTITIES
from reroute.report import format_bytes

_HEADS = {
    "vision_ms": "vision, ms",
    "prefill_ms": "prefill, ms",
    "decode_ms": "decode, ms/token",
    "end_to_end_ms": "end-to-end, ms",
}


def to_markdown(data: dict[str, Any]) -> str:
    """A table for each text length, one of memory, and what each figure includes."""
    settings, machine = data["settings"], data["machine"]
    rounds = f"{settings['repeat']} interleaved rounds after {settings['warmup']} of warm-up"
    lines = [
        f"# Latency and memory, {settings['images']} image{'s' * (settings['images'] != 1)}, "
        f"{settings['tokens']} decode steps",
        "",
        f"Medians of {rounds}, quartiles in brackets; in one process, threads: {settings['threads'] or 'default'}, "
        f"provider: {settings['provider']}. "
        + (f"(N.Nx) is against `{dense}`, paired by round." if (dense := data["statistics"]["speedup_over"]) else ""),
        "",
        f"Machine: {machine_line(machine)}.",
    ]
    for text in settings["text"]:
        cells = [cell for cell in data["cells"] if cell["text"] == text]
        lines += ["", f"## {text} text tokens", "", *_latency(cells, data["candidates"])]
    if rows := [one for one in data["candidates"] if one["memory"]]:
        lines += ["", "## Memory", "", *_memory(rows)]
    lines += ["", "## What the figures include", ""]
    lines += [f"- {name}: {words}." for name, words in data["boundary"].items()]
    return "\n".join(lines) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """The facts that a reader of figures asks for first."""
    load = machine["load_average_before"]
    words = [
        machine["cpu"],
        machine.get("gpu"),
        f"{machine['cores_usable']} of {machine['cores']} cores",
        format_bytes(machine["memory_bytes"]) if machine["memory_bytes"] else None,
        machine["system"],
        f"governor {machine['governor']}" if machine["governor"] else None,
        f"power mode {machine['power_mode']}" if machine.get("power_mode") else None,
        f"load before {load[0]:.2f}" if load else None,
    ]
    return ", ".join(word for word in words if word)


def to_csv(data: dict[str, Any]) -> str:
    """One line for each figure; raw samples are in the JSON only."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ("candidate", "text", "images", "tokens", "quantity", "median", "first_quartile", "third_quartile", "mad")
    writer.writerow((*head, "rounds", "speedup", "speedup_low", "speedup_high"))
    images, tokens = data["settings"]["images"], data["settings"]["tokens"]
    for cell in data["cells"]:
        for name, found in cell["summary"].items():
            speedup = cell["speedup"].get(name, {})
            writer.writerow(
                (
                    *(cell["candidate"], cell["text"], images, tokens, name),
                    *(f"{value:.5g}" for value in (found["median"], *found["quartiles"], found["mad"])),
                    len(cell["samples"][name]),
                    *(f"{speedup[key]:.5g}" if speedup else "" for key in ("value", "low", "high")),
                )
            )
        if cell["kv_bytes"] is not None:
            writer.writerow((cell["candidate"], cell["text"], images, tokens, "kv_bytes", cell["kv_bytes"], *[""] * 7))
    for one in data["candidates"]:
        for name, value in one["memory"].items():
            writer.writerow((one["name"], "", images, tokens, name, int(value), *[""] * 7))
    return out.getvalue()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> list[str]:
    """Lines of a Markdown table; the first `text` columns are words."""
    rule = ["---"] * text + ["---:"] * (len(columns) - text)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def _latency(cells: Sequence[dict[str, Any]], candidates: Sequence[dict[str, Any]]) -> list[str]:
    averages = {one["name"]: one["average_visual_tokens"] for one in candidates}
    used = [name for name in QUANTITIES if any(name in cell["summary"] for cell in cells)]
    rows = []
    for cell in cells:
        average = averages[cell["candidate"]]
        kv = cell["kv_bytes"]
        rows.append(
            (
                f"`{cell['candidate']}`",
                f"{average:.1f}" if average is not None else "",
                *(_figure(cell, name) for name in used),
                format_bytes(kv) if kv is not None else "",
            )
        )
    return table(("", "visual tokens per layer", *(_HEADS[name] for name in used), "KV of the prompt"), rows)


def _figure(cell: dict[str, Any], name: str) -> str:
    """`12.3 [12.1-12.9] (4.2x)`."""
    if name not in cell["summary"]:
        return ""
    found = cell["summary"][name]
    low, high = found["quartiles"]
    # The vision graph is the same for all: its ratio would say nothing about routing.
    speedup = cell["speedup"].get(name) if name != "vision_ms" else None
    times = f" ({speedup['value']:.1f}x)" if speedup else ""
    return f"{found['median']:.3g} [{low:.3g}-{high:.3g}]{times}"


def _memory(candidates: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for one in candidates:
        memory = one["memory"]
        held = memory["weight_bytes"] + memory["cache_bytes"]
        rows.append(
            (
                f"`{one['name']}`",
                *(format_bytes(memory[name]) for name in ("weight_bytes", "cache_bytes", "peak_rss_bytes")),
                f"{memory['peak_rss_bytes'] / held:.2f}x",
                f"{one['load_ms']:.0f}",
            )
        )
    return table(("", "weights", "caches", "peak RSS", "of weights + caches", "load, ms"), rows)
