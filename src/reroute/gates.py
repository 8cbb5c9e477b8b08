"""What a bundle has to meet when it is compared with its reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reroute.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a bundle of one dtype or profile has to meet.

    Attributes:
        tolerance: largest absolute difference of features, caches and logits; inf leaves it to the cosine.
        cosine: smallest cosine of features, caches and logits.
        score_margin: scores (attention probabilities) this near the cut-off tie.
        score_share: so do those within this share of it.
        token_margin: two best logits this near tie.
        slots: share of the slots that must be the reference's, of all decisions together; 1 asks for each.
        tokens: share of the greedy tokens that must be the reference's.
    """

    tolerance: float
    cosine: float = 0.9999
    score_margin: float = 1e-5
    score_share: float = 0.0
    token_margin: float = 1e-5
    slots: float = 1.0
    tokens: float = 1.0

    @property
    def close(self) -> str:
        """The numerical gate in words."""
        return (f"<= {self.tolerance:g}, " if np.isfinite(self.tolerance) else "cosine ") + f">= {self.cosine}"

    @property
    def same_slots(self) -> str:
        """The gate of a decision in words."""
        share = f" or {self.score_share:.0%}" if self.score_share else ""
        return f"identical, ties within {self.score_margin:g}{share}"


FLOAT32 = Gates(tolerance=1e-4)
# fp16 has 11 bits: a score that passed through several layers is right to about 1 %, and logits between 8 and 16 come
# in steps of 0.008, of which two may be lost.
FLOAT16 = Gates(tolerance=float("inf"), score_share=0.01, token_margin=0.02)
# One scenario has too few decisions for the gate of 99 % of the slots, which is of many questions (`reroute build
# --evaluate`); it tells a broken engine from a quantised one.
PROFILES = {
    "int8": Gates(tolerance=float("inf"), cosine=0.99, token_margin=0.1, slots=0.95, tokens=0.85),
    "int4": Gates(tolerance=float("inf"), cosine=0.97, token_margin=0.5, slots=0.9, tokens=0.75),
}
# Slots that a quantised profile must share with float32, over all decisions of all questions.
QUESTION_SLOTS = 0.99


def gates_of(manifest: Manifest) -> Gates:
    """The gates of a bundle's decoder."""
    return vision_gates(manifest) if manifest.profile == "fp32" else PROFILES[manifest.profile.partition(":")[0]]


def vision_gates(manifest: Manifest) -> Gates:
    """The gates of a bundle's vision tower, which no profile quantises."""
    return {"float32": FLOAT32, "float16": FLOAT16}[manifest.dtype]
