"""Accuracy against the visual tokens that a layer runs on average: one figure for grounding, one for questions.

    python benchmarks/plot_accuracy.py benchmarks/results/accuracy.json -o docs

Reads what benchmarks/accuracy.py writes: `rows`, one for each bundle (see `Row`; ratios are 0..1, intervals 95 %), and
what bounds the numbers: `boundary`, `engine` and `questions`, with the number of questions of each task. Writes
accuracy-grounding.svg and accuracy-vqa.svg; the same input gives the same bytes with the same matplotlib.

Text stays text, and colours follow the reader's light or dark mode. Nothing hangs on colour alone: every method has a
panel, every action a kind of line.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from reroute import report
from reroute.errors import EXIT_OK, RerouteError, UserError, nearest
from reroute.folders import write_whole

METHODS = {"fastv": "FastV", "pdrop": "PyramidDrop", "nuwa": "Nüwa"}
ACTIONS = ("removal", "reroute")
TASKS = {"grounding": "Grounding: boxes with IoU of at least 0.5", "vqa": "One-word answers: exact match"}

_LINES: dict[str, Any] = {"reroute": "-", "removal": (0, (4, 2.5))}
# Stand-ins that matplotlib writes and `adapt` replaces by what CSS sets for light and for dark.
_INK, _FAINT, _LINE, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_STAND_INS = {"fastv": "#010101", "pdrop": "#020202", "nuwa": "#030303"}
_STYLE = """<style>
svg { --ink: #181c24; --faint: #59616e; --line: #dfe3ea; --paper: #ffffff;
      --fastv: #0072b2; --pdrop: #c24e00; --nuwa: #00805c; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e8ebf0; --faint: #a2abb9; --line: #333946; --paper: #14171d;
        --fastv: #56b4e9; --pdrop: #f0853c; --nuwa: #2cc79b; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important;
       paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
</style>
"""
_HINT = "the form is in the docstring of benchmarks/plot_accuracy.py"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one bundle scored.

    Attributes:
        method: "dense" or one of `METHODS`.
        action: "dense" or one of `ACTIONS`.
        average_visual_tokens: per layer, measured.
        scores: for each task (value, low, high), 0..1.
    """

    method: str
    action: str
    average_visual_tokens: float
    scores: dict[str, tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Everything that is drawn or said below a figure."""

    rows: tuple[Row, ...]
    boundary: str
    engine: str
    question_set: str
    questions: dict[str, int]

    @property
    def dense(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.method == "dense")

    def series(self, method: str, action: str) -> list[Row]:
        """Rows of one line, by average."""
        rows = [row for row in self.rows if (row.method, row.action) == (method, action)]
        return sorted(rows, key=lambda row: row.average_visual_tokens)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmarks/results/accuracy.json"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="folder of the figures (default docs)")
    args = parser.parse_args(argv)
    try:
        accuracy = load(args.results)
        for task in TASKS:
            path = args.output / f"accuracy-{task}.svg"
            write_whole(path, figure(accuracy, task).encode("utf-8"))
            print(f"wrote {path}", file=sys.stderr)
        return EXIT_OK
    except RerouteError as error:
        report.print_error(error.message, error.hint)
        return error.exit_code


def load(path: Path) -> Accuracy:
    """Read and check a results file. Raises UserError that names the row and the key."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}", hint="benchmarks/README.md says how it is made") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", hint=_HINT) from error
    rows = _get(data, "rows", str(path), list)
    if not rows:
        raise UserError(f"{path} has no rows", hint=_HINT)
    questions, engine = (_get(data, key, str(path), dict) for key in ("questions", "engine"))
    accuracy = Accuracy(
        rows=tuple(_row(row, f"{path}, row {index}") for index, row in enumerate(rows)),
        boundary=_get(data, "boundary", str(path), str),
        engine=" ".join(_get(engine, key, f"{path}, engine", str) for key in ("engine", "version", "provider")),
        question_set=_get(questions, "set", f"{path}, questions", str),
        questions={task: int(_number(questions, task, f"{path}, questions")) for task in TASKS},
    )
    dense = sum(row.method == "dense" for row in accuracy.rows)
    if dense != 1:
        raise UserError(f"{path} has {dense} dense rows", hint="one is the reference line of both figures")
    return accuracy


def _row(data: Any, where: str) -> Row:
    method, action = (_get(data, key, where, str) for key in ("method", "action"))
    known = {("dense", "dense"), *((name, kind) for name in METHODS for kind in ACTIONS)}
    if (method, action) not in known:
        choices = (" ".join(sorted(set(pair), key=pair.index)) for pair in known)
        raise UserError(f"{where}: nothing is known of {method} {action}", hint=nearest(f"{method} {action}", choices))
    scores = {}
    for task in TASKS:
        value, interval = _number(data, task, where), _get(data, f"{task}_interval", where, list)
        numbers = [side for side in interval if isinstance(side, int | float) and not isinstance(side, bool)]
        if len(interval) != 2 or len(numbers) != 2 or not _ascend(0, numbers[0], value, numbers[1], 1):
            raise UserError(
                f"{where}: {task} is {value} in the interval {interval}", hint="[low, high] around it, all in 0..1"
            )
        scores[task] = (value, float(numbers[0]), float(numbers[1]))
    average = _number(data, "average_visual_tokens", where)
    return Row(method=method, action=action, average_visual_tokens=average, scores=scores)


def _ascend(*numbers: float) -> bool:
    """Whether they do, up to the rounding of a mean."""
    return all(first <= second + 1e-9 for first, second in pairwise(numbers))


def _get(data: Any, key: str, where: str, kind: type) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise UserError(f"{where} has no {key!r}", hint=_HINT)
    if not isinstance(data[key], kind):
        raise UserError(f"{where}: {key!r} is a {type(data[key]).__name__}, not a {kind.__name__}", hint=_HINT)
    return data[key]


def _number(data: Any, key: str, where: str) -> float:
    value = _get(data, key, where, object)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: {key!r} is {value!r}, not a number of at least 0", hint=_HINT)
    return float(value)


def figure(accuracy: Accuracy, task: str) -> str:
    """SVG of one task: a panel for each method. The ids of points are `point-METHOD-ACTION-N`, N by average."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"the figures need {error.name}", hint='pip install -e ".[dev]"') from None

    spines = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "reroute",
        "font.size": 10.5,
        **spines,
    }  # text, not outlines
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        canvas = Figure(figsize=(9.4, 4.8), facecolor=_PAPER)
        canvas.text(0.015, 0.95, TASKS[task], color=_INK, fontsize=13, fontweight="bold", va="center")
        canvas.text(0.015, 0.885, "correct, %, with 95 % intervals", color=_FAINT, va="center")
        _draw_key(canvas)
        for place, method in enumerate(METHODS):
            axes = canvas.add_axes((0.055 + 0.288 * place, 0.265, 0.268, 0.515))
            _draw_axes(axes, accuracy, task, method, first=place == 0)
            _draw_dense(axes, accuracy.dense, task, place, last=place == len(METHODS) - 1)
            for action in ACTIONS:
                _draw_line(axes, accuracy, task, method, action)
        canvas.text(0.475, 0.13, "visual tokens per layer, measured average (log scale)", color=_FAINT, ha="center")
        asked = f"{accuracy.questions[task]} questions ({accuracy.question_set}), the same ones for every point"
        small = {"color": _FAINT, "fontsize": 9, "va": "bottom"}
        canvas.text(0.015, 0.055, f"{accuracy.boundary[:1].upper()}{accuracy.boundary[1:]}.", **small)
        canvas.text(0.015, 0.015, f"{asked}; {accuracy.engine}.", **small)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": TASKS[task]})
    return adapt(buffer.getvalue())


def _draw_key(canvas: Any) -> None:
    """What the two kinds of line mean, at the top right."""
    from matplotlib.lines import Line2D

    for x, action, text in (
        (0.44, "reroute", "reroute: deferred, may return"),
        (0.735, "removal", "removal: gone for good"),
    ):
        look = {"color": _INK, "linestyle": _LINES[action], "linewidth": 1.8, "marker": "o", "markersize": 6}
        fill = _INK if action == "reroute" else _PAPER
        canvas.add_artist(Line2D([x, x + 0.02, x + 0.04], [0.885] * 3, markevery=[1], markerfacecolor=fill, **look))
        canvas.text(x + 0.048, 0.885, text, color=_FAINT, va="center")


def _draw_axes(axes: Any, accuracy: Accuracy, task: str, method: str, *, first: bool) -> None:
    """Axes with the same limits in every panel; the averages of this method's rows are its ticks."""
    axes.set_facecolor(_PAPER)
    axes.set_title(METHODS[method], color=_STAND_INS[method], fontweight="bold", loc="left", fontsize=11)
    bounds = [100 * side for row in accuracy.rows for side in row.scores[task][1:]]
    room = max(1.0, 0.12 * (max(bounds) - min(bounds)))  # for the numbers above and below the points
    axes.set_ylim(min(bounds) - room, max(bounds) + room)
    axes.set_xscale("log")
    routed = [row.average_visual_tokens for row in accuracy.rows if row.method != "dense"]
    axes.set_xlim(min(routed, default=1) / 1.22, max(routed, default=1) * 1.22)
    own = [row.average_visual_tokens for row in accuracy.rows if row.method == method]
    ticks = sorted({round(average, 1) for average in own})
    axes.set_xticks(ticks, _labels(ticks))
    axes.minorticks_off()
    axes.tick_params(axis="x", color=_FAINT, labelcolor=_FAINT, length=4)
    axes.tick_params(axis="y", labelcolor=_FAINT, length=0, labelleft=first)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["bottom"].set_color(_FAINT)


def _labels(ticks: list[float]) -> list[str]:
    """Labels of ascending averages; one that is close to its neighbour stands a line lower."""
    lines: list[float] = []  # the last average on each line
    labels = []
    for tick in ticks:
        line = next((index for index, last in enumerate(lines) if tick > 1.3 * last), len(lines))
        lines[line : line + 1] = [tick]
        labels.append("\n" * line + f"{tick:.1f}")
    return labels


def _draw_dense(axes: Any, dense: Row, task: str, place: int, *, last: bool) -> None:
    value, low, high = (100 * side for side in dense.scores[task])
    axes.axhspan(low, high, color=_FAINT, alpha=0.13, linewidth=0, gid=f"interval-dense-dense-{place}")
    axes.axhline(value, color=_FAINT, linewidth=1.3, gid=f"point-dense-dense-{place}")
    if last:
        where = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "va": "center"}
        axes.annotate(f"dense {value:.1f}", (1.02, value), color=_FAINT, **where)


