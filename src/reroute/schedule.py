"""A schedule: which layers decide, how many visual tokens run after each decision, and how a decision is made.

A *spec* is what a user writes (see `reroute.routing`); a *schedule* is a spec resolved for one model: integer budgets
per stage. Export, engines and runtime all read it from the manifest, so it is small, pure and dependency-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from reroute.errors import UserError, nearest

Action = Literal["dense", "removal", "reroute"]
# own: the decision layer's own norm, query and keys (Reroute and PyramidDrop code); previous: the attention of the
# layer before it (FastV code, arXiv 2403.06764).
Scoring = Literal["own", "previous"]
# What becomes of the attention of several heads: its mean, or its largest (Nüwa's Qwen2.5-VL code, arXiv 2602.02951).
Heads = Literal["mean", "max"]
# original: a row keeps its position for good; renumbered: after each removal the rows left are counted 0, 1, 2, ... and
# decode goes on from there (PyramidDrop code, arXiv 2410.17247).
Positions = Literal["original", "renumbered"]
# Who competes when a prompt has several images. all: every visual row with every other, for one budget; image: the rows
# of each image among themselves, each image with the budget.
Pool = Literal["all", "image"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers `start` to `stop - 1`, which run the text rows and at most `keep` visual rows.

    `keep` is None in stage 0, the layers before the first decision, where every row runs. Stage 0 is always
    present, and empty when the first decision is at layer 0.

    Where images have several sizes, a budget that is a share follows their size: `share` (p, q) means
    max(1, N p // q) of the N visual tokens that enter the decoder, and `keep` is what that is for the largest image.
    """

    start: int
    stop: int
    keep: int | None
    share: tuple[int, int] | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers in the stage."""
        return self.stop - self.start

    def visual_rows(self, num_visual: int) -> int:
        """Visual rows that run in this stage for a pool of `num_visual` visual tokens: min(keep, N)."""
        if self.keep is None:
            return num_visual
        if self.share is None:
            return min(self.keep, num_visual)
        part, whole = self.share
        return min(num_visual, max(1, num_visual * part // whole))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A resolved routing schedule: consecutive stages that cover all layers of one decoder.

    Attributes:
        action: what happens to a visual row that is not chosen.
        stages: the first runs everything that enters the decoder.
        scoring: whose attention ranks the candidates.
        positions: which rotary positions rows have after a removal.
        nuwa: visual tokens of an image that leave the vision tower (stage 1 of Nüwa, arXiv 2602.02951); None: all.
        pool: which visual rows compete with which when a prompt has several images.
        rows: a candidate's score is the mean of the attention that the last so many rows give it.
        heads: what becomes of the scores of several heads.
        nuwa_share: (p, q) where `nuwa` follows the size of an image: ceil(N p / q) of N visual tokens leave the tower,
            and `nuwa` is what that is for the largest image.
    """

    action: Action
    stages: tuple[Stage, ...]
    scoring: Scoring = "own"
    positions: Positions = "original"
    nuwa: int | None = None
    pool: Pool = "all"
    rows: int = 1
    heads: Heads = "mean"
    nuwa_share: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for what, value, kind in (
            ("routing action", self.action, Action),
            ("scoring form", self.scoring, Scoring),
            ("kind of positions", self.positions, Positions),
            ("pool", self.pool, Pool),
            ("way to join heads", self.heads, Heads),
        ):
            if value not in get_args(kind):
                raise UserError(f"unknown {what} {value!r}", hint=nearest(value, get_args(kind)))
        edges = [0, *(stage.stop for stage in self.stages)]
        if not self.stages or any(s.start != e for s, e in zip(self.stages, edges, strict=False)):
            raise ValueError(f"stages must be consecutive and start at layer 0: {self.stages}")
        later = [stage.keep for stage in self.stages[1:]]
        if self.stages[0].keep is not None or any(keep is None or keep < 1 for keep in later):
            raise ValueError(f"every stage but the first has a budget of at least 1: {self.stages}")
        shares = [stage.share for stage in self.stages if stage.share is not None]
        if self.stages[0].share is not None or any(not 0 < part <= whole for part, whole in shares):
            raise ValueError(f"a share is more than 0 and at most 1, and of a budget: {self.stages}")
        if any(stage.stop < stage.start for stage in self.stages) or self.num_layers < 1:
            raise ValueError(f"stages must cover at least one layer, forwards: {self.stages}")
        if (self.action == "dense") != (len(self.stages) == 1):
            raise ValueError(f"{self.action} with {len(self.stages)} stages")
        if self.positions == "renumbered" and self.action != "removal":
            raise ValueError(f"renumbered positions with {self.action}: a row that comes back needs its own position")
        if self.scoring == "previous" and 0 in self.decision_layers:
            raise ValueError("a decision at layer 0 has no layer before it to take attention from")
        if self.nuwa is not None and (self.nuwa < 1 or self.action == "dense"):
            raise ValueError(f"{self.action} with {self.nuwa} visual tokens out of the vision tower")
        if self.nuwa_share is not None and (self.nuwa is None or not 0 < self.nuwa_share[0] <= self.nuwa_share[1]):
            raise ValueError(f"a share of the tower's tokens is more than 0 and at most 1: {self.nuwa_share}")
        if self.rows < 1:
            raise ValueError(f"the attention of {self.rows} rows ranks nothing")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.stages[-1].stop

    @property
    def decision_layers(self) -> tuple[int, ...]:
        """Layers on whose input a decision is made, ascending, 0-based."""
        return tuple(stage.start for stage in self.stages[1:])

    @property
    def scoring_layers(self) -> tuple[int, ...]:
        """For each decision, the layer whose norm, query and keys rank its candidates."""
        return tuple(layer - (self.scoring == "previous") for layer in self.decision_layers)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Visual rows kept by each decision."""
        return tuple(stage.keep for stage in self.stages[1:] if stage.keep is not None)

    @property
    def portions(self) -> tuple[tuple[int, int], ...]:
        """For each decision (keep, whole): `keep` rows or, where `whole` is not 0, a share keep / whole of a pool."""
        return tuple(stage.share or (stage.keep, 0) for stage in self.stages[1:] if stage.keep is not None)

    @property
    def plain_scores(self) -> bool:
        """Whether candidates are ranked by the last row alone, mean over heads, as the select ops do."""
        return self.rows == 1 and self.heads == "mean"

    @property
    def fixed(self) -> bool:
        """Whether every budget is a number of tokens of one pool, whatever the images are."""
        return self.pool == "all" and all(stage.share is None for stage in self.stages)

    def visual_rows(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Visual rows that run in each stage for a step whose images have `counts` visual tokens."""
        pools = [sum(counts)] if self.pool == "all" else counts
        return tuple(sum(stage.visual_rows(pool) for pool in pools) for stage in self.stages)

    def stage_of_layer(self, layer: int) -> int:
        """Index of the stage that runs `layer`."""
        return next(i for i, stage in enumerate(self.stages) if stage.start <= layer < stage.stop)

    def entering(self, tokens_per_image: int) -> int:
        """Visual tokens of one image that enter the decoder, of those that the tower makes."""
        if self.nuwa is None:
            return tokens_per_image
        if self.nuwa_share is None:
            return min(self.nuwa, tokens_per_image)
        part, whole = self.nuwa_share
        return -(-tokens_per_image * part // whole)

    def average_visual_tokens(self, tokens_per_image: int) -> float:
        """Visual rows per layer, averaged over all layers, for a prompt with one image."""
        entering = self.entering(tokens_per_image)
        rows = sum(stage.num_layers * stage.visual_rows(entering) for stage in self.stages)
        return rows / self.num_layers
