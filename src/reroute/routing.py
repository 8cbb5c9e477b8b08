"""Routing specs: what a user writes to say how visual tokens are routed.

    dense
    reroute@2,7,15,23:keep=22,22,11,6               budgets in tokens
    reroute@2,7,15,23:keep=.1392,.1392,.0696,.0348  budgets as shares of the visual tokens: max(1, int(N * s))
    reroute@2,7,15,23:avg=1/9                       exact budgets for an average per layer: a share ...
    removal@2,7,15,23:avg=64:shape=geometric        ... or tokens; uniform, geometric or halving (the default)
    reroute@2,7,15,23:flops=.3                      ... for a share of the dense decoder's FLOPs, or 1.2T
    reroute@2,7,15,23:kv=64MiB                      ... for KV bytes, or a share of the dense decoder's
    removal@3:keep=.25:score=previous               scored by the attention of the layer before (FastV's code)
    removal@8,16,24:keep=.5,.25,.125:positions=renumbered   positions counted anew (PyramidDrop's code)
    removal@16:nuwa=112:keep=16:score=previous      Nüwa: 112 tokens leave the vision tower, 16 the decision
    reroute@2,7,15,23:avg=1/9:pool=image            several images in a prompt: a budget for each; `all`: one for all
    removal@15:nuwa=.35:keep=.147:score=previous:rows=3:heads=max    Nüwa's form for Qwen2.5-VL: scored by the attention
                                                    of the last 3 rows (their mean), the largest of all heads
    reroute-pdrop:avg=1/9                           a method by name, its layers scaled to the model's depth
    published:llava15/avg64/reroute-pdrop           the ratios printed in the paper, under the paper's name

The same in TOML, as `[routing]` with one key per option; `action`, `method` or `published` names the head. Methods and
published schedules are in `reroute.published`, the shapes in `reroute.solver`.

FLOPs and KV bytes are those of the plan: one image and 64 text tokens (see `reroute.cost`).

Where a model's images differ in size, budgets in tokens are the same for all of them and act as min(K, N); shares, also
those of a target, are of the visual tokens that the tower makes for a prompt. Budgets are solved for the largest image.
So `nuwa=.35:keep=.147` means: 35 % leave the tower, rounded up, and of those that entered 42 % are kept, rounded down,
which is how Nüwa's code counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from reroute.errors import UserError, nearest
from reroute.published import METHODS, PUBLISHED
from reroute.schedule import Action, Heads, Pool, Positions, Schedule, Scoring, Stage
from reroute.solver import NUWA_RATIO, Shape, solve

Target = Literal["avg", "flops", "kv"]
# (cost of a schedule, cost of the dense decoder) in the unit of a target; see `reroute.cost.measure`.
Measure = Callable[[Target, Schedule], tuple[int, int]]

_KEYS = ("keep", *get_args(Target), "shape", "score", "positions", "nuwa", "pool", "rows", "heads")
MAX_ROWS = 16  # a prompt's template alone ends with some five rows of text
_GRAMMAR = "ACTION@LAYERS:keep=K,K,... or ACTION@LAYERS:avg=A[:shape=S], for example reroute@2,7,15,23:avg=1/9"
_UNITS: dict[str, dict[str, int]] = {
    "flops": {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "kv": {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30},
}
_UNIT_NAMES = {"avg": "visual tokens", "flops": "FLOPs", "kv": "KV bytes"}
_QUANTITY = re.compile(r"([\d./]+)\s*([A-Za-z]*)")


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """What the user asked for, before it meets a model. Exactly one of `keep` and `target` is set, or neither for
    `dense`. A `Fraction` is a share; an int is tokens, FLOPs or bytes.

    Attributes:
        text: the spec as written.
        action: of the schedule.
        layers: decision layers; empty where a method scales its own.
        keep: budgets, one for each decision.
        target: what `amount` measures, where budgets are to be solved.
        amount: the target, a share or an absolute number.
        shape: how solved budgets relate.
        score: see `Schedule.scoring`.
        positions: see `Schedule.positions`.
        nuwa: tokens that leave the vision tower, "auto" for 7 times the first budget, None for all.
        pool: see `Schedule.pool`.
        rows: see `Schedule.rows`.
        heads: see `Schedule.heads`.
        method: name in `METHODS` whose layers to scale, or empty.
    """

    text: str
    action: Action
    layers: tuple[int, ...] = ()
    keep: tuple[int | Fraction, ...] = ()
    target: Target | None = None
    amount: int | Fraction = 0
    shape: Shape = "halving"
    score: Scoring = "own"
    positions: Positions = "original"
    nuwa: int | Fraction | Literal["auto"] | None = None
    pool: Pool = "all"
    rows: int = 1
    heads: Heads = "mean"
    method: str = ""

    @classmethod
    def parse(cls, text: str) -> RoutingSpec:
        """Parse a spec, or read the TOML file that `text` names. Raises UserError."""
        text = text.strip()
        if text.endswith(".toml"):
            text = from_toml(Path(text))
        if text == "dense":
            return cls(text=text, action="dense")
        if text.startswith("published:"):
            name = text.removeprefix("published:")
            if name not in PUBLISHED:
                raise UserError(f"unknown published schedule {name!r}", hint=nearest(name, PUBLISHED))
            return replace(cls.parse(PUBLISHED[name]), text=text)
        head, *fields = text.split(":")
        name, at, layer_list = head.partition("@")
        if name == "dense":
            raise UserError(f"dense takes no layers and no options, got {text!r}", hint="write `dense` alone")
        if name not in ("removal", "reroute", *METHODS):
            choices = ("dense", "removal", "reroute", "published", *METHODS)
            raise UserError(f"unknown routing action {name!r} in {text!r}", hint=nearest(name, choices))
        if not fields or (not at and name not in METHODS):
            raise UserError(f"incomplete routing spec {text!r}", hint=f"the form is {_GRAMMAR}")
        options: dict[str, Any] = {"action": name}
        if at:
            options["layers"] = tuple(_integer(item, text) for item in layer_list.split(","))
        given = _fields(fields, text)
        if name in METHODS:
            method = METHODS[name]
            options |= {"action": method.action, "method": name}
            # What is written wins over the method's own; with explicit budgets a shape means nothing.
            own = _fields(method.options, text)
            own.pop("shape" if "keep" in given else "", None)
            given = own | given
        for key, value in given.items():
            options |= _option(key, value, text)
        wanted = [key for key in ("keep", *get_args(Target)) if key in given]
        if len(wanted) != 1:
            raise UserError(
                f"{text!r} needs exactly one of keep=, avg=, flops= and kv=", hint=f"the form is {_GRAMMAR}"
            )
        if "keep" in given and "shape" in given:
            raise UserError(f"shape= has no meaning with keep= in {text!r}", hint=f"the form is {_GRAMMAR}")
        if "keep" in given and given.get("nuwa") == "auto":
            raise UserError(
                f"nuwa=auto has no meaning with keep= in {text!r}", hint="write the tokens, for example nuwa=112"
            )
        if options.get("positions") == "renumbered" and options["action"] != "removal":
            raise UserError(
                f"positions=renumbered has no meaning with {options['action']} in {text!r}",
                hint="a token that comes back needs the position it had; use removal, or leave the key away",
            )
        return cls(text=text, **options)

    def resolve(
        self, *, num_layers: int, num_visual: int, measure: Measure | None = None, sizes_vary: bool = False
    ) -> Schedule:
        """Integer budgets for a decoder of `num_layers` layers and `num_visual` visual tokens per image.

        Args:
            num_layers: decoder layers.
            num_visual: visual tokens that the tower makes of one image, the largest where they differ.
            measure: for targets in FLOPs and KV bytes, which depend on the model; see `reroute.cost.resolve`.
            sizes_vary: images differ in size: shares follow the visual tokens of a prompt.

        Raises:
            UserError: a layer that does not exist, budgets that do not match the layers, exceed the
                candidates or grow under removal, or a target that no budgets reach.
        """
        if self.action == "dense":
            return Schedule(action="dense", stages=(Stage(start=0, stop=num_layers, keep=None),))
        layers = self.layers or METHODS[self.method].at(num_layers)
        if any(b <= a for a, b in pairwise(layers)):
            raise UserError(f"decision layers must ascend, got {_join(layers)}", hint="for example 2,7,15,23")
        if layers[0] < 0 or layers[-1] >= num_layers:
            raise UserError(
                f"decision layers {_join(layers)} do not fit a decoder of {num_layers} layers",
                hint=f"layers are numbered 0 to {num_layers - 1}; a decision acts on the input of its layer",
            )
        if self.score == "previous" and layers[0] == 0:
            raise UserError(
                "score=previous needs a layer before the decision, and there is none before layer 0",
                hint="decide at layer 1 or later, or use score=own",
            )
        if self.target is not None:
            lead, budgets = self._solve(layers, num_layers, num_visual, measure)
        else:
            if len(self.keep) != len(layers):
                raise UserError(
                    f"{len(layers)} decision layers but {len(self.keep)} budgets in {self.text!r}",
                    hint="give one budget for each decision layer",
                )
            lead = _tokens(self.nuwa, num_visual) if isinstance(self.nuwa, (int, Fraction)) else None
            budgets = [_tokens(keep, num_visual) for keep in self.keep]
        if not sizes_vary:
            self._validate(layers, budgets, lead, num_visual)
            return self._schedule(layers, budgets, num_layers, lead)
        return self._follow_sizes(self._schedule(layers, budgets, num_layers, lead), num_visual)

    def _follow_sizes(self, schedule: Schedule, num_visual: int) -> Schedule:
        """The schedule with every budget that was given as a share, or solved for one, as a share of its candidates."""
        asked = isinstance(self.amount, Fraction)
        lead: Fraction | None = None
        if isinstance(self.nuwa, Fraction):
            lead = self.nuwa
        elif self.nuwa == "auto" and asked and schedule.nuwa is not None:
            lead = Fraction(schedule.nuwa, num_visual)
        if self.target is None:
            keeps = [(k.numerator, k.denominator) if isinstance(k, Fraction) else None for k in self.keep]
        else:
            keeps = [(k, num_visual) if asked else None for k in schedule.budgets]
        if schedule.nuwa is not None and lead is None and any(keeps):
            raise UserError(
                f"{self.text!r} lets a number of tokens leave the tower and keeps a share of them, but images differ "
                "in size",
                hint="give both in tokens, or both as shares, such as nuwa=.35:keep=.147",
            )
        if lead is not None:
            schedule = replace(schedule, nuwa_share=(lead.numerator, lead.denominator))
            schedule = replace(schedule, nuwa=schedule.entering(num_visual))
        entering = schedule.entering(num_visual)
        stages = [schedule.stages[0]]
        for stage, keep in zip(schedule.stages[1:], keeps, strict=True):
            if keep is not None and lead is not None:
                keep = (Fraction(*keep) / lead).as_integer_ratio()
            if keep is not None and keep[0] <= keep[1]:  # a larger one is refused below, as for any model
                stage = replace(stage, share=keep)
                stage = replace(stage, keep=stage.visual_rows(entering))
            stages.append(stage)
        schedule = replace(schedule, stages=tuple(stages))
        self._validate(schedule.decision_layers, list(schedule.budgets), schedule.nuwa, num_visual)
        return schedule

    def _schedule(
        self,
        layers: tuple[int, ...],
        budgets: list[int],
        num_layers: int,
        lead: int | None,
    ) -> Schedule:
        edges, keeps = [0, *layers, num_layers], [None, *budgets]
        stages = tuple(Stage(start=a, stop=b, keep=k) for a, b, k in zip(edges, edges[1:], keeps, strict=False))
        return Schedule(
            action=self.action,
            stages=stages,
            scoring=self.score,
            positions=self.positions,
            nuwa=lead,
            pool=self.pool,
            rows=self.rows,
            heads=self.heads,
        )

    def _validate(self, layers: tuple[int, ...], budgets: list[int], lead: int | None, num_visual: int) -> None:
        if lead is not None and not 1 <= lead <= num_visual:
            raise UserError(
                f"nuwa={lead} tokens cannot leave a vision tower of {num_visual}", hint=f"give 1 to {num_visual}"
            )
        candidates = entering = num_visual if lead is None else lead
        where = "" if lead is None else " after Nüwa's first stage"
        for layer, budget in zip(layers, budgets, strict=True):
            if budget < 1:
                raise UserError(f"the budget at layer {layer} is {budget}", hint="a budget is at least 1 token")
            if budget > entering:
                raise UserError(
                    f"the budget at layer {layer} is {budget} tokens, but there are {entering}{where}",
                    hint=f"use a budget of at most {entering}, or a share such as .1392",
                )
            if self.action == "removal":
                if budget > candidates:
                    raise UserError(
                        f"removal keeps {budget} tokens at layer {layer}, but only {candidates} are left",
                        hint="budgets of removal must not grow with depth; reroute allows it",
                    )
                candidates = budget

    def _solve(
        self, layers: tuple[int, ...], num_layers: int, num_visual: int, measure: Measure | None
    ) -> tuple[int | None, list[int]]:
        """Tokens out of the tower (None: all) and budgets whose cost does not exceed the target."""
        target = self.target
        assert target is not None
        if target == "avg" or measure is None:
            measure = _visual_rows(num_visual)
        auto = self.nuwa == "auto"
        fixed = _tokens(self.nuwa, num_visual) if isinstance(self.nuwa, (int, Fraction)) else None
        if fixed is not None:
            self._validate(layers, [1] * len(layers), fixed, num_visual)

        def split(budgets: list[int]) -> tuple[int | None, list[int]]:
            return (budgets[0], budgets[1:]) if auto else (fixed, budgets)

        def cost(budgets: list[int]) -> int:
            lead, keeps = split(budgets)
            return measure(target, self._schedule(layers, keeps, num_layers, lead))[0]

        least = cost([1] * (len(layers) + auto))
        dense = Schedule(action="dense", stages=(Stage(start=0, stop=num_layers, keep=None),))
        most = measure(target, dense)[1]
        # An average of tokens is measured in rows of all layers.
        unit = num_layers if target == "avg" else 1
        limit = self.amount * most if isinstance(self.amount, Fraction) else Fraction(self.amount * unit)
        wanted, name = _amount_text(limit / unit, target), _UNIT_NAMES[target]
        if limit < least:
            before = f"{layers[0]} of {num_layers} and {num_visual if fixed is None else fixed} visual tokens"
            earlier = f"decide earlier than layer {layers[0]}, or " if layers[0] else ""
            least_text = str(-(-least // unit)) if target == "avg" else f"{least / most:.4f}, a share of dense,"
            what = f"an average of {wanted} visual tokens" if target == "avg" else f"{wanted} {name}"
            raise UserError(
                f"{what} is impossible: with the first decision at layer {before} the least is "
                f"{_amount_text(Fraction(least, unit), target)}",
                hint=f"{earlier}ask for {target}={least_text} or more",
            )
        if limit > most:
            what = f"an average of {wanted} visual tokens exceeds the {num_visual} of the model"
            if target != "avg":
                what = f"{wanted} {name} exceed the {_amount_text(Fraction(most), target)} of the dense decoder"
            raise UserError(what, hint="a share is between 0 and 1; use `dense` for no routing")
        candidates = num_visual if fixed is None else fixed
        lead_ratio = NUWA_RATIO if auto else 0
        return split(solve(self.shape, len(layers), candidates, cost, int(limit), lead=lead_ratio))


def from_toml(path: Path) -> str:
    """The spec of a TOML file's `[routing]` table, in the compact form. Raises UserError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"cannot read the routing spec {path}: {error}", hint="see `[routing]` in the README"
        ) from error
    table = data.get("routing")
    if not isinstance(table, dict) or len(data) != 1:
        raise UserError(f"{path} needs exactly one table, [routing]", hint="see `[routing]` in the README")
    heads = [key for key in ("action", "method", "published") if key in table]
    if len(heads) != 1:
        raise UserError(
            f"{path} needs exactly one of action, method and published", hint='for example action = "reroute"'
        )
    head = str(table.pop(heads[0]))
    if heads[0] == "published":
        head = f"published:{head}"
    if "layers" in table:
        head += "@" + _toml_value(table.pop("layers"))
    for key in table:
        if key not in _KEYS:
            raise UserError(
                f"unknown key {key!r} in {path}",
                hint=nearest(key, ("action", "method", "published", "layers", *_KEYS)),
            )
    return ":".join([head, *(f"{key}={_toml_value(value)}" for key, value in table.items())])


