"""What `reroute compare` prints: a table for people and for a CI's summary page."""

from __future__ import annotations

from collections.abc import Sequence

from reroute.bench.compare import Finding
from reroute.bench.report import table
from reroute.report import format_bytes


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """What the gate fails for."""
    return [one for one in findings if one.verdict == "worse"]


def to_markdown(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """The verdict, the table, the notes."""
    failed = failures(findings)
    verdict = f"failed: {len(failed)} of {len(findings)} figures are worse" if failed else "passed"
    if unclear := sum(one.verdict == "unclear" for one in findings):
        verdict += f"; {unclear} unclear: measure with a larger --repeat, or give --confirm"
    rows = [
        (
            f"`{one.candidate}`",
            "" if one.text is None else str(one.text),
            one.quantity,
            _value(one, one.base),
            _value(one, one.new),
            _change(one),
            f"{100 * one.tolerance:.3g} %",
            f"**{_words(one)}**" if one.verdict == "worse" else _words(one),
        )
        for one in findings
    ]
    columns = ("", "text", "figure", "BASE", "NEW", "change", "allowed", "verdict")
    lines = [f"# Regression gate {verdict}", "", *table(columns, rows, text=1)]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += ["", "Latency: medians; the change is the paired ratio with its 95 % bootstrap interval. Memory: medians."]
    return "\n".join(lines) + "\n"


def _value(one: Finding, value: float) -> str:
    return f"{value:.3g}" if one.quantity.endswith("_ms") else format_bytes(value)


def _change(one: Finding) -> str:
    """`+10.2 % (+9.1 to +11.4)`."""
    change = f"{_percent(one.ratio.value)} %"
    if one.ratio.low == one.ratio.high:
        return change
    if one.ratio.high == float("inf"):
        return f"{change} (one round: no interval)"
    return f"{change} ({_percent(one.ratio.low)} to {_percent(one.ratio.high)})"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def _words(one: Finding) -> str:
    return f"{one.verdict}, twice" if one.confirmed else one.verdict
