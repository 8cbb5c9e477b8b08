"""Where text and visual tokens stand in a step, and how many cache rows the step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reroute.errors import UserError
from reroute.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step of the decoder: a graph input per field, except the caches, `kv_len` and a tier's `budgets`, which a
    backend keeps.

    T text tokens and N visual tokens give a sequence of S = T + N slots; its last slot is text.

    Attributes:
        input_ids: int64 [B, T], text tokens without image placeholders, T >= 1.
        visual_embeds: float [B, N, D] in the manifest's dtype, N = 0 without an image.
        text_slots: int64 [T], ascending places of the text tokens in 0..S-1.
        visual_slots: int64 [N], ascending places of the visual tokens; disjoint from and completing
            `text_slots`.
        rope_cos: float32 [S, head_dim / 2], rows of this step's positions; [stages, S, head_dim / 2] for a schedule
            with renumbered positions.
        rope_sin: the same shape.
        visual_images: int64 [N], the image of each visual token, ascending from 0; only for a budget per image.
        deepstack: float [E, B, N, D] in the manifest's dtype, what is added to the visual tokens after the first E
            layers; only for models that have it.
    """

    input_ids: np.ndarray
    visual_embeds: np.ndarray
    text_slots: np.ndarray
    visual_slots: np.ndarray
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    visual_images: np.ndarray | None = None
    deepstack: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The graph's inputs by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A step before its images are encoded: what capacity checks need, without running anything.

    Attributes:
        input_ids: int64 [T].
        text_slots: int64 [T].
        visual_slots: int64 [N].
        images: int64 [N], the image of each visual token, from 0 in the order of their placeholders; None: all of one.
    """

    input_ids: np.ndarray
    text_slots: np.ndarray
    visual_slots: np.ndarray
    images: np.ndarray | None = None

    @property
    def visual_images(self) -> np.ndarray:
        """int64 [N], the image of each visual token."""
        return np.zeros_like(self.visual_slots) if self.images is None else self.images

    @property
    def num_text(self) -> int:
        """T, the text tokens of the step."""
        return len(self.text_slots)

    @property
    def num_visual(self) -> int:
        """N, the visual tokens of the step."""
        return len(self.visual_slots)

    @classmethod
    def of_text(cls, token_ids: Sequence[int]) -> Layout:
        """A step of text alone. Unlike `lay_out`, a placeholder's id is text here: a model may sample it."""
        return cls(
            input_ids=np.asarray(token_ids, dtype=np.int64),
            text_slots=np.arange(len(token_ids), dtype=np.int64),
            visual_slots=np.zeros(0, dtype=np.int64),
        )

    def after(self, token_id: int) -> Layout:
        """The same step with one text token in front, whatever its id: a model may even sample a placeholder."""
        return Layout(
            input_ids=np.concatenate([[token_id], self.input_ids]),
            text_slots=np.concatenate([[0], self.text_slots + 1]),
            visual_slots=self.visual_slots + 1,
            images=self.images,
        )

    def inputs(self, visual_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray) -> StepInputs:
        """The step's inputs at batch 1.

        Args:
            visual_embeds: float [M, N / M, D], the encoded images in the order of their placeholders.
            rope_cos: rotary rows of the slots, see `StepInputs`.
            rope_sin: the same.
        """
        return StepInputs(
            input_ids=self.input_ids[None],
            visual_embeds=visual_embeds.reshape(1, self.num_visual, visual_embeds.shape[-1]),
            text_slots=self.text_slots,
            visual_slots=self.visual_slots,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
        )


def lay_out(
    token_ids: Sequence[int],
    *,
    image_token: str,
    image_token_id: int,
    num_images: int,
    tokens_per_image: int | Sequence[int],
) -> Layout:
    """Take the image placeholders out of `token_ids` and give each of them its slots.

    `tokens_per_image` is of every image, or of each in order.

    Raises:
        UserError: no tokens, other than `num_images` placeholders, or a placeholder at the end (the logits
            come from the last row, which must be text).
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    is_image = ids == image_token_id
    count = int(is_image.sum())
    if count != num_images:
        raise UserError(
            f"the prompt has {count} {image_token} placeholders, but {num_images} images are given",
            hint=f"leave {image_token} out of the question: the chat template writes one for each image",
        )
    if not len(ids):
        raise UserError("the prompt is empty", hint="ask a question")
    if is_image[-1]:
        raise UserError(
            f"the prompt ends with an image ({image_token}), but an answer needs text as the last token",
            hint="use a chat template that ends with text, such as `ASSISTANT:`",
        )
    widths = np.ones(len(ids), dtype=np.int64)
    widths[is_image] = tokens_per_image
    places = np.repeat(is_image, widths)
    return Layout(
        input_ids=ids[~is_image],
        text_slots=np.flatnonzero(~places).astype(np.int64),
        visual_slots=np.flatnonzero(places).astype(np.int64),
        images=np.repeat(np.arange(num_images, dtype=np.int64), widths[is_image]),
    )


def stack(steps: Sequence[StepInputs]) -> StepInputs:
    """Several steps as one batch, one step a row. The decoder has no padding: slots and positions are the batch's.

    Raises:
        UserError: steps of different lengths, with images at different places, or (Nüwa) with tokens left at different
            positions of the image, which only padding would align.
    """
    first = steps[0]
    for step in steps[1:]:
        lengths = [f"{len(s.text_slots)} text and {len(s.visual_slots)} visual tokens" for s in (first, step)]
        same = [np.array_equal(getattr(step, name), getattr(first, name)) for name in ("text_slots", "rope_cos")]
        if lengths[0] != lengths[1] or not all(same):
            what = f"have {', and '.join(lengths)}"
            if lengths[0] == lengths[1]:
                what = f"have their images at different {'positions' if same[0] else 'places'}"
            raise UserError(
                f"two prompts of a batch {what}: one batch would need padding, which is not supported",
                hint="run them one after the other, or put prompts of equal length and layout into one batch",
            )
    stacks = [step.deepstack for step in steps if step.deepstack is not None]
    return replace(
        first,
        input_ids=np.concatenate([step.input_ids for step in steps]),
        visual_embeds=np.concatenate([step.visual_embeds for step in steps]),
        deepstack=np.concatenate(stacks, axis=1) if stacks else None,
    )


def rows_added(schedule: Schedule, *, num_text: int, num_visual: int, images: np.ndarray | None = None) -> np.ndarray:
    """Cache rows that a step adds per stage, int64 [stages]: T + N in stage 0, T + min(K_s, N) in s.

    `images`, int64 [N], is the image of each visual token, for schedules with a budget per image; None: all of one.
    """
    counts = [num_visual] if images is None else np.bincount(images).tolist()
    return num_text + np.asarray(schedule.visual_rows(counts), dtype=np.int64)