def _toml_value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _fields(fields: list[str] | tuple[str, ...], text: str) -> dict[str, str]:
    """key=value fields, each key known and once."""
    found: dict[str, str] = {}
    for field in fields:
        key, _, value = field.partition("=")
        if key in found:
            raise UserError(f"{key}= occurs twice in {text!r}", hint=f"the form is {_GRAMMAR}")
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r} in routing spec {text!r}", hint=nearest(key, _KEYS))
        found[key] = value
    return found


def _option(key: str, value: str, text: str) -> dict[str, Any]:
    """One field of a spec as arguments of `RoutingSpec`."""
    choices = {
        "shape": get_args(Shape), "score": get_args(Scoring), "positions": get_args(Positions), "pool": get_args(Pool),
        "heads": get_args(Heads),
    }  # fmt: skip
    if key in choices:
        if value not in choices[key]:
            raise UserError(f"unknown {key} {value!r} in {text!r}", hint=nearest(value, choices[key]))
        return {key: value}
    if key == "keep":
        return {"keep": tuple(_amount(item, text) for item in value.split(","))}
    if key == "nuwa":
        return {"nuwa": value if value == "auto" else _amount(value, text)}
    if key == "rows":
        rows = _integer(value, text, "number of rows")
        if not 1 <= rows <= MAX_ROWS:
            raise UserError(
                f"{rows} rows cannot score in {text!r}", hint=f"give 1 to {MAX_ROWS}: the last rows of a prompt"
            )
        return {"rows": rows}
    return {"target": key, "amount": _amount(value, text) if key == "avg" else _quantity(key, value, text)}


