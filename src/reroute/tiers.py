"""Several budgets, one weight file: what a user writes for tiers, and what tiers have in common.

A bundle with tiers holds one graph and one set of weights; the budgets are an input of the graph, and a request picks
its tier. So tiers agree in everything of a schedule but its budgets: action, decision layers, scoring, positions, what
leaves the vision tower, and who competes with whom.

    --routing reroute-pdrop:avg=1/9 --tier dense --tier reroute-pdrop:avg=1/3 --tier best=reroute-pdrop:avg=2/3

A tier is `SPEC` or `NAME=SPEC`; the first, `--routing`, is the default. Without a name it is called by its budget:
`1/9`, `flops-.3`, `kv-64MiB`, `7-4` (for keep=7,4), `dense`.

`dense` among tiers is the others' schedule with budgets that no prompt exceeds: every row runs in every layer, and the
numbers are the dense decoder's. What it costs more than a bundle exported with `dense` are the decisions, which still
score: one query row and its products with the keys for each, in the plan under "scoring".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from reroute.cost import Plan, plan_for, resolve
from reroute.errors import UserError
from reroute.manifest import Capacity, Manifest, Model, Tier
from reroute.routing import RoutingSpec
from reroute.scenario import FILE_NAME as REFERENCE
from reroute.schedule import Schedule

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,39}")
_NAMED = re.compile(r"([^:@=]*)=(.*)", re.DOTALL)
_HINT = "a tier is SPEC or NAME=SPEC, for example 1/3=reroute-pdrop:avg=1/3"


def parse_tiers(routing: str, tiers: Sequence[str]) -> dict[str, RoutingSpec]:
    """Specs by the names of their tiers, the default `routing` first; nothing where there are no `tiers`.

    Raises:
        UserError: a spec or a name that is none, or two tiers of one name.
    """
    if not tiers:
        return {}
    written = [_split(text.strip()) for text in (routing, *tiers)]
    given = [name for name, _ in written if name]
    if twice := [name for name in given if given.count(name) > 1]:
        raise UserError(f"two tiers have the name {twice[0]!r}", hint="give every tier a name of its own: NAME=SPEC")
    specs: dict[str, RoutingSpec] = {}
    for name, text in written:
        spec = RoutingSpec.parse(text)
        specs[name or _unused(_short(spec.text), {*given, *specs})] = spec
    return specs


def resolve_tiers(specs: Mapping[str, RoutingSpec], model: Model, capacity: Capacity) -> dict[str, Tier]:
    """What the manifest says of each tier.

    Raises:
        UserError: a spec that does not fit the model, tiers that one graph cannot run, or two that are the same.
    """
    schedules = {name: resolve(spec, model) for name, spec in specs.items()}
    first = next((name for name, schedule in schedules.items() if schedule.action != "dense"), None)
    if specs and first is None:
        raise UserError("every tier is dense", hint="export dense alone, or add a tier that routes")
    tiers: dict[str, Tier] = {}
    for name, schedule in schedules.items():
        shared = schedules[first or name]
        if schedule.action == "dense":
            schedule = _everything(name, shared, model, capacity)
        _require_alike(str(first), shared, name, schedule)
        if same := [other for other, tier in tiers.items() if tier.schedule == schedule]:
            raise UserError(f"the tiers {same[0]!r} and {name!r} are the same schedule", hint="leave one of them out")
        tiers[name] = _tier(specs[name], schedule, model, capacity, _reference(name, tiers))
    return tiers


def tier_of(spec: RoutingSpec, model: Model, capacity: Capacity) -> Tier:
    """The one budget of an export without tiers. Raises UserError for a spec that does not fit the model."""
    return _tier(spec, resolve(spec, model), model, capacity, REFERENCE)


def _tier(spec: RoutingSpec, schedule: Schedule, model: Model, capacity: Capacity, reference: str) -> Tier:
    return Tier(
        routing=spec.text,
        schedule=schedule,
        average_visual_tokens=schedule.average_visual_tokens(model.vision.tokens_per_image),
        cache_rows=capacity.cache_rows(schedule, model.vision.tokens_per_image),
        estimates=plan_for(model, schedule, capacity).estimates(),
        reference=reference,
    )


def plans_of(tiers: Mapping[str, Tier], model: Model, capacity: Capacity, num_text: int) -> dict[str, Plan]:
    """The plan of each tier, for a prompt of one image."""
    return {name: plan_for(model, tier.schedule, capacity, num_text=num_text) for name, tier in tiers.items()}


def traced_schedule(tiers: Mapping[str, Tier]) -> Schedule:
    """The schedule to trace a graph for all tiers with: one whose ops can say the budgets of every tier."""
    return min((tier.schedule for tier in tiers.values()), key=lambda schedule: (schedule.fixed, schedule.budgets))


def reference_of(manifest: Manifest) -> str:
    """File of the recorded reference of a manifest's tier."""
    return manifest.tiers[manifest.tier].reference if manifest.tiers else REFERENCE


