"""Nüwa's first stage (arXiv 2602.02951) for the towers of Qwen-VL, which have no class token and merge their patches.

The form of the published code for Qwen2.5-VL (`Man-PaperRejected/Nuwa`, Vscan/qwen/model/qwen2_5vl_nuwa.py), which is
not that for LLaVA (see `reroute.export.nuwa`):

- Salience of a token: the attention that its patches receive in the last layer, summed over the patches that look and
  averaged over heads and over the token's own patches.
- At least 3 tokens of each 2 x 2 region are candidates (3, 3, 4 at 35, 60, 85 %), so regions limit less.
- Pillars are those at or above the 10 % quantile of the salience of the kept. A collector *becomes* the mean of all
  tokens, itself included, weighted by similarity and closeness; in LLaVA's form it adds the others to itself.
- Closeness falls to 0 at 0.8 of the grid's diagonal, the grid being padded to even sides.
- Similarity is that of the merged mean of layers 7 to 23 of 32. The code leaves it in the tower's order, window by
  window, and reads it row by row, so that a weight is that of another pair of tokens. The numbers of the paper were
  made so, and so it is here (`misread`); without windows (Qwen2-VL, Qwen3-VL) the two orders are the same.

This project's own: towers of other depths take the same shares of their layers; Qwen2-VL and Qwen3-VL, of which the
code knows nothing, have the same rule, and a kept token of Qwen3-VL keeps its own deepstack features.

Letters: M images, N visual tokens, K kept, P patches, C tower width, D decoder width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reroute.errors import UserError
from reroute.export import nuwa
from reroute.export.models.qwen_vl import GridTower, window_order
from reroute.manifest import Grid
from reroute.schedule import Schedule

QUANTILE = 0.1
LEAST = 3  # candidates of a region
REACH = 0.8  # of the diagonal
_EPS = 1e-8


def with_first_stage(tower: GridTower, schedule: Schedule) -> nn.Module:
    """The tower, behind it Nüwa's first stage where the schedule has it. Raises UserError where it cannot have it."""
    return tower if schedule.nuwa is None else NuwaGridTower(tower, schedule)


def similar_layers(depth: int) -> range:
    """Layers whose mean says how alike two tokens are: 7 to 23 of 32."""
    return range(depth * 7 // 32, min(depth, depth * 23 // 32 + 1))


def candidates_per_region(tokens: int, keep: int) -> int:
    """How many tokens of each region may stay: at least 3, and as many as `keep` of `tokens` are of 4."""
    return max(LEAST, -(-(nuwa.REGION**2) * keep // tokens))


def reach(grid: Grid) -> float:
    """Grid steps over which a collector reaches."""
    rows, columns = (length + length % nuwa.REGION for length in grid)
    return REACH * math.hypot(rows - 1, columns - 1)


def misread(grid: Grid, side: int) -> np.ndarray:
    """int64 [N]: the token that stands at each place when tokens are listed window by window, from the top left."""
    index = np.arange(grid[0] * grid[1], dtype=np.int64).reshape(grid)
    side = side or max(grid)
    starts = [(y, x) for y in range(0, grid[0], side) for x in range(0, grid[1], side)]
    return np.concatenate([index[y : y + side, x : x + side].ravel() for y, x in starts])


def blend(features: Tensor, similar: Tensor, salience: Tensor, kept: Tensor, near: Tensor) -> Tensor:
    """What the kept tokens carry: [M, K, D].

    Args:
        features: [M, N, D], what the tower makes.
        similar: [M, N, D], see `NuwaGridTower`.
        salience: [M, N].
        kept: int64 [M, K], ascending.
        near: [N, N], see `nuwa.closeness`.
    """
    own = nuwa.take(features, kept)
    unit = nn.functional.normalize(similar, dim=-1)
    weight = torch.relu(nuwa.take(unit, kept) @ unit.transpose(1, 2)) * near[kept]
    mixed = (weight / (weight.sum(-1, keepdim=True) + _EPS)) @ features
    scores = salience.gather(1, kept)
    pillar = scores >= nuwa.quantile(scores, QUANTILE)
    return torch.where(pillar[:, :, None], own, mixed)


class NuwaGridTower(nn.Module):
    """A tower for grids whose images lose all but `schedule.entering(N)` of their N visual tokens."""

    def __init__(self, tower: GridTower, schedule: Schedule) -> None:
        super().__init__()
        vision = tower.vision
        last = vision.depth - 1
        if last < 1 or (vision.window and last not in tower.full):
            raise UserError(
                f"Nüwa cannot prune this tower: it ranks by the attention of the last of {vision.depth} layers, which "
                + ("has none before it" if last < 1 else "is within windows"),
                hint="leave nuwa= away, or use another method",
            )
        self.tower, self.schedule = tower, schedule
        self.outputs = ("visual_embeds", "visual_places", *tower.outputs[1:])
        for rows, columns in vision.all_grids:
            self.register_buffer(
                f"near_{rows}x{columns}", nuwa.closeness((rows, columns), reach((rows, columns))), False
            )
            order, _ = window_order((rows, columns), vision.window)
            places = np.argsort(order)[misread((rows, columns), vision.window)]
            self.register_buffer(f"misread_{rows}x{columns}", torch.from_numpy(places), persistent=False)

    def table(self, name: str, grid: Grid) -> Tensor:
        """A constant of a grid."""
        return getattr(self, f"{name}_{grid[0]}x{grid[1]}")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[M, 3, H, W] float to visual tokens [M, K, D], their places on the grid, int64 [M, K], and what else the
        tower makes of these tokens.
        """
        _, grid = self.tower.patches(pixel_values)
        self.tower.states = states = []
        try:
            made = self.tower(pixel_values)
        finally:
            self.tower.states = None
        tokens, *stacks = made if isinstance(made, tuple) else (made,)
        salience = self.salience(states[-2], grid)
        chosen = [states[layer] for layer in similar_layers(len(states))]
        similar = self.tower.merger(torch.stack(chosen).mean(0))[:, self.table("misread", grid)]
        count = grid[0] * grid[1]
        keep = self.schedule.entering(count)
        kept = nuwa.select(salience, grid, keep, candidates_per_region(count, keep))
        blended = blend(tokens, similar, salience, kept, self.table("near", grid))
        return blended, kept, *(torch.stack([nuwa.take(one, kept) for one in stack]) for stack in stacks)

    def salience(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention that each token receives in the last layer, whose rows come in as `x` [M, P, C]: [M, N], row-major.

        One head after the other: a [P, P] matrix of all heads would be the largest tensor of the tower.
        """
        tower = self.tower
        block: Any = tower.blocks[-1]
        attention = block.attn
        q, k, _ = attention.project(block.norm1(x), tower.table("cos", grid), tower.table("sin", grid))
        size = x.shape[2] // attention.heads
        received = x.new_zeros(x.shape[:2])
        for queries, keys in zip(q.split(size, dim=2), k.split(size, dim=2), strict=True):
            received = received + (queries @ keys.transpose(1, 2) * size**-0.5).softmax(-1).sum(1)
        by_token = received.unflatten(1, (-1, tower.vision.merge**2)).mean(2) / attention.heads
        return by_token[:, tower.table("back", grid)] if tower.vision.window else by_token
