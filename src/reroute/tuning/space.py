"""The search space: methods x averages x layers x shapes, and any further specs, resolved for one model.

Every combination is a routing spec (`reroute.routing`), so whatever tuning finds is what a user could have written.
"own" among the layers or shapes means those of the method. In TOML:

    [space]
    methods = ["reroute-pdrop", "fastv"]
    averages = ["1/9", 64]
    layers = ["own", [2, 12, 17]]
    shapes = ["own", "uniform"]
    specs = ["published:llava15/avg64/pdrop"]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from reroute.cost import Plan, plan_for, resolve
from reroute.errors import UserError, nearest
from reroute.manifest import Capacity, Model
from reroute.published import METHODS
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule
from reroute.tuning.trace import Entry

OWN = "own"
DENSE = "dense"
MAX_SPECS = 10_000


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is combined.

    Attributes:
        methods: names of `reroute.published.METHODS`, or the actions removal and reroute.
        averages: visual tokens per layer, as a spec has them after `avg=`: a share or tokens.
        layers: decision layers as `2,7,15,23`, or "own".
        shapes: of solved budgets, or "own".
        specs: further whole specs.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    averages: tuple[str, ...] = ("1/9", "1/6", "2/9", "1/3")
    layers: tuple[str, ...] = (OWN,)
    shapes: tuple[str, ...] = (OWN,)
    specs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = ("removal", "reroute", *METHODS)
        for method in self.methods:
            if method not in known:
                raise UserError(f"unknown method {method!r} in the search space", hint=nearest(method, known))
        for name in ("averages", "layers", "shapes"):
            if self.methods and not getattr(self, name):
                raise UserError(f"the search space has methods but no {name}", hint=f"give {name}, or only specs")
        number = len(self.methods) * len(self.averages) * len(self.layers) * len(self.shapes) + len(self.specs)
        if not 1 <= number <= MAX_SPECS:
            raise UserError(f"the search space has {number} specs", hint=f"give 1 to {MAX_SPECS}")

    def texts(self) -> list[str]:
        """Every spec of the space as text, in order; actions without layers are left out."""
        found = []
        for method, average, layers, shape in product(self.methods, self.averages, self.layers, self.shapes):
            if layers == OWN and method not in METHODS:
                continue
            head = method if layers == OWN else f"{method}@{layers}"
            found.append(f"{head}:avg={average}" + ("" if shape == OWN else f":shape={shape}"))
        return [*found, *self.specs]


def entries_of(space: Space, model: Model, capacity: Capacity, *, num_text: int) -> list[Entry]:
    """Every schedule of the space once, the dense one first; what cannot be resolved has the status unreachable.

    Raises:
        UserError: a spec that is not one, or nothing but unreachable ones.
    """
    specs = [RoutingSpec.parse(DENSE), *(RoutingSpec.parse(text) for text in space.texts())]
    entries: list[Entry] = []
    known: dict[Schedule, Entry] = {}
    for spec in specs:
        try:
            schedule = resolve(spec, model)
        except UserError as error:
            entries.append(Entry(name=spec.text, status="unreachable", reason=error.message))
            continue
        if schedule in known:
            first = known[schedule]
            if spec.text not in (first.name, *first.also):
                first.also += (spec.text,)
            continue
        known[schedule] = Entry(name=spec.text, schedule=schedule, plan=_plan(model, schedule, capacity, num_text))
        entries.append(known[schedule])
    if len(known) == 1:
        lost = [entry for entry in entries if entry.status == "unreachable"]
        if lost:
            raise UserError(
                f"none of the {len(lost)} specs is possible for this model; {lost[0].name}: {lost[0].reason}",
                hint="give other layers or averages",
            )
        if not any(spec.action == DENSE for spec in specs[1:]):
            raise UserError(
                "removal and reroute have no decision layers of their own", hint="add --layers, for example 2,7,15,23"
            )
    return entries


def _plan(model: Model, schedule: Schedule, capacity: Capacity, num_text: int) -> Plan:
    return plan_for(model, schedule, capacity, num_text=num_text)


def parse_space(
    path: Path | None = None,
    *,
    methods: str | None = None,
    averages: str | None = None,
    layers: str | None = None,
    shapes: str | None = None,
) -> Space:
    """The space of a TOML file, or of options as the command line has them; what is not given has its default.

    Raises:
        UserError: both, or something that is not a space.
    """
    given = {
        "methods": _split(methods, ","),
        "averages": _split(averages, ","),
        "layers": _split(layers, ";"),
        "shapes": _split(shapes, ","),
    }
    options = {name: value for name, value in given.items() if value is not None}
    if path is None:
        return Space(**options)
    if options:
        raise UserError(
            f"--{next(iter(options))} has no meaning with --space", hint=f"write it into {path}, or leave --space out"
        )
    return read_space(path)


def read_space(path: Path) -> Space:
    """The `[space]` table of a TOML file. Raises UserError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    hint = "see docs/tuning.md"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the search space {path}: {error}", hint=hint) from error
    table = data.get("space")
    if not isinstance(table, dict) or len(data) != 1:
        raise UserError(f"{path} needs exactly one table, [space]", hint=hint)
    names = [field.name for field in fields(Space)]
    values: dict[str, tuple[str, ...]] = {}
    for key, value in table.items():
        if key not in names:
            raise UserError(f"unknown key {key!r} in {path}", hint=nearest(key, names))
        if not isinstance(value, list):
            raise UserError(f"{key} in {path} is {value!r}, not a list", hint=f"write {key} = [...]")
        values[key] = tuple(_text(item) for item in value)
    if "specs" in values and "methods" not in values:
        values["methods"] = ()  # a file of specs means those
    return Space(**values)


def _split(text: str | None, by: str) -> tuple[str, ...] | None:
    return None if text is None else _parts(text.split(by))


def _parts(items: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for item in items if (part := item.replace(" ", ""))))


def _text(item: Any) -> str:
    return ",".join(map(str, item)) if isinstance(item, list) else str(item)
