"""What counts as a regression. Pure: runs in, findings out.

Latency of two runs at different times cannot be compared in milliseconds: the machine is never twice the same. So two
bench.json files are compared by ratios to a baseline bundle that ran in the same rounds, and two bundles by ratios to
each other, round by round. The ratio of the median round has a bootstrap interval:

* worse: the whole interval lies above the tolerance. Noise widens the interval; it does not fail the gate.
* better: the whole interval lies below 1 by the tolerance.
* unclear: the ratio is above the tolerance but not its whole interval, or the interval is so wide that 1.5 times
  the tolerance lies in it: such a run shows nothing, and is not called ok.
* ok: everything else.

Memory hardly varies, so its medians are compared as they are. What is worse or unclear is measured again where that is
possible, and the second run decides: worse there, or above the tolerance in both runs with the second's interval above
half of it, which two runs do not show by chance, is a confirmed regression. What was worse in the first run alone is
*not confirmed* and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from reroute.bench.document import DENSE, Candidate, Cell, Run
from reroute.bench.statistics import Ratio, paired_ratio, ratio_of_ratios, spread
from reroute.errors import UserError, nearest

Verdict = Literal["ok", "better", "unclear", "worse", "not confirmed"]
SAME = ("images", "tokens", "threads", "provider")


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """By how much a figure may grow, as shares: 0.05 is 5 %."""

    latency: float = 0.05
    memory: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure of the base against the same of the new side.

    Attributes:
        candidate: its name.
        text: text length; None for memory.
        quantity: with its unit in the name.
        base: median.
        new: median.
        ratio: new over base; for latency of two runs both sides are divided by the baseline's first.
        tolerance: that applied.
        verdict: see the module's docstring.
        confirmed: a second run said the same.
    """

    candidate: str
    text: int | None
    quantity: str
    base: float
    new: float
    ratio: Ratio
    tolerance: float
    verdict: Verdict
    confirmed: bool = False

    @property
    def key(self) -> tuple[str, int | None, str]:
        """What a second run calls the same figure."""
        return self.candidate, self.text, self.quantity

    @property
    def suspected(self) -> bool:
        """A second run should look at it."""
        return self.verdict in ("worse", "unclear")

    @property
    def above(self) -> bool:
        """The ratio is above the tolerance, by chance or not."""
        return self.ratio.value > 1 + self.tolerance

    @property
    def likely(self) -> bool:
        """Enough where another run was above as well."""
        return self.above and self.ratio.low > 1 + self.tolerance / 2


def compare_runs(base: Run, new: Run, tolerance: Tolerance, *, baseline: str | None = None) -> list[Finding]:
    """Two runs of equal settings; latency of everything but the baseline, memory of everything.

    Raises:
        UserError: settings differ, a figure of `base` is missing in `new`, or there is no common baseline.
    """
    for name in SAME:
        if base.settings.get(name) != new.settings.get(name):
            one, other = (side.settings.get(name) for side in (base, new))
            raise UserError(
                f"BASE was measured with {name} {one or 'default'}, NEW with {other or 'default'}",
                hint=f"measure both with the same --{name}",
            )
    name = baseline_name(base, new, baseline)
    findings: list[Finding] = []
    for (candidate, text), cell in base.cells.items():
        if (candidate, text) not in new.cells or (name, text) not in new.cells:
            raise UserError(
                f"NEW lacks {candidate} at {text} text tokens, which BASE has",
                hint="measure the same bundles and text lengths; a row that is gone could hide a regression",
            )
        if candidate == name:
            continue
        if (name, text) not in base.cells:
            raise UserError(f"BASE lacks its baseline {name} at {text} text tokens", hint="measure BASE again")
        other, under, new_under = new.cells[candidate, text], base.cells[name, text], new.cells[name, text]
        for quantity in cell.samples:
            if quantity not in under.samples:
                continue
            if quantity not in other.samples or quantity not in new_under.samples:
                raise UserError(f"NEW lacks {quantity} of {candidate}, which BASE has", hint="measure it again")
            ratio = ratio_of_ratios(
                (other.samples[quantity], new_under.samples[quantity]),
                (cell.samples[quantity], under.samples[quantity]),
            )
            findings.append(_latency(candidate, text, quantity, (cell, other), ratio, tolerance.latency))
    for candidate, one in base.candidates.items():
        if one.memory:
            findings += _memory(candidate, one, new.candidates.get(candidate), tolerance.memory)
    return findings


