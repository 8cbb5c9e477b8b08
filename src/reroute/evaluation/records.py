"""What one bundle made of one question: its answer, its grade, and where the object's visual tokens went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reroute.evaluation.questions import Box, Skill
from reroute.evaluation.regions import Size

if TYPE_CHECKING:
    from reroute.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision about one question's visual tokens.

    Attributes:
        layer: the decision layer.
        kept: tokens that run after it.
        returned: kept tokens that did not run in the stage before. Stage 0, before the first decision, runs all that
            entered the decoder.
        recovered: kept tokens that were out in any earlier stage: `returned`, and what returned earlier and stayed.
        share: of the object's tokens, those that were kept, 0..1; None for a question without a single object, or
            when the model's crop shows nothing of it.
    """

    layer: int
    kept: int
    returned: int
    recovered: int
    share: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answered question.

    Attributes:
        id: of the question.
        image: of the question; what the bootstrap resamples.
        skill: "grounding" or "vqa".
        kind: of the question.
        size: size group of the true box; None for other questions than grounding.
        answer: the text, without the spaces around it.
        score: 0..1, as the set grades.
        iou: of grounding, 0 when no box was read.
        box: that was read, as shares of the image's sides.
        entered: share of the object's tokens that entered the decoder; None as for `Decision.share`.
        decisions: one for each decision layer; none for a dense bundle.
        rows: visual rows in the KV cache of each stage, measured after the answer.
        kv_bytes: of the KV cache that the prompt and the answer fill.
    """

    id: str
    image: str
    skill: Skill
    kind: str
    size: Size | None
    answer: str
    score: float
    iou: float | None
    box: Box | None
    entered: float | None
    decisions: tuple[Decision, ...]
    rows: tuple[int, ...]
    kv_bytes: int


def share_of(region: np.ndarray | None, tokens: np.ndarray) -> float | None:
    """Share of a region's tokens that are among `tokens`; None for no region or an empty one."""
    if region is None or not len(region):
        return None
    return float(np.isin(region, tokens).mean())


def decisions_of(
    schedule: Schedule, entered: np.ndarray, routes: tuple[np.ndarray, ...], region: np.ndarray | None
) -> tuple[Decision, ...]:
    """Follow one image's visual tokens through the decisions.

    Args:
        schedule: of the bundle.
        entered: indices of the tokens that entered the decoder.
        routes: for each decision, indices of the tokens that run after it.
        region: indices of the object's tokens, or None.

    Returns:
        One entry for each decision layer.
    """
    ran = entered
    missed = np.zeros(0, dtype=np.int64)
    decisions = []
    for layer, route in zip(schedule.decision_layers, routes, strict=True):
        decision = Decision(
            layer=layer,
            kept=len(route),
            returned=int((~np.isin(route, ran)).sum()),
            recovered=int(np.isin(route, missed).sum()),
            share=share_of(region, route),
        )
        decisions.append(decision)
        missed = np.union1d(missed, np.setdiff1d(entered, route))
        ran = route
    return tuple(decisions)
