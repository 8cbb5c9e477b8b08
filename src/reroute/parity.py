"""How what an engine computed is compared with its reference: rows of gates, in the order of the data flow.

Arrays are those of `reroute.scenario`, expected and measured under the same names; gates are in `reroute.gates`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reroute.gates import Gates, gates_of, vision_gates
from reroute.manifest import Manifest
from reroute.scenario import Arrays


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One gate: what was compared, what was measured, what it may be at most (or at least).

    `tier` is empty for a bundle without tiers.
    """

    part: str
    quantity: str
    measured: str
    gate: str
    passed: bool
    tier: str = ""

    @property
    def where(self) -> str:
        """The part, with its tier."""
        return f"tier {self.tier}, {self.part}" if self.tier else self.part

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without a tier where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "tier" or value}


def compare(manifest: Manifest, expected: Arrays, measured: Arrays) -> list[CheckRow]:
    """All gates of a replay."""
    gates, vision = gates_of(manifest), vision_gates(manifest)
    floats = [name for name in ("visual_embeds", "visual_deepstack") if name in expected]
    rows = [_close("vision", "features", floats, expected, measured, vision)]
    for high, wide in manifest.model.vision.grids:
        others = [f"{high}x{wide}.{name}" for name in floats]
        if others[0] in expected:
            rows.append(_close("vision", f"features of {high} x {wide}", others, expected, measured, vision))
    for name in sorted(name for name in expected if name.endswith("visual_places")):
        rows.append(_places(name, expected[name], measured[name]))
    if gates.slots < 1.0:
        rows += _shares(manifest, expected, measured, gates)
    else:
        rows += _decisions(manifest, expected, measured, gates)
    rows.append(_close("prompt", "logits", ["prompt.logits"], expected, measured, gates))
    rows.append(_tokens(expected, measured, gates))
    rows.append(_close("later turn", "logits", ["turn.logits"], expected, measured, gates))
    return rows


def _decisions(manifest: Manifest, expected: Arrays, measured: Arrays, gates: Gates) -> list[CheckRow]:
    """Slots and caches of every stage, each slot the reference's or a tie."""
    rows: list[CheckRow] = []
    tied = False
    for stage in range(1, len(manifest.schedule.stages)):
        row, tie = _slots(stage, expected, measured, gates)
        rows.append(row)
        tied = tied or tie
    for number, quantity, names in _caches(manifest):
        part = f"stage {number}"
        if tied and number:
            # Other rows ran, rightly: their caches are not the reference's. The logits below still have to agree.
            rows.append(CheckRow(part=part, quantity=quantity, measured="tie above", gate="not compared", passed=True))
        else:
            rows.append(_close(part, quantity, names, expected, measured, gates))
    return rows


def _shares(manifest: Manifest, expected: Arrays, measured: Arrays, gates: Gates) -> list[CheckRow]:
    """The same for a quantised engine: a share of the slots, and the cache rows of those that both have."""
    rows: list[CheckRow] = []
    equal = kept = 0
    for stage in range(1, len(manifest.schedule.stages)):
        want, got = (_visual_slots(stage, arrays, expected) for arrays in (expected, measured))
        common = int(np.isin(got, want).sum())
        equal, kept = equal + common, kept + len(want)
        counts = f"{common} of {len(want)} visual ones equal"
        same = len(want) == len(got)
        rows.append(CheckRow(part=f"stage {stage}", quantity="slots", measured=counts, gate="as many", passed=same))
    if kept:
        share = equal / kept
        gate = f"of all decisions >= {gates.slots:.0%}"
        rows.append(
            CheckRow(part="stages", quantity="slots", measured=f"{share:.1%}", gate=gate, passed=share >= gates.slots)
        )
    for number, quantity, names in _caches(manifest):
        ours, theirs = measured, expected
        if number:
            own, other = (arrays[f"routes.{number}"].ravel() for arrays in (measured, expected))
            ours = {name: measured[name].take(_rows_of(own, other, measured[name].shape[2]), axis=2) for name in names}
            theirs = {
                name: expected[name].take(_rows_of(other, own, expected[name].shape[2]), axis=2) for name in names
            }
            quantity += ", common rows"
        rows.append(_close(f"stage {number}", quantity, names, theirs, ours, gates))
    return rows


def _caches(manifest: Manifest) -> Iterator[tuple[int, str, list[str]]]:
    """Every stage with layers: its number, what to call its caches, and their names."""
    for number, stage in enumerate(manifest.schedule.stages):
        if names := [f"cache.{i}.{part}" for i in range(stage.start, stage.stop) for part in ("key", "value")]:
            yield number, f"caches of layers {stage.start}-{stage.stop - 1}", names