def require_one_tier(manifest: Manifest, where: str) -> None:
    """Refuse an export with tiers for an engine whose budgets are fixed when it is built. Raises UserError."""
    if manifest.tiers:
        raise UserError(
            f"this export has {len(manifest.tiers)} tiers ({', '.join(manifest.tiers)}), and budgets are fixed in "
            f"{where}",
            hint="export one of them without --tier, or build for ONNX Runtime: `reroute build DIR --backend ort`",
        )


def _split(text: str) -> tuple[str, str]:
    """Name (or nothing) and spec. Raises UserError for a name that is none."""
    match = _NAMED.fullmatch(text)
    if match is None:
        return "", text
    name, spec = match[1].strip(), match[2].strip()
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} in {text!r} is no name for a tier",
            hint="use at most 40 of the characters A-Z a-z 0-9 . _ / + - and begin with a letter or digit",
        )
    if not spec:
        raise UserError(f"the tier {name!r} has no routing spec", hint=_HINT)
    return name, spec


def _short(text: str) -> str:
    """A name for a spec: its budget."""
    if text.startswith("published:"):
        return text.split("/")[1]
    parts = (field.partition("=") for field in text.split(":")[1:])
    options = {key: value for key, _, value in parts}
    for key in ("avg", "keep", "flops", "kv"):
        if key in options:
            value = options[key].replace(",", "-").replace(" ", "")
            return value if key in ("avg", "keep") else f"{key}-{value}"
    return text


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or with the first number behind it that makes it another's than all of `taken`."""
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return found


def _everything(name: str, shared: Schedule, model: Model, capacity: Capacity) -> Schedule:
    """The schedule `shared` with budgets that no prompt of a session exceeds. Raises UserError."""
    if shared.nuwa is not None:
        raise UserError(
            f"the tier {name!r} would be dense, but the vision graph that tiers share lets {shared.nuwa} tokens out "
            "(nuwa)",
            hint="export dense as a bundle of its own, or leave nuwa out of the other tiers",
        )
    everything = capacity.max_images * model.vision.tokens_per_image
    stages = [replace(stage, keep=stage.keep and everything, share=None) for stage in shared.stages]
    return replace(shared, stages=tuple(stages))


def _require_alike(first: str, shared: Schedule, name: str, schedule: Schedule) -> None:
    """Refuse tiers that one graph cannot run. Raises UserError that names what differs."""
    aspects = [
        ("action", shared.action, schedule.action),
        ("decision layers", *(",".join(map(str, one.decision_layers)) for one in (shared, schedule))),
        ("score", shared.scoring, schedule.scoring),
        ("positions", shared.positions, schedule.positions),
        ("nuwa", *("all" if one.nuwa is None else one.nuwa for one in (shared, schedule))),
        ("pool", shared.pool, schedule.pool),
    ]
    if different := [f"{what} ({one} and {other})" for what, one, other in aspects if one != other]:
        raise UserError(
            f"the tiers {first!r} and {name!r} differ in {', '.join(different)}; tiers differ in their budgets alone",
            hint="write the same method or layers and options for all, with other budgets: avg=, keep=, flops= or kv=",
        )


def _reference(name: str, tiers: Mapping[str, Tier]) -> str:
    """A file name for a tier's reference: the default's is what it is without tiers."""
    if not tiers:
        return REFERENCE
    stem, _, ending = REFERENCE.rpartition(".")
    taken = {tier.reference.lower() for tier in tiers.values()}
    base = f"{stem}.{re.sub('[^A-Za-z0-9._-]', '-', name)}"
    number = 1
    while (found := f"{base}{'' if number == 1 else f'-{number}'}.{ending}").lower() in taken:
        number += 1
    return found
