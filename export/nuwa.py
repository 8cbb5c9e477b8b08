"""Nüwa's first stage (arXiv 2602.02951) in plain torch: which patches leave the vision tower, and what they carry.

This is its form for LLaVA; the parts are also those of the form for Qwen-VL (`reroute.export.nuwa_grid`).

It looks at the image alone. Patches stay spread over the image, because each small region sends its own candidates, and
most of those that stay collect the features of patches like them nearby; the strongest stay as they are. Letters: M
images, P patches on a grid of H x W, K kept, C tower width.

The paper's text and the published code differ; this follows the code (`Man-PaperRejected/Nuwa`): salience is the class
token's attention, summed over heads, in the layer that makes the features (the text multiplies it with key norms), and
the strongest are those above a quantile of it. Two things that the code leaves open are this project's: the code knows
a 24 x 24 grid and a tower of 24 layers only, so for others the reach scales with the grid's side and the similarity
starts at two thirds of the tower; and a grid of odd sides has regions of one row or column at its edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REGION = 2  # a region is 2 x 2 patches
QUANTILE = 0.55  # of the salience of the kept: those at or above it are pillars, the rest collectors
REACH = math.sqrt(280)  # grid steps over which a collector reaches, on a grid of side 24
_SIDE = 24
_EPS = 1e-8


def first_similar_state(depth: int) -> int:
    """First of the hidden states 0..depth whose mean says how alike two patches are: 16 of 24."""
    return depth * 2 // 3


def candidates_per_region(grid: tuple[int, int], keep: int) -> int:
    """How many patches of each region may stay: the fewest that give `keep` candidates (1, 2, 3 for 112, 224, 336).

    Regions at an odd edge have fewer patches, so that counts for them; at most 4.
    """
    rows, columns = grid
    sizes = [
        min(REGION, rows - y) * min(REGION, columns - x)
        for y in range(0, rows, REGION)
        for x in range(0, columns, REGION)
    ]
    per_region = range(1, REGION * REGION + 1)
    return next((n for n in per_region if sum(min(n, size) for size in sizes) >= keep), REGION * REGION)


def select(salience: Tensor, grid: tuple[int, int], keep: int, per_region: int | None = None) -> Tensor:
    """The patches that stay: int64 [M, K], ascending, of `salience` [M, P]. Equal salience: the first patch wins.

    At most `per_region` (default: `candidates_per_region`) of each 2 x 2 region are candidates; the `keep` most salient
    candidates stay.
    """
    count = salience.shape[0]
    per_region = candidates_per_region(grid, keep) if per_region is None else per_region
    regions = region_patches(grid).to(salience.device)  # [R, 4], -1 where an edge cuts a region
    inside = salience[:, regions.clamp(min=0).flatten()].view(count, *regions.shape)
    inside = inside.masked_fill(regions < 0, -math.inf)
    order = inside.argsort(dim=-1, descending=True, stable=True)[..., :per_region]
    patches = regions.expand(count, -1, -1).gather(2, order).flatten(1)
    # Ascending, so that equal salience goes to the first patch below.
    patches = patches.sort(dim=1).values
    scores = salience.gather(1, patches.clamp(min=0)).masked_fill(patches < 0, -math.inf)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return patches.gather(1, best).sort(dim=1).values


def region_patches(grid: tuple[int, int]) -> Tensor:
    """int64 [R, 4]: the patches of each 2 x 2 region, row-major, -1 for those that an odd edge cuts off."""
    rows, columns = grid
    index = torch.arange(rows * columns).view(rows, columns)
    index = torch.nn.functional.pad(index, (0, columns % REGION, 0, rows % REGION), value=-1)
    return index.unfold(0, REGION, REGION).unfold(1, REGION, REGION).reshape(-1, REGION * REGION)


def closeness(grid: tuple[int, int], reach: float | None = None) -> Tensor:
    """[P, P]: 1 for a patch itself, falling linearly with the distance on the grid, 0 from `reach` on.

    `reach` is in grid steps, by default `REACH` scaled to the grid.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    distance = (places[:, None] - places[None]).square().sum(-1).sqrt()
    reach = REACH * math.sqrt(rows * columns) / _SIDE if reach is None else reach
    return (1 - (distance / reach).clamp(max=1)).float()


def collect(features: Tensor, similar: Tensor, salience: Tensor, kept: Tensor, near: Tensor) -> Tensor:
    """What the kept patches carry: [M, K, C].

    Args:
        features: [M, P, C], what the projector would read.
        similar: [M, P, C], mean of late hidden states.
        salience: [M, P].
        kept: int64 [M, K], ascending.
        near: [P, P], see `closeness`.

    A pillar is its own feature. A collector i adds the mean of the others, weighted by w_ij / sum of w_i. over all
    patches, itself included; w_ij = relu(cos(similar_i, similar_j)) * near_ij.
    """
    own = take(features, kept)
    unit = torch.nn.functional.normalize(similar, dim=-1)
    weight = torch.relu(take(unit, kept) @ unit.transpose(1, 2)) * near[kept]
    itself = torch.arange(features.shape[1], device=kept.device) == kept[:, :, None]
    total = weight.sum(-1, keepdim=True) + _EPS
    collected = own + (weight.masked_fill(itself, 0) / total) @ features
    scores = salience.gather(1, kept)
    pillar = scores >= quantile(scores, QUANTILE)
    return torch.where(pillar[:, :, None], own, collected)


def quantile(values: Tensor, share: float) -> Tensor:
    """Quantile of each row of `values` [M, K] with linear interpolation, as torch.quantile: [M, 1]."""
    ordered = values.sort(dim=1).values
    place = share * (values.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, values.shape[1] - 1)
    below, above = ordered[:, low : low + 1], ordered[:, high : high + 1]
    return below + (place - low) * (above - below)


def take(rows: Tensor, places: Tensor) -> Tensor:
    """rows[m, places[m]]: [M, K, C]."""
    return rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))
