"""The tables of the README and the docs from the results, and for every aim whether the figures meet it.

    python -m benchmarks.summary            Markdown on stdout
    python -m benchmarks.summary --gate     exit 3 when an aim is not met or not measured

An aim is met by the figure itself, not by the end of its interval. One that speaks of several profiles, tiers or
sessions is met when each of them meets it, and says the worst.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import costs, decode, footprint, prefill, scaling
from benchmarks.shared.bundles import DENSE, best_of
from benchmarks.shared.results import RESULTS, guarded
from reroute.bench.report import machine_line, table
from reroute.errors import EXIT_GATE, UserError

SCRIPTS = {"prefill": prefill, "costs": costs, "decode": decode, "footprint": footprint, "scaling": scaling}
PREFILL = {"64": 2.5, "128": 2.2, "192": 1.9, DENSE: 1.0}
DECODE = {"int8": 3.5, "int4": 5.0}
SHARE_OF_ALLOWED, ROUTING_SHARE, IMPORT_S = 0.95, 0.02, 0.3
VISUAL = (144, 2304)
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One line of the verdict. `met` is None where nothing was measured."""

    name: str
    wanted: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        """yes, no, or not measured."""
        return {True: "yes", False: "no", None: "not measured"}[self.met]


def main() -> None:
    """Print tables and verdicts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--gate", action="store_true", help=f"exit {EXIT_GATE} when an aim is not met or not measured")
    args = parser.parse_args()
    found = read(args.results)
    lines: list[str] = []
    for name, data in found.items():
        settings = data["settings"]
        lines += [
            f"## {name.capitalize()}",
            "",
            f"{settings['checkpoint']}, {settings['threads']} threads, medians of {settings['repeat']} interleaved "
            f"rounds after {settings['warmup']}; {machine_line(data['machine'])}.",
            "",
            *SCRIPTS[name].markdown(data),
            "",
        ]
    verdict = aims(found)
    lines += ["## Aims", "", *table(("aim", "wanted", "measured", "met"), map(row, verdict), text=4)]
    print("\n".join(lines))
    if args.gate and not all(aim.met for aim in verdict):
        sys.exit(EXIT_GATE)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by name. Raises UserError for one that is not of its script."""
    found = {}
    for name in SCRIPTS:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}", hint=f"python -m benchmarks.{name} writes it") from error
        if not isinstance(data, dict) or data.get("kind") != name:
            raise UserError(
                f"{path} is not a result of benchmarks.{name}", hint=f"python -m benchmarks.{name} writes it"
            )
        found[name] = data
    return found


def row(aim: Aim) -> tuple[str, ...]:
    """Of the table."""
    return aim.name, aim.wanted, aim.measured, aim.word


def aims(found: Results) -> list[Aim]:
    """Every aim of the issue that these scripts measure."""
    return [*_prefill(found), *_costs(found), *_decode(found), *_footprint(found), *_scaling(found)]


def at_least(name: str, value: float | None, wanted: float) -> Aim:
    """A speed-up."""
    measured = "" if value is None else f"{value:.3f}x"
    return Aim(name=name, wanted=f"{wanted:g}x", measured=measured, met=None if value is None else value >= wanted)


def worst(
    name: str, values: Mapping[str, float], wanted: float, form: Callable[[float], str], *, most: bool = False
) -> Aim:
    """An aim of several figures, each at least `wanted`, or with `most` at most."""
    if not values:
        return Aim(name=name, wanted=form(wanted), measured="", met=None)
    key = (max if most else min)(values, key=lambda one: values[one])
    value = values[key]
    met = value <= wanted if most else value >= wanted
    bound = f"{'at most' if most else 'at least'} {form(wanted)}"
    return Aim(name=name, wanted=bound, measured=f"{form(value)} ({key})", met=met)


def _prefill(found: Results) -> list[Aim]:
    data = found.get("prefill", {})
    speedups, profile = data.get("speedup_over_authors_bf16", {}), data.get("speedup_profile", "")
    return [
        at_least(
            f"prefill, dense over transformers' bf16 ({profile})" if tier == DENSE
            else f"prefill at an average of {tier} over the authors' bf16 ({profile})",
            speedups.get(tier),
            wanted,
        )
        for tier, wanted in PREFILL.items()
    ]  # fmt: skip


def _costs(found: Results) -> list[Aim]:
    tiers = found.get("costs", {}).get("found", {})
    shares = {key: one["share_of_allowed"]["value"] for key, one in tiers.items()}
    routing = {key: one["routing_share"] for key, one in tiers.items()}
    return [
        worst(
            "gain of routing, of what the layers' costs allow", shares, SHARE_OF_ALLOWED, lambda value: f"{value:.1%}"
        ),
        worst("routing itself, of routed prefill", routing, ROUTING_SHARE, lambda value: f"{value:.2%}", most=True),
    ]


def _decode(found: Results) -> list[Aim]:
    data = found.get("decode", {})

    def ratios(key: str) -> dict[str, tuple[str, float | None]]:
        """By bits the form that was measured, with kernels rather than without, and its ratio."""
        have = data.get(key, {})
        names = {bits: best_of(bits, have) or bits for bits in DECODE}
        return {bits: (name, have.get(name, {}).get("value")) for bits, name in names.items()}

    over = ratios("speedup_over_transformers_bf16")
    lines = [
        at_least(f"decode {name} over transformers' bf16", value, DECODE[bits]) for bits, (name, value) in over.items()
    ]
    for key, other in (("genai", "onnxruntime-genai"), ("llama_cpp", "llama.cpp")):
        for name, value in ratios(f"speedup_over_{key}").values():
            lines.append(at_least(f"decode {name} over {other} of the same bits", value, 1.0))
    return lines


def _footprint(found: Results) -> list[Aim]:
    data = found.get("footprint", {})
    share = {key: one["peak_rss_bytes"] / one["bound_bytes"] for key, one in data.get("sessions", {}).items()}
    seconds = {"median": data["import_s"]["median"]} if data else {}
    loads = [one["load_ms"] for one in data.get("sessions", {}).values()]
    return [
        worst("peak RSS, of 1.15 (weights + caches) + 150 MB", share, 1.0, lambda value: f"{value:.2f}", most=True),
        worst("`import reroute.runtime`", seconds, IMPORT_S, lambda value: f"{value:.3f} s", most=True),
        Aim(
            name="bundle load time",
            wanted="reported",
            measured=f"{min(loads):.0f} to {max(loads):.0f} ms" if loads else "",
            met=True if loads else None,
        ),
    ]


def _scaling(found: Results) -> list[Aim]:
    data = found.get("scaling")
    wanted = f"{VISUAL[0]} to {VISUAL[1]}, dense beside it"
    if data is None:
        return [Aim(name="prefill against visual tokens and text", wanted=wanted, measured="", met=None)]
    sizes = {cell["size"] for cell in data["visual"]["cells"]}
    dense = {cell["size"] for cell in data["visual"]["cells"] if cell["candidate"].endswith(f", {DENSE}")}
    met = set(VISUAL) <= sizes and dense == sizes and bool(data["text"]["cells"])
    return [
        Aim(
            name="prefill against visual tokens and text",
            wanted=wanted,
            measured=f"{min(sizes)} to {max(sizes)}, dense at {len(dense)} of {len(sizes)}",
            met=met,
        )
    ]


if __name__ == "__main__":
    guarded(main)