def _visual_slots(stage: int, arrays: Arrays, expected: Arrays) -> np.ndarray:
    """The visual slots that run in a stage: what it runs of all that were ever ranked."""
    return np.intersect1d(arrays[f"routes.{stage}"], expected["candidates.1"])


def _rows_of(slots: np.ndarray, others: np.ndarray, rows: int) -> np.ndarray:
    """Cache rows, of `rows`, whose slot is in `others` as well, and those of later steps, which run everywhere."""
    return np.concatenate([np.flatnonzero(np.isin(slots, others)), np.arange(len(slots), rows)])


def _close(
    part: str, quantity: str, names: Sequence[str], expected: Arrays, measured: Arrays, gates: Gates
) -> CheckRow:
    """Gate on the largest absolute difference, over all `names`, as Polygraphy computes it, and on the cosine."""
    from polygraphy.comparator import CompareFunc, IterationResult
    from polygraphy.logger import G_LOGGER

    gate = gates.close
    wrong = [name for name in names if expected[name].shape != measured[name].shape]
    if wrong:
        shapes = f"{wrong[0]} {list(measured[wrong[0]].shape)} for {list(expected[wrong[0]].shape)}"
        return CheckRow(part=part, quantity=quantity, measured=f"shape {shapes}", gate=gate, passed=False)
    results = [
        IterationResult(OrderedDict((name, arrays[name]) for name in names), runner_name=runner)
        for arrays, runner in ((measured, "engine"), (expected, "torch"))
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        same = CompareFunc.simple(atol=gates.tolerance, rtol=0.0, check_error_stat="max")(*results)
    worst = max(float(same[name].max_absdiff) for name in names)
    cosine = min(_cosine(expected[name], measured[name]) for name in names)
    return CheckRow(
        part=part,
        quantity=quantity,
        measured=f"max abs {worst:.1e}, cosine {cosine:.6f}",
        gate=gate,
        passed=all(bool(same[name]) for name in names) and cosine >= gates.cosine,
    )


def _places(name: str, want: np.ndarray, got: np.ndarray) -> CheckRow:
    """The tokens that a vision graph lets through must be identical; `name` begins with the grid of other graphs."""
    grid = name.removesuffix("visual_places").rstrip(".")
    equal = int(np.isin(got, want).sum())
    return CheckRow(
        part="vision",
        quantity=f"places of {grid.replace('x', ' x ')}" if grid else "places",
        measured=f"{equal} of {want.size} equal",
        gate="identical",
        passed=np.array_equal(want, got),
    )


def _slots(stage: int, expected: Arrays, measured: Arrays, gates: Gates) -> tuple[CheckRow, bool]:
    """Slots of a stage must be identical; a candidate may differ only if its score ties with the cut-off."""
    want, got = (
        set(expected[f"routes.{stage}"].ravel().tolist()),
        set(measured[f"routes.{stage}"].ravel().tolist()),
    )
    different = sorted(want ^ got)
    candidates, scores = expected[f"candidates.{stage}"].ravel(), expected[f"scores.{stage}"].ravel()
    score_of = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
    kept = [score for slot, score in score_of.items() if slot in want]
    cut = min(kept) if kept else 0.0
    margin = max(gates.score_margin, gates.score_share * cut)
    tie = bool(different) and all(abs(score_of.get(slot, np.inf) - cut) <= margin for slot in different)
    row = CheckRow(
        part=f"stage {stage}",
        quantity="slots",
        measured=f"{len(want & got)} of {len(want)} equal" + (", the rest tie" if tie else ""),
        gate=gates.same_slots,
        passed=len(want) == len(got) and (not different or tie),
    )
    return row, tie


def _tokens(expected: Arrays, measured: Arrays, gates: Gates) -> CheckRow:
    """Greedy tokens, each given the reference's tokens before it."""
    equal = expected["tokens"] == measured["tokens"]
    tied = ~equal & (measured["margins"] <= gates.token_margin)
    ties = f"ties within {gates.token_margin:g}"
    return CheckRow(
        part="decode",
        quantity="greedy tokens",
        measured=f"{int(equal.sum())} of {len(equal)} equal" + (f", {int(tied.sum())} tie" if tied.any() else ""),
        gate=f"identical, {ties}" if gates.tokens == 1.0 else f">= {gates.tokens:.0%}, {ties}",
        passed=float((equal | tied).mean()) >= gates.tokens,
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms else 1.0
