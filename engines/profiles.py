"""CPU profiles of an ONNX Runtime bundle: what its weights are stored as and multiplied with, by name.

    reroute build EXPORT --profile int8

| profile | matrices of the layers | scoring (q and k of layers that score) | lm_head | embedding |
|---|---|---|---|---|
| fp32 | float32 | float32 | float32 | float32 |
| int8 | ROWS8 | float32 | BLOCKS8 | as the checkpoint has it |
| int4 | BLOCKS4; BLOCKS8 where routing depends on it most, see below | float32 | BLOCKS8 | as the checkpoint has it |

ROWS8 is the fastest on prompts: weights signed int8 with a scale for each column, activations int8 with a scale for
each row, found at run time, products in int32. BLOCKS8 and BLOCKS4 are the fastest on single tokens: weights with a
scale for each block of a column, activations int8 by block. Every weight is in memory once and serves prompts and
single tokens alike. The vision tower stays float32 in all of them: it runs once for each image, and everything that
is ranked comes from it.

Which tokens a decision keeps depends on small differences of scores, so a profile must not disturb the rows that are
ranked. Scores themselves are float32, of float32 matrices: the keys of all rows, and the query of the last row. The
queries that attend in a scoring layer are quantised as in any other, so this matrix alone is there in two forms. With
4 bits, how many layers before the decisions have to keep 8 depends on the model and the schedule, so int4 is a ladder
of rules, each more careful than the one before:

| rung | 8 bits |
|---|---|
| 0 | the layers before the second decision; keys and values everywhere |
| 1 | the layers before the last decision but one; queries, keys, values and attention's output everywhere |
| 2 | the layers before the last decision; the same everywhere |

A build that asks questions (`--evaluate`) takes the first rung that keeps 99 % of the tokens that float32 keeps; one
that does not takes rung 1. `int4:0` asks for a rung. The bundle's manifest says which it has, in the same form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from reroute.errors import UserError, nearest
from reroute.schedule import Schedule


class Form(Enum):
    """What a matrix is stored as and multiplied with; see the module docstring."""

    FLOAT = "float32"
    ROWS8 = "int8, a scale for each column; activations a scale for each row"
    BLOCKS8 = "8 bits, blocks of 128"
    BLOCKS4 = "4 bits, blocks of 64"


_LAYER = re.compile(r"layers\.(\d+)\.(\w+_proj)\.weight")
Rule = Callable[[int, str, Schedule], Form]


def _int8(layer: int, part: str, schedule: Schedule) -> Form:
    return Form.ROWS8


def _int4(before: int, parts: frozenset[str]) -> Rule:
    """BLOCKS8 in the layers before decision number `before` (of the schedule's, or its last) and for `parts`."""

    def rule(layer: int, part: str, schedule: Schedule) -> Form:
        scoring = schedule.scoring_layers
        place = min(before, len(scoring) - 1) if before >= 0 else max(before, -len(scoring))
        protected = scoring[place] if scoring else 0
        return Form.BLOCKS8 if layer < protected or part in parts else Form.BLOCKS4

    return rule


_KEYS = frozenset({"k_proj", "v_proj"})
_ATTENTION = _KEYS | {"q_proj", "o_proj"}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named choice of forms.

    Attributes:
        name: for `--profile`.
        rungs: rules for the form of a layer's matrix that is not needed in float32, each more careful than the one
            before; empty keeps every weight float32.
        rung: the one that counts.
        chosen: whether the user asked for this rung.
        lm_head: form of the last matrix, of which every step multiplies one row.
    """

    name: str
    rungs: tuple[Rule, ...] = ()
    rung: int = 0
    chosen: bool = False
    lm_head: Form = Form.FLOAT

    @property
    def quantized(self) -> bool:
        """Whether anything differs from float32."""
        return bool(self.rungs)

    @property
    def label(self) -> str:
        """For the manifest: the name, and the rung of those that there are."""
        return f"{self.name}:{self.rung}" if len(self.rungs) > 1 else self.name

    @property
    def ladder(self) -> tuple[Profile, ...]:
        """What to try in turn when it is measured whether a rung is careful enough."""
        return (self,) if self.chosen else tuple(replace(self, rung=rung) for rung in range(len(self.rungs)))

    def form_of(self, weight: str, schedule: Schedule, *, scores: bool = True) -> Form:
        """Form of a decoder's matrix, by the name of its initializer.

        Args:
            weight: the initializer.
            schedule: says which layers score.
            scores: of a scoring layer's queries: whether this product makes the one that scores.
        """
        if not self.rungs:
            return Form.FLOAT
        if weight == "lm_head.weight":
            return self.lm_head
        found = _LAYER.fullmatch(weight)
        if found is None:
            return Form.FLOAT
        layer, part = int(found[1]), found[2]
        if layer in schedule.scoring_layers and (part == "k_proj" or (part == "q_proj" and scores)):
            return Form.FLOAT
        return self.rungs[self.rung](layer, part, schedule)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="fp32"),
        Profile(name="int8", rungs=(_int8,), lm_head=Form.BLOCKS8),
        Profile(
            name="int4",
            rungs=(_int4(1, _KEYS), _int4(-2, _ATTENTION), _int4(-1, _ATTENTION)),
            rung=1,
            lm_head=Form.BLOCKS8,
        ),
    )
}


def profile_named(text: str) -> Profile:
    """Read `int4`, or `int4:0` for a rung. Raises UserError."""
    name, colon, rung = text.partition(":")
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}", hint=nearest(name, PROFILES))
    profile = PROFILES[name]
    if not colon:
        return profile
    rungs = [str(number) for number in range(len(profile.rungs))] if len(profile.rungs) > 1 else []
    if rung not in rungs:
        what = f"use {', '.join(f'{name}:{number}' for number in rungs)}" if rungs else f"use {name}"
        raise UserError(f"the profile {name} has no rung {rung!r}", hint=what)
    return replace(profile, rung=int(rung), chosen=True)