def _draw_line(axes: Any, accuracy: Accuracy, task: str, method: str, action: str) -> None:
    """One line with its points, their intervals and their values."""
    from matplotlib.transforms import ScaledTranslation

    rows = accuracy.series(method, action)
    if not rows:
        return
    rivals = {row.average_visual_tokens: row for row in accuracy.series(method, _other(action))}
    # The two lines often share their averages: a few points of paper apart, intervals do not cover one another.
    shift = ScaledTranslation((2.5 if action == "reroute" else -2.5) / 72, 0, axes.figure.dpi_scale_trans)
    look = {"color": _STAND_INS[method], "transform": axes.transData + shift}
    averages = [row.average_visual_tokens for row in rows]
    values = [100 * row.scores[task][0] for row in rows]
    name = f"{method}-{action}"
    axes.plot(averages, values, linestyle=_LINES[action], linewidth=1.8, gid=f"line-{name}", **look)
    for index, (row, average, value) in enumerate(zip(rows, averages, values, strict=True)):
        low, high = (100 * side for side in row.scores[task][1:])
        axes.plot([average] * 2, [low, high], alpha=0.5, linewidth=1.6, gid=f"interval-{name}-{index}", **look)
        fill = look["color"] if action == "reroute" else _PAPER
        point = {"marker": "o", "markersize": 6.5, "markeredgewidth": 1.6, "markerfacecolor": fill}
        axes.plot([average], [value], gid=f"point-{name}-{index}", zorder=3, **point, **look)
        nearest_rival = min(rivals.values(), key=lambda rival: abs(rival.average_visual_tokens - average), default=row)
        rival = 100 * nearest_rival.scores[task][0]
        above = value > rival or (value == rival and action == "reroute")
        where = {"textcoords": "offset points", "ha": "center", "va": "bottom" if above else "top", "fontsize": 9}
        place = (0, 5) if above else (0, -5)
        axes.annotate(f"{value:.1f}", (average, high if above else low), place, color=_STAND_INS[method], **where)


def _other(action: str) -> str:
    return next(other for other in ACTIONS if other != action)


def adapt(svg: str) -> str:
    """Let CSS choose the colours of text, lines and paper, for light and for dark readers."""
    head, opening, body = svg.partition("<svg ")
    tag, close, rest = body.partition(">")
    names = {"ink": _INK, "faint": _FAINT, "line": _LINE, "paper": _PAPER, **_STAND_INS}
    for name, stand_in in names.items():
        rest = rest.replace(stand_in, f"var(--{name})")
    return f"{head}{opening}{tag}{close}\n{_STYLE}{rest}"


if __name__ == "__main__":
    sys.exit(main())
