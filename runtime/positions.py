"""Which position each row of a step has: the rotary rows that the host hands to the decoder graph.

Positions count the dialogue as the model was trained to see it: every visual token of an image has one, also those that
a vision-side method (Nüwa) drops before the decoder, so that the text behind an image stands where it would stand
anyway. Renumbered schedules (PyramidDrop's code) count the rows of each stage instead.

A model with M-RoPE has three positions (time, row, column; arXiv 2409.12191): text counts on in all of them, an image
stands at one time, its rows and columns count from there on, and the text behind it goes on behind the longer side. So
a dialogue's next position is not its number of cache rows; the difference is its *shift*, which the session adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reroute.manifest import Grid, Manifest
from reroute.runtime.layout import Layout, StepInputs
from reroute.runtime.rope import Rotary


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """What the vision graph makes of M images.

    Attributes:
        embeds: float [M, N, D], in the manifest's dtype; images of several grids behind each other as [1, N of all, D].
        places: int64 [M, N] or [1, N of all], ascending places on the grid of each image, row-major; None when no token
            was dropped.
        grids: (rows, columns) of each image; None where all images of the model have the same.
        deepstack: float [E, M, N, D], what is added to the tokens after the first decoder layers, or None.
    """

    embeds: np.ndarray
    places: np.ndarray | None = None
    grids: tuple[Grid, ...] | None = None
    deepstack: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """M, the images."""
        return len(self.embeds) if self.grids is None else len(self.grids)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in (self.embeds, self.places, self.deepstack) if array is not None)


def join(parts: Sequence[VisualTokens]) -> VisualTokens:
    """The tokens of several images: with grids behind each other, else stacked."""
    if len(parts) == 1:
        return parts[0]
    alike = parts[0].grids is None

    def flat(array: np.ndarray) -> np.ndarray:
        return array if alike else array.reshape(*array.shape[:-3], 1, -1, array.shape[-1])

    stacks = [flat(part.deepstack) for part in parts if part.deepstack is not None]
    places = [part.places if alike else part.places.reshape(1, -1) for part in parts if part.places is not None]
    return VisualTokens(
        embeds=np.concatenate([flat(part.embeds) for part in parts], axis=0 if alike else 1),
        places=np.concatenate(places, axis=0 if alike else 1) if places else None,
        grids=None if alike else tuple(grid for part in parts for grid in part.grids or ()),
        deepstack=np.concatenate(stacks, axis=1 if alike else 2) if stacks else None,
    )


def split(visual: VisualTokens) -> list[VisualTokens]:
    """The tokens of each image of one size, in memory of their own."""
    if visual.num_images == 1:
        return [visual]
    return [
        VisualTokens(
            embeds=visual.embeds[image : image + 1].copy(),
            places=None if visual.places is None else visual.places[image : image + 1].copy(),
            grids=None if visual.grids is None else visual.grids[image : image + 1],
            deepstack=None if visual.deepstack is None else visual.deepstack[:, image : image + 1].copy(),
        )
        for image in range(visual.num_images)
    ]


class Positions:
    """The inputs of a step: a layout and visual tokens, with the rotary rows of their positions."""

    def __init__(self, manifest: Manifest) -> None:
        text, capacity = manifest.model.text, manifest.capacity
        self._schedule, self._mrope = manifest.schedule, text.mrope
        self._tower, self._grid = manifest.model.vision.tokens_per_image, manifest.model.vision.grid
        self._dropped = self._tower - self._schedule.entering(self._tower)
        empty = np.zeros((0, 0, text.hidden_size), dtype=manifest.dtype)
        stack = np.zeros((text.deepstack, *empty.shape), dtype=manifest.dtype) if text.deepstack else None
        self._nothing = VisualTokens(embeds=empty, deepstack=stack)
        rows = capacity.max_text + capacity.max_images * self._tower
        self.rotary = Rotary(head_dim=text.head_dim, theta=text.rope_theta, rows=rows)

    def inputs(self, layout: Layout, visual: VisualTokens | None, lengths: np.ndarray, *, shift: int = 0) -> StepInputs:
        """The step's inputs at batch 1.

        Args:
            layout: of the tokens that enter the decoder.
            visual: of the images in the order of their placeholders; None for a step of text.
            lengths: int [stages], valid cache rows of each stage before the step.
            shift: sum of `shift` over the images of the dialogue's earlier steps.
        """
        visual = visual or self._nothing
        if self._schedule.positions == "renumbered":
            count = layout.num_text + layout.num_visual
            tables = [self.rotary.rows(int(length), count) for length in lengths]
            cos, sin = np.stack([table[0] for table in tables]), np.stack([table[1] for table in tables])
        elif self._mrope is not None:
            at = (
                int(lengths[0])
                + shift
                + self.offsets_3d(layout, self.grids(visual), visual.places)[:, self._mrope.axes]
            )
            frequency = np.arange(at.shape[1])
            cos, sin = self.rotary.cos[at, frequency], self.rotary.sin[at, frequency]
        else:
            at = int(lengths[0]) + shift + self.offsets(layout, visual.places)
            cos, sin = self.rotary.cos[at], self.rotary.sin[at]
        step = layout.inputs(visual.embeds, cos, sin)
        if visual.deepstack is not None:
            stack = visual.deepstack
            step = replace(step, deepstack=stack.reshape(len(stack), 1, layout.num_visual, stack.shape[-1]))
        if self._schedule.pool == "image":
            step = replace(step, visual_images=layout.visual_images)
        return step

    def shift(self, visual: VisualTokens | None) -> int:
        """How far these images put the next position ahead of the cache rows; negative where an image takes fewer."""
        if visual is None:
            return 0
        if self._mrope is not None:
            return sum(max(rows, columns) - self._entering(rows, columns) for rows, columns in self.grids(visual))
        return visual.num_images * self._dropped

    def grids(self, visual: VisualTokens) -> tuple[Grid, ...]:
        """(rows, columns) of each image."""
        return (self._grid,) * visual.num_images if visual.grids is None else visual.grids

    def offsets(self, layout: Layout, places: np.ndarray | None) -> np.ndarray:
        """Positions of a step's slots from its first on, int64 [S]: gaps where the tower dropped tokens."""
        at = np.arange(layout.num_text + layout.num_visual, dtype=np.int64)
        if places is None or not self._dropped:
            return at
        for image, (slots, kept) in enumerate(zip(layout.visual_slots.reshape(len(places), -1), places, strict=True)):
            at[slots[-1] + 1 :] += self._dropped
            at[slots] = slots[0] + image * self._dropped + kept
        return at

    def offsets_3d(self, layout: Layout, grids: Sequence[Grid], places: np.ndarray | None = None) -> np.ndarray:
        """Time, row and column of a step's slots from its first on, int64 [S, 3]: a token has those of its place."""
        at = np.repeat(np.arange(layout.num_text + layout.num_visual, dtype=np.int64)[:, None], 3, axis=1)
        done = 0
        for (rows, columns), kept in zip(grids, self._places(grids, places), strict=True):
            count = len(kept)
            slots = layout.visual_slots[done : done + count]
            done += count
            start = at[slots[0], 0]
            at[slots[-1] + 1 :] += max(rows, columns) - count
            at[slots, 0] = start
            at[slots, 1] = start + kept // columns
            at[slots, 2] = start + kept % columns
        return at

    def _entering(self, rows: int, columns: int) -> int:
        return self._schedule.entering(rows * columns)

    def _places(self, grids: Sequence[Grid], places: np.ndarray | None) -> list[np.ndarray]:
        """Places on its grid of the tokens of each image that entered, int64 [N] each."""
        if places is None:
            return [np.arange(rows * columns) for rows, columns in grids]
        counts = [self._entering(rows, columns) for rows, columns in grids]
        return np.split(places.ravel(), np.cumsum(counts)[:-1])

    def tokens(self, visual: VisualTokens) -> np.ndarray:
        """Which of the tower's tokens entered, int64 [M * N]: places that count on from image to image."""
        images, count = visual.embeds.shape[:2]
        if visual.grids is not None:
            sizes = np.asarray([rows * columns for rows, columns in visual.grids])
            starts = np.cumsum(sizes) - sizes
            return np.concatenate(
                [start + own for start, own in zip(starts, self._places(visual.grids, visual.places), strict=True)]
            )
        own = np.arange(count) if visual.places is None else visual.places
        return (np.arange(images)[:, None] * self._tower + own).ravel()
