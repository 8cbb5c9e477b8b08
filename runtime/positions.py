"""Which position each row of a step has: the rotary rows that the host hands to the decoder graph.

Positions count the dialogue as the model was trained to see it: every visual token of an image has one, also those that
a vision-side method (Nüwa) drops before the decoder, so that the text behind an image stands where it would stand
anyway. Renumbered schedules (PyramidDrop's code) count the rows of each stage instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reroute.manifest import Manifest
from reroute.runtime.layout import Layout, StepInputs
from reroute.runtime.rope import Rotary


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """What the vision graph makes of M images.

    Attributes:
        embeds: float [M, N, D], in the manifest's dtype.
        places: int64 [M, N], ascending places on the grid, row-major; None when no token was dropped.
    """

    embeds: np.ndarray
    places: np.ndarray | None = None


class Positions:
    """The inputs of a step: a layout and visual tokens, with the rotary rows of their positions."""

    def __init__(self, manifest: Manifest) -> None:
        text, capacity = manifest.model.text, manifest.capacity
        self._schedule = manifest.schedule
        self._tower = manifest.model.vision.tokens_per_image
        self._dropped = self._tower - self._schedule.entering(self._tower)
        self._nothing = VisualTokens(embeds=np.zeros((0, 0, text.hidden_size), dtype=manifest.dtype))
        rows = capacity.max_text + capacity.max_images * self._tower
        self.rotary = Rotary(head_dim=text.head_dim, theta=text.rope_theta, rows=rows)

    def inputs(
        self, layout: Layout, visual: VisualTokens | None, lengths: np.ndarray, *, images_before: int = 0
    ) -> StepInputs:
        """The step's inputs at batch 1.

        Args:
            layout: of the tokens that enter the decoder.
            visual: of the images in the order of their placeholders; None for a step of text.
            lengths: int [stages], valid cache rows of each stage before the step.
            images_before: images of the dialogue's earlier steps.
        """
        visual = visual or self._nothing
        if self._schedule.positions == "renumbered":
            count = layout.num_text + layout.num_visual
            tables = [self.rotary.rows(int(length), count) for length in lengths]
            cos, sin = np.stack([table[0] for table in tables]), np.stack([table[1] for table in tables])
        else:
            start = int(lengths[0]) + images_before * self._dropped
            at = start + self.offsets(layout, visual.places)
            cos, sin = self.rotary.cos[at], self.rotary.sin[at]
        return layout.inputs(visual.embeds, cos, sin)

    def offsets(self, layout: Layout, places: np.ndarray | None) -> np.ndarray:
        """Positions of a step's slots from its first on, int64 [S]: gaps where the tower dropped tokens."""
        at = np.arange(layout.num_text + layout.num_visual, dtype=np.int64)
        if places is None or not self._dropped:
            return at
        for image, (slots, kept) in enumerate(zip(layout.visual_slots.reshape(len(places), -1), places, strict=True)):
            at[slots[-1] + 1 :] += self._dropped
            at[slots] = slots[0] + image * self._dropped + kept
        return at

    def tokens(self, visual: VisualTokens) -> np.ndarray:
        """Which of the tower's tokens entered, int64 [M * N]: places that count on from image to image."""
        images, count = visual.embeds.shape[:2]
        own = np.arange(count) if visual.places is None else visual.places
        return (np.arange(images)[:, None] * self._tower + own).ravel()
