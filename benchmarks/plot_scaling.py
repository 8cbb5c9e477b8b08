"""Prefill against visual tokens and against text: docs/scaling.svg.

    python -m benchmarks.plot_scaling benchmarks/results/scaling.json -o docs/scaling.svg

A row of panels for each profile. Text stays text, and colours follow the reader's light or dark mode, as in
plot_accuracy.py; dense is dashed, so that nothing hangs on colour alone. The same input gives the same bytes with the
same matplotlib.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from benchmarks.plot_accuracy import adapt
from benchmarks.shared.results import RESULTS, guarded
from reroute.errors import UserError
from reroute.folders import write_whole

_INK, _FAINT, _LINE, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"  # stand-ins of plot_accuracy.adapt
_COLOURS = ("#010101", "#020202", "#030303")
_AXES = {"visual": "visual tokens", "text": "text tokens"}


def main() -> None:
    """Draw again from the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "scaling.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/scaling.svg"))
    args = parser.parse_args()
    try:
        data = json.loads(args.results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {args.results}: {error}", hint="python -m benchmarks.scaling writes it"
        ) from error
    draw(data, args.output)


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    write_whole(path, figure(data).encode())


def figure(data: dict[str, Any]) -> str:
    """SVG. The ids of lines are `line-PROFILE-TIER-AXIS`, of points `point-PROFILE-TIER-AXIS-SIZE`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"the figure needs {error.name}", hint='pip install -e ".[dev]"') from None

    profiles = data["settings"]["profiles"]
    spines = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "reroute", "font.size": 10.5, **spines}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        height = 0.9 + 3.1 * len(profiles)
        canvas = Figure(figsize=(9.4, height), facecolor=_PAPER)
        canvas.text(0.015, 1 - 0.28 / height, "Prefill as the work grows", color=_INK, fontsize=13, fontweight="bold",
                    va="center")  # fmt: skip
        for row, profile in enumerate(profiles):
            for column, axis in enumerate(_AXES):
                bottom = 1 - (3.1 * row + 3.0) / height
                axes = canvas.add_axes((0.065 + 0.495 * column, bottom, 0.29, 2.15 / height))
                _panel(axes, data, profile, axis)
        words = "Medians, bars are quartiles; budgets stay those of 576 visual tokens. Vision is not in it."
        canvas.text(0.015, 0.06 / height, words, color=_FAINT, fontsize=9, va="bottom")
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": "Prefill"})
    return adapt(buffer.getvalue())


def _panel(axes: Any, data: dict[str, Any], profile: str, axis: str) -> None:
    other = "text" if axis == "visual" else "visual"
    axes.set_facecolor(_PAPER)
    axes.set_title(
        f"{profile}, {data[axis][other]} {_AXES[other]}: ms", color=_INK, fontsize=10.5, loc="left", fontweight="bold"
    )
    sizes = sorted({cell["size"] for cell in data[axis]["cells"]})
    for number, tier in enumerate(("dense", *data["tiers"])):
        cells = {cell["size"]: cell["summary"]["prefill_ms"] for cell in data[axis]["cells"]
                 if cell["candidate"] == f"own {profile}, {tier}"}  # fmt: skip
        look: dict[str, Any] = {"color": _INK if tier == "dense" else _COLOURS[(number - 1) % len(_COLOURS)]}
        style = (0, (4, 2.5)) if tier == "dense" else "-"
        name = f"{profile}-{tier}-{axis}"
        medians = [cells[size]["median"] for size in sizes]
        axes.plot(sizes, medians, linestyle=style, linewidth=1.8, gid=f"line-{name}", **look)
        for size, median in zip(sizes, medians, strict=True):
            axes.plot([size] * 2, cells[size]["quartiles"], linewidth=1.4, alpha=0.5, **look)
            axes.plot([size], [median], marker="o", markersize=5, gid=f"point-{name}-{size}", **look)
        words = "dense" if tier == "dense" else f"average {tier}"
        where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(f"{words}: {medians[-1]:.0f}", (sizes[-1], medians[-1]), (8, 0), **where, **look)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    # Sizes double: the small ones stand too close for labels.
    ticks = [size for size in sizes if size >= sizes[-1] / 5]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel(_AXES[axis], color=_FAINT)
    axes.tick_params(axis="x", color=_FAINT, labelcolor=_FAINT, length=4)
    axes.tick_params(axis="y", labelcolor=_FAINT, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["bottom"].set_color(_FAINT)


if __name__ == "__main__":
    guarded(main)
