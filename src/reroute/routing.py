"""Routing specs and schedules: which layers decide, and how many visual tokens run after each decision.

A *spec* is what a user writes; a *schedule* is a spec resolved for one model: integer budgets per stage.

    dense
    reroute@2,7,15,23:keep=22,22,11,6               budgets in tokens
    reroute@2,7,15,23:keep=.1392,.1392,.0696,.0348  budgets as shares of the visual tokens: max(1, int(N * s))
    reroute@2,7,15,23:avg=1/9                       exact budgets for an average per layer: a share ...
    removal@2,7,15,23:avg=64:shape=geometric        ... or tokens; uniform, geometric or halving (the default)
    published:llava15/avg64/reroute-pdrop           the ratios printed in the paper, under the paper's name

Sources: Reroute, arXiv 2606.12412; PyramidDrop, arXiv 2410.17247. `shape=halving` is the paper's a, a, a/2,
a/4.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, get_args

from reroute.errors import UserError, nearest

Action = Literal["dense", "removal", "reroute"]
Shape = Literal["uniform", "geometric", "halving"]

_GRAMMAR = "ACTION@LAYERS:keep=K,K,... or ACTION@LAYERS:avg=A[:shape=S], for example reroute@2,7,15,23:avg=1/9"

# (action, decision layers, shares of the visual tokens) as printed for LLaVA-1.5-7B, 32 layers, 576 tokens.
# The "avg64" rows of the pdrop pair measure 80.4 and 84.1 tokens, not 64: the plan always prints the measured
# average.
PUBLISHED: dict[str, tuple[Action, tuple[int, ...], tuple[str, ...]]] = {
    "llava15/avg192/fastv": ("removal", (3,), (".2644",)),
    "llava15/avg128/fastv": ("removal", (3,), (".1418",)),
    "llava15/avg64/fastv": ("removal", (3,), (".01916",)),
    "llava15/avg192/reroute-fastv": ("reroute", (3, 7, 15, 23), (".2644",) * 4),
    "llava15/avg128/reroute-fastv": ("reroute", (3, 7, 15, 23), (".1418",) * 4),
    "llava15/avg64/reroute-fastv": ("reroute", (3, 7, 15, 23), (".01916",) * 4),
    "llava15/avg192/pdrop": ("removal", (2, 7, 15, 23), (".5965", ".3558", ".2123", ".1266")),
    "llava15/avg128/pdrop": ("removal", (2, 7, 15, 23), (".4570", ".2088", ".0954", ".0436")),
    "llava15/avg64/pdrop": ("removal", (2, 7, 15, 23), (".2789", ".0937", ".0315", ".0106")),
    "llava15/avg192/reroute-pdrop": ("reroute", (2, 7, 15, 23), (".4502", ".4502", ".2251", ".1126")),
    "llava15/avg128/reroute-pdrop": ("reroute", (2, 7, 15, 23), (".2655", ".2655", ".1328", ".0664")),
    "llava15/avg64/reroute-pdrop": ("reroute", (2, 7, 15, 23), (".1392", ".1392", ".0696", ".0348")),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers `start` to `stop - 1`, which run the text rows and at most `keep` visual rows.

    `keep` is None in stage 0, the layers before the first decision, where every row runs. Stage 0 is always
    present, and empty when the first decision is at layer 0.
    """

    start: int
    stop: int
    keep: int | None

    @property
    def num_layers(self) -> int:
        """Number of layers in the stage."""
        return self.stop - self.start

    def visual_rows(self, num_visual: int) -> int:
        """Visual rows that run in this stage for a step with `num_visual` visual tokens: min(keep, N)."""
        return num_visual if self.keep is None else min(self.keep, num_visual)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A resolved routing schedule: consecutive stages that cover all layers of one decoder."""

    action: Action
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise UserError(f"unknown routing action {self.action!r}", hint=nearest(self.action, get_args(Action)))
        edges = [0, *(stage.stop for stage in self.stages)]
        if not self.stages or any(s.start != e for s, e in zip(self.stages, edges, strict=False)):
            raise ValueError(f"stages must be consecutive and start at layer 0: {self.stages}")
        later = [stage.keep for stage in self.stages[1:]]
        if self.stages[0].keep is not None or any(keep is None or keep < 1 for keep in later):
            raise ValueError(f"every stage but the first has a budget of at least 1: {self.stages}")
        if any(stage.stop < stage.start for stage in self.stages) or self.num_layers < 1:
            raise ValueError(f"stages must cover at least one layer, forwards: {self.stages}")
        if (self.action == "dense") != (len(self.stages) == 1):
            raise ValueError(f"{self.action} with {len(self.stages)} stages")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.stages[-1].stop

    @property
    def decision_layers(self) -> tuple[int, ...]:
        """Layers on whose input a decision is made, ascending, 0-based."""
        return tuple(stage.start for stage in self.stages[1:])

    @property
    def budgets(self) -> tuple[int, ...]:
        """Visual rows kept by each decision."""
        return tuple(stage.keep for stage in self.stages[1:] if stage.keep is not None)

    def stage_of_layer(self, layer: int) -> int:
        """Index of the stage that runs `layer`."""
        return next(i for i, stage in enumerate(self.stages) if stage.start <= layer < stage.stop)

    def average_visual_tokens(self, num_visual: int) -> float:
        """Visual rows per layer, averaged over all layers, for a prompt with `num_visual` visual tokens."""
        rows = sum(stage.num_layers * stage.visual_rows(num_visual) for stage in self.stages)
        return rows / self.num_layers


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """What the user asked for, before it meets a model. Exactly one of `keep` and `average` is set, or
    neither for `dense`. A `Fraction` below or equal to 1 is a share of the visual tokens; an int is a number
    of tokens.
    """

    text: str
    action: Action
    layers: tuple[int, ...] = ()
    keep: tuple[int | Fraction, ...] = ()
    average: int | Fraction | None = None
    shape: Shape = "halving"

    @classmethod
    def parse(cls, text: str) -> RoutingSpec:
        """Parse a spec string (grammar in the module docstring). Raises UserError."""
        text = text.strip()
        if text == "dense":
            return cls(text=text, action="dense")
        if text.startswith("published:"):
            name = text.removeprefix("published:")
            if name not in PUBLISHED:
                raise UserError(f"unknown published schedule {name!r}", hint=nearest(name, PUBLISHED))
            action, layers, keep = PUBLISHED[name]
            return cls(text=text, action=action, layers=layers, keep=tuple(Fraction(k) for k in keep))
        head, *fields = text.split(":")
        name, at, layer_list = head.partition("@")
        if name == "dense":
            raise UserError(f"dense takes no layers and no options, got {text!r}", hint="write `dense` alone")
        if name not in ("removal", "reroute"):
            choices = ("dense", "removal", "reroute", "published")
            raise UserError(f"unknown routing action {name!r} in {text!r}", hint=nearest(name, choices))
        if not at or not fields:
            raise UserError(f"incomplete routing spec {text!r}", hint=f"the form is {_GRAMMAR}")
        options: dict[str, object] = {"layers": tuple(_integer(item, text) for item in layer_list.split(","))}
        seen: set[str] = set()
        for field in fields:
            key, _, value = field.partition("=")
            if key in seen:
                raise UserError(f"{key}= occurs twice in {text!r}", hint=f"the form is {_GRAMMAR}")
            seen.add(key)
            if key == "keep":
                options["keep"] = tuple(_amount(item, text) for item in value.split(","))
            elif key == "avg":
                options["average"] = _amount(value, text)
            elif key == "shape":
                if value not in get_args(Shape):
                    raise UserError(f"unknown shape {value!r} in {text!r}", hint=nearest(value, get_args(Shape)))
                options["shape"] = value
            else:
                hint = nearest(key, ("keep", "avg", "shape"))
                raise UserError(f"unknown key {key!r} in routing spec {text!r}", hint=hint)
        if ("keep" in options) == ("average" in options):
            raise UserError(f"{text!r} needs exactly one of keep= and avg=", hint=f"the form is {_GRAMMAR}")
        if "keep" in options and "shape" in options:
            raise UserError(f"shape= has no meaning with keep= in {text!r}", hint=f"the form is {_GRAMMAR}")
        return cls(text=text, action=name, **options)  # type: ignore[arg-type]

    def resolve(self, *, num_layers: int, num_visual: int) -> Schedule:
        """Integer budgets for a decoder of `num_layers` layers and `num_visual` visual tokens per image.

        Raises:
            UserError: a layer that does not exist, budgets that do not match the layers, exceed the
                candidates or grow under removal, or an average that the layers before the first decision make
                impossible.
        """
        if self.action == "dense":
            return Schedule(action="dense", stages=(Stage(start=0, stop=num_layers, keep=None),))
        layers = self.layers
        if any(b <= a for a, b in pairwise(layers)):
            raise UserError(f"decision layers must ascend, got {_join(layers)}", hint="for example 2,7,15,23")
        if layers[0] < 0 or layers[-1] >= num_layers:
            raise UserError(
                f"decision layers {_join(layers)} do not fit a decoder of {num_layers} layers",
                hint=f"layers are numbered 0 to {num_layers - 1}; a decision acts on the input of its layer",
            )
        spans = [b - a for a, b in zip(layers, (*layers[1:], num_layers), strict=True)]
        if self.average is not None:
            budgets = self._solve(spans, num_layers, num_visual)
        else:
            if len(self.keep) != len(layers):
                raise UserError(
                    f"{len(layers)} decision layers but {len(self.keep)} budgets in {self.text!r}",
                    hint="give one budget for each decision layer",
                )
            budgets = [max(1, int(num_visual * k)) if isinstance(k, Fraction) else k for k in self.keep]
        self._validate(budgets, num_visual)
        edges = [0, *layers, num_layers]
        keeps = [None, *budgets]
        stages = (Stage(start=a, stop=b, keep=k) for a, b, k in zip(edges, edges[1:], keeps, strict=False))
        return Schedule(action=self.action, stages=tuple(stages))

    def _validate(self, budgets: list[int], num_visual: int) -> None:
        candidates = num_visual
        for layer, budget in zip(self.layers, budgets, strict=True):
            if budget < 1:
                raise UserError(f"the budget at layer {layer} is {budget}", hint="a budget is at least 1 token")
            if budget > num_visual:
                raise UserError(
                    f"the budget at layer {layer} is {budget} tokens, but there are {num_visual}",
                    hint=f"use a budget of at most {num_visual}, or a share such as .1392",
                )
            if self.action == "removal":
                if budget > candidates:
                    raise UserError(
                        f"removal keeps {budget} tokens at layer {layer}, but only {candidates} are left",
                        hint="budgets of removal must not grow with depth; reroute allows it",
                    )
                candidates = budget

    def _solve(self, spans: list[int], num_layers: int, num_visual: int) -> list[int]:
        """Largest budgets of the wanted shape whose average does not exceed the target."""
        average = self.average
        target = average * num_visual if isinstance(average, Fraction) else Fraction(average or 0)
        before = self.layers[0] * num_visual
        least = Fraction(before + sum(spans), num_layers)
        if target < least:
            earlier = f"decide earlier than layer {self.layers[0]}, or " if self.layers[0] else ""
            raise UserError(
                f"an average of {float(target):.2f} visual tokens is impossible: with the first decision at "
                f"layer {self.layers[0]} of {num_layers} and {num_visual} visual tokens the least is "
                f"{float(least):.2f}",
                hint=f"{earlier}ask for avg={-(-least // 1)} or more",
            )
        if target > num_visual:
            raise UserError(
                f"an average of {float(target):.2f} visual tokens exceeds the {num_visual} of the model",
                hint="a share is between 0 and 1; use `dense` for no routing",
            )
        room = int(target * num_layers) - before
        weights = shape_weights(self.shape, len(spans))

        def rows(scale: float) -> list[int]:
            return [min(num_visual, max(1, int(scale * w))) for w in weights]

        def cost(keeps: list[int]) -> int:
            return sum(span * k for span, k in zip(spans, keeps, strict=True))

        low, high = 0.0, num_visual / min(weights)
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(rows(middle)) <= room else (low, middle)
        keeps = rows(low)
        # What flooring left over goes to the stages from the front, one token at a time, never growing with
        # depth.
        grown = True
        while grown:
            grown = False
            for i, span in enumerate(spans):
                limit = num_visual if i == 0 else keeps[i - 1]
                if keeps[i] < limit and cost(keeps) + span <= room:
                    keeps[i] += 1
                    grown = True
        return keeps


def shape_weights(shape: Shape, count: int) -> list[float]:
    """Relative budgets: uniform 1,1,1,...; halving 1,1,1/2,1/4,...; geometric 1,1/2,1/4,..."""
    if shape == "uniform":
        return [1.0] * count
    if shape == "geometric":
        return [2.0**-i for i in range(count)]
    return [2.0 ** -max(0, i - 1) for i in range(count)]


def _integer(item: str, text: str) -> int:
    try:
        return int(item)
    except ValueError:
        raise UserError(f"{item!r} in {text!r} is not a layer number", hint=f"the form is {_GRAMMAR}") from None


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


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