def _integer(item: str, text: str, what: str = "layer number") -> int:
    try:
        return int(item)
    except ValueError:
        raise UserError(f"{item!r} in {text!r} is not a {what}", hint=f"the form is {_GRAMMAR}") from None


def _amount(item: str, text: str) -> int | Fraction:
    """`12` is 12 tokens; `.25`, `0.25`, `1/4` and `1.0` are shares."""
    try:
        value = Fraction(item)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{item!r} in {text!r} is not a budget", hint=f"the form is {_GRAMMAR}") from None
    if "." not in item and "/" not in item:
        return int(value)
    if not 0 < value <= 1:
        raise UserError(f"the share {item} in {text!r} is not between 0 and 1", hint="write tokens without a point")
    return value


def _quantity(key: str, item: str, text: str) -> int | Fraction:
    """`.3` and `3/10` are shares of the dense decoder's; `1.5T`, `64MiB` and `1000000` are absolute."""
    units = _UNITS[key]
    match = _QUANTITY.fullmatch(item)
    if match is None or match[2] not in ("", *units):
        known = ", ".join(units)
        raise UserError(
            f"{item!r} in {text!r} is not an amount of {_UNIT_NAMES[key]}",
            hint=f"a share such as {key}=.3, or a number with {known}",
        )
    if not match[2]:
        return _amount(match[1], text)
    try:
        return int(Fraction(match[1]) * units[match[2]])
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{item!r} in {text!r} is not a number", hint=f"for example {key}=.3") from None


def _tokens(amount: int | Fraction, num_visual: int) -> int:
    return max(1, int(num_visual * amount)) if isinstance(amount, Fraction) else amount


def _visual_rows(num_visual: int) -> Measure:
    """The measure of `avg=`: visual rows of all layers."""

    def measure(target: Target, schedule: Schedule) -> tuple[int, int]:
        if target != "avg":
            raise ValueError(f"a target in {_UNIT_NAMES[target]} needs the model: use reroute.cost.resolve")
        entering = schedule.entering(num_visual)
        rows = sum(stage.num_layers * stage.visual_rows(entering) for stage in schedule.stages)
        return rows, schedule.num_layers * num_visual

    return measure


def _amount_text(value: Fraction, target: Target) -> str:
    if target == "avg":
        return f"{float(value):.2f}"
    units = {name: size for name, size in _UNITS[target].items() if size <= value}
    name = list(units)[-1] if units else ""
    return f"{float(value) / units.get(name, 1):.3g} {name}".strip()


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
