"""What the command line prints: tables with rich, errors without it.

Data goes to stdout, logs and errors to stderr. `NO_COLOR` is respected, and text that is not going to a
terminal is plain and `WIDTH` columns wide whatever the terminal of the caller. rich is imported when a table
is drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from reroute.cost import Plan
    from reroute.schedule import Schedule

WIDTH = 120


def console(stream: TextIO) -> Console:
    """A rich console on `stream` that neither guesses at markup in data nor wraps to 80 columns in a pipe."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=False)


def format_bytes(count: float) -> str:
    """`1536` is 1.5 KiB; binary units, three significant digits at most."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def format_flops(count: float) -> str:
    """`2.5e9` is 2.50 GFLOP; decimal units, floating-point operations and not a rate."""
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP" if value < 100 else f"{value:.0f} {unit}FLOP"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, text: int = 1) -> Table:
    """A plain table: the first `text` columns are words (left), the others numbers (right)."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        grid.add_column(name, justify="left" if index < text else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    return grid


def pairs(values: Iterable[tuple[str, object]]) -> Table:
    """A table of names and values without a header."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2), show_header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in values:
        grid.add_row(name, str(value))
    return grid


def describe(schedule: Schedule) -> str:
    """What a schedule does besides its budgets, in words."""
    if schedule.action == "dense":
        return "none: every token runs in every layer"
    lost = {"reroute": "the others wait and compete again", "removal": "the others are gone for good"}
    scored = {"own": "the decision layer", "previous": "the layer before"}
    by = scored[schedule.scoring]
    if not schedule.plain_scores:
        heads = {"mean": "mean", "max": "largest"}[schedule.heads]
        by += f" (last {schedule.rows} rows, {heads} of all heads)"
    words = [f"scored by {by}", lost[schedule.action], f"{schedule.positions} positions"]
    if schedule.nuwa is not None:
        some = str(schedule.nuwa)
        if schedule.nuwa_share is not None:
            some = f"{100 * schedule.nuwa_share[0] / schedule.nuwa_share[1]:.3g} % of the"
        words.insert(0, f"{some} tokens leave the vision tower (Nüwa)")
    return ", ".join(words)


def print_plan(plan: Plan, routing: str, stream: TextIO) -> None:
    """The plan: one row a stage, then totals next to the dense model."""
    rows = [
        (
            f"{stage.start}-{stage.stop - 1}" if stage.stop > stage.start else "none",
            (plan.schedule.nuwa or "all") if stage.budget is None or stage.budget > plan.num_visual else stage.budget,
            stage.candidates if stage.budget is not None else "-",
            stage.rows,
            format_flops(stage.linear_flops),
            format_flops(stage.attention_flops),
            format_flops(stage.scoring_flops) if stage.budget is not None else "-",
            format_bytes(stage.kv_bytes),
        )
        for stage in plan.stages
    ]
    out = console(stream)
    columns = ("layers", "visual kept", "rows scored", "rows run", "linear", "attention", "scoring", "KV")
    prompt = f"{plan.num_visual} visual + {plan.num_text} text tokens"
    _title(out, f"plan for {routing}, one prompt of {prompt}")
    out.print(table(columns, rows))
    if plan.grids:
        columns = ("image", "visual", "kept", "average", "decoder of dense", "KV of dense", "vision tower")
        out.print(table(columns, _grid_rows(plan)))
    out.print(
        pairs(
            [
                (
                    "visual tokens per layer",
                    f"{plan.average_visual_tokens:.1f} of {plan.num_visual} (measured average)",
                ),
                ("decisions", describe(plan.schedule)),
                ("decoder prefill", _against(plan.decoder_flops, plan.dense_decoder_flops, format_flops)),
                ("vision tower", f"{format_flops(plan.vision_flops)}, not reduced by the decoder's routing"),
                ("KV cache, this prompt", _against(plan.kv_bytes, plan.dense_kv_bytes, format_bytes)),
                ("KV cache, full capacity", _against(plan.cache_bytes, plan.dense_cache_bytes, format_bytes)),
                ("weights", format_bytes(plan.weight_bytes)),
                ("peak memory, estimated", f"{format_bytes(plan.peak_bytes)} (weights + caches + workspace)"),
            ]
        )
    )


TIER_COLUMNS = ("tier", "routing", "average", "kept", "decoder prefill", "of dense", "scoring", "KV", "of dense")


def print_tiers(plans: Mapping[str, tuple[str, Plan]], stream: TextIO) -> None:
    """One row for each tier of (routing, plan), the default first."""
    rows = [tier_row(name, routing, plan) for name, (routing, plan) in plans.items()]
    out = console(stream)
    out.print("")
    _title(out, f"{len(rows)} tiers of one set of weights, the first by default")
    out.print(table(TIER_COLUMNS, rows, text=2))


def tier_row(name: str, routing: str, plan: Plan) -> tuple[str, ...]:
    """Average, budgets, FLOPs and KV bytes of a tier, see `TIER_COLUMNS`."""
    return (
        name,
        routing,
        f"{plan.average_visual_tokens:.1f}",
        ", ".join("all" if rows >= plan.num_visual else str(rows) for rows in plan.schedule.budgets),
        format_flops(plan.decoder_flops),
        f"{plan.decoder_ratio:.3f}",
        format_flops(sum(stage.scoring_flops for stage in plan.stages)),
        format_bytes(plan.kv_bytes),
        f"{plan.kv_ratio:.3f}",
    )


def _grid_rows(plan: Plan) -> list[tuple[object, ...]]:
    return [
        (
            f"{one.grid[0]} x {one.grid[1]}",
            one.num_visual,
            ", ".join(map(str, one.budgets)) or "all",
            f"{one.average_visual_tokens:.1f}",
            f"{one.decoder_ratio:.3f}",
            f"{one.kv_ratio:.3f}",
            format_flops(one.vision_flops),
        )
        for one in plan.grids
    ]


def print_check(report: Any, stream: TextIO) -> None:
    """One row for every quantity that was compared, then the verdict."""
    tiers = any(row.tier for row in report.rows)
    rows = [
        (
            *((row.tier,) if tiers else ()),
            *(row.part, row.quantity, _number(row.measured), _number(row.gate), "ok" if row.passed else "FAILED"),
        )
        for row in report.rows
    ]
    columns = ("tier",) * tiers + ("part", "quantity", "measured", "gate", "result")
    out = console(stream)
    out.print(table(columns, rows, text=len(columns)))
    failed = sum(not row.passed for row in report.rows)
    verdict = "check passed" if report.passed else f"check failed: {failed} of {len(rows)} rows"
    out.print(f"{verdict} (reference: {report.reference})")


def print_pairs(values: Iterable[tuple[str, object]], stream: TextIO, *, title: str = "") -> None:
    """Print names and values, as the timing table of `reroute run`, and after a titled one a blank line."""
    out = console(stream)
    _title(out, title)
    out.print(pairs(values), "", sep="\n" if title else "")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    stream: TextIO,
    *,
    title: str = "",
    text: int = 1,
) -> None:
    """Print a table; the first `text` columns are left-aligned."""
    out = console(stream)
    _title(out, title)
    out.print(table(columns, rows, text=text))


def print_error(message: str, hint: str = "", stream: TextIO | None = None) -> None:
    """`error: ...`, and after a blank line `hint: ...`. Needs nothing but the standard library."""
    out = sys.stderr if stream is None else stream
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    red, cyan, end = ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") if colour else ("", "", "")
    print(f"{red}error:{end} {one_line(message)}", file=out)
    if hint:
        print(f"\n{cyan}hint:{end} {one_line(hint)}", file=out)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, on a terminal only; yields what moves it by one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def one_line(text: str) -> str:
    """`text` without line breaks: messages of other libraries have them."""
    return " ".join(line.strip() for line in text.splitlines())


def _against(value: int, dense: int, form: Any) -> str:
    return f"{form(value)}, {value / dense:.3f} of the dense model's {form(dense)}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _title(out: Console, title: str) -> None:
    # Not rich's own table title, which wraps to the table's width and breaks paths.
    if title:
        out.print(title, style="bold", soft_wrap=True)
