"""Random waiting, a regulariser: in some training steps most visual rows skip most layers.

Neither the layers nor the rows depend on the question or on any score, so nothing here is a routing schedule; a model
trained so stands rows that come back with an old hidden state, and layers that see few of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .data import GRID

BUDGETS = (24, 96, 192)  # few different ones: every number of rows is compiled by itself
CANDIDATES = 288


def waiting(seed: int, step: int, rank: int, share: float, owner: Tensor, layers: int) -> tuple[Tensor, dict] | None:
    """Visual tokens [B, 288] of a step, and for some layers which of these run from there on; None in other steps.

    Four layers from 2 on start a stage. Half of the stages keep random rows, half keep discs, whose centres are as
    often anywhere as on an object. ``owner`` [B, 576] is the index of the object on each patch, -1 where there is none.
    """
    same = np.random.default_rng([seed, step])  # what all processes have in common: which work they do
    if same.random() >= share:
        return None
    starts = np.sort(same.permutation(np.arange(2, layers - 2))[:4]).tolist()
    keeps = same.choice(BUDGETS, 4).tolist()
    rng = np.random.default_rng([seed, step, rank])
    place = np.stack(np.divmod(np.arange(GRID * GRID), GRID), 1)
    tokens: list[np.ndarray] = []
    rows: list[list[np.ndarray]] = [[] for _ in starts]
    for labels in owner.numpy():
        token = np.sort(rng.permutation(GRID * GRID)[:CANDIDATES])
        tokens.append(token)
        for i, keep in enumerate(keeps):
            if rng.random() < 0.5:
                score = rng.random(CANDIDATES)
            else:
                things = np.flatnonzero(labels >= 0)
                centres = np.where(rng.random(8) < 0.5, rng.choice(things, 8), rng.integers(0, GRID * GRID, 8))
                centres = place[centres[: rng.integers(2, 9)]]
                score = np.hypot(*(place[token][:, None] - centres).transpose(2, 0, 1)).min(1)
            rows[i].append(np.sort(score.argsort()[:keep]))
    stages = {start: torch.from_numpy(np.stack(r)) for start, r in zip(starts, rows, strict=True)}
    return torch.from_numpy(np.stack(tokens)), stages