def baseline_name(base: Run, new: Run, wanted: str | None) -> str:
    """Name of the candidate that latency is divided by. Raises UserError."""
    if wanted is not None:
        names = [name for name, one in base.candidates.items() if wanted in (name, one.folder)]
        if len(names) != 1 or names[0] not in new.candidates:
            raise UserError(f"no single candidate {wanted!r} in both runs", hint=nearest(wanted, base.candidates))
        return names[0]
    dense = [name for name, one in base.candidates.items() if one.action == DENSE and name in new.candidates]
    if len(dense) != 1:
        raise UserError(
            f"{len(dense)} dense bundles are in both runs, so it is not clear what to divide latency by",
            hint="measure one dense bundle in both, name one with --baseline, or compare two bundles instead of files",
        )
    return dense[0]


def compare_pair(run: Run, base: str, new: str, tolerance: Tolerance) -> list[Finding]:
    """Two candidates of one run, round by round."""
    findings: list[Finding] = []
    for (candidate, text), cell in run.cells.items():
        if candidate != base:
            continue
        other = run.cells[new, text]
        for quantity, samples in cell.samples.items():
            ratio = paired_ratio(other.samples[quantity], samples)
            findings.append(_latency(new, text, quantity, (cell, other), ratio, tolerance.latency))
    return findings + _memory(new, run.candidates[base], run.candidates[new], tolerance.memory)


def confirm(first: Sequence[Finding], again: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Measure again if anything is suspected; the second run decides about that, and its figures are taken."""
    if not any(one.suspected for one in first):
        return list(first)
    second = {one.key: one for one in again()}
    result = []
    for one in first:
        found = second.get(one.key)
        if one.suspected and found is not None:
            if found.verdict == "worse" or (one.above and found.likely):
                one = replace(found, verdict="worse", confirmed=True)
            else:
                one = replace(found, verdict="not confirmed" if one.verdict == "worse" else found.verdict)
        result.append(one)
    return result


def _latency(
    candidate: str, text: int, quantity: str, cells: tuple[Cell, Cell], ratio: Ratio, tolerance: float
) -> Finding:
    base, new = (spread(cell.samples[quantity]).median for cell in cells)
    verdict: Verdict = "ok"
    if ratio.low > 1 + tolerance:
        verdict = "worse"
    elif ratio.high < 1 - tolerance:
        verdict = "better"
    elif ratio.value > 1 + tolerance or ratio.high > 1 + 1.5 * tolerance:
        verdict = "unclear"
    return Finding(
        candidate=candidate,
        text=text,
        quantity=quantity,
        base=base,
        new=new,
        ratio=ratio,
        tolerance=tolerance,
        verdict=verdict,
    )


def _memory(candidate: str, base: Candidate, new: Candidate | None, tolerance: float) -> list[Finding]:
    findings = []
    for quantity, before in base.memory.items():
        if new is None or quantity not in new.memory:
            raise UserError(f"NEW lacks {quantity} of {candidate}, which BASE has", hint="measure the same bundles")
        after = new.memory[quantity]
        value = after / before
        verdict: Verdict = "worse" if value > 1 + tolerance else "better" if value < 1 - tolerance else "ok"
        findings.append(
            Finding(
                candidate=candidate,
                text=None,
                quantity=quantity,
                base=before,
                new=after,
                ratio=Ratio(value=value, low=value, high=value),
                tolerance=tolerance,
                verdict=verdict,
            )
        )
    return findings
