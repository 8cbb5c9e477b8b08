"""The torch reference: drives the paper's decoder through a scenario and records what an engine must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reroute.export.decoder import Cache, Output, RoutedDecoder
from reroute.export.weights import streamed_of
from reroute.manifest import Grid, Model, MRope
from reroute.scenario import Arrays, Scenario
from reroute.schedule import Schedule


class Visual(NamedTuple):
    """What a tower makes of M images of one grid.

    Attributes:
        embeds: [M, N, D].
        places: int64 [M, N], where the tower drops tokens: places on the grid of those left.
        deepstack: [E, M, N, D], what is added after the first decoder layers.
    """

    embeds: Tensor
    places: Tensor | None = None
    deepstack: Tensor | None = None


class HandedOver(list[Cache]):
    """The caches before a step. A layer's is let go of once the layer has it: all of them before and after a step, in
    fp32, can be more than the layers' weights.
    """

    def __getitem__(self, index: Any) -> Any:
        """The cache of a layer, once."""
        cache = super().__getitem__(index)
        self[index] = None  # type: ignore[call-overload]
        return cache


class RecordingDecoder:
    """A `RoutedDecoder` with its caches, positions and lengths, which remembers what every decision ranked.

    Attributes:
        lengths: valid cache rows of each stage.
        position: of the next row, where rows keep their positions.
        decisions: for each decision of the last step, (candidates [B, N], their scores [B, N]).
    """

    def __init__(self, decoder: RoutedDecoder, capacity: int | Sequence[int], batch: int = 1) -> None:
        """`capacity`: cache rows of every stage, or of each."""
        self.decoder = decoder
        self.text, self.schedule = decoder.model, decoder.schedule
        self.lengths = [0] * len(self.schedule.stages)
        self.position = 0
        self.decisions: list[tuple[Tensor, Tensor]] = []
        stages = len(self.schedule.stages)
        rows = [capacity] * stages if isinstance(capacity, int) else capacity
        self.past: list[Cache] = []
        for layer in range(self.text.num_layers):
            stage = self.schedule.stage_of_layer(layer)
            shape = (batch, self.text.num_kv_heads, rows[stage], self.text.head_dim)
            self.past.append((torch.zeros(shape), torch.zeros(shape)))

    def step(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        text_slots: Tensor,
        visual_slots: Tensor,
        *,
        offsets: Tensor | None = None,
        span: int | None = None,
        images: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> Output:
        """Run one step at the next positions; shapes as in `reroute.export.decoder`.

        Args:
            input_ids: text tokens.
            visual_embeds: visual tokens.
            text_slots: places of the text.
            visual_slots: places of the visual tokens.
            offsets: int64 [S] or [S, 3] (time, row, column), positions of each row from the step's first on; None: one
                after the other.
            span: positions that the step takes; None: one for each row.
            images: int64 [N], the image of each visual row; None: all of one.
            deepstack: see `reroute.export.decoder`; made up as nothing for a step of text.
        """
        count = len(text_slots) + len(visual_slots)
        offsets = torch.arange(count) if offsets is None else offsets
        images = torch.zeros_like(visual_slots) if images is None else images
        if self.text.deepstack and deepstack is None:
            deepstack = visual_embeds.new_zeros(self.text.deepstack, *visual_embeds.shape)
        starts = self.lengths if self.schedule.positions == "renumbered" else [self.position]
        text = self.text
        tables = [rotary_rows(text.head_dim, text.rope_theta, start + offsets, text.mrope) for start in starts]
        cos, sin = (torch.stack(rows) if len(starts) > 1 else rows[0] for rows in zip(*tables, strict=True))
        added = self.schedule.visual_rows(torch.bincount(images).tolist())
        lengths = [length + len(text_slots) + rows for length, rows in zip(self.lengths, added, strict=True)]
        kv_len = torch.tensor(lengths, dtype=torch.int32)
        self.decoder.decisions = self.decisions = []
        past, self.past = HandedOver(self.past), []
        try:
            with torch.no_grad():
                output = self.decoder(
                    *(input_ids, visual_embeds, text_slots, visual_slots, cos, sin, kv_len, past),
                    visual_images=images if self.schedule.pool == "image" else None,
                    deepstack=deepstack,
                )
        finally:
            self.decoder.decisions = None
        self.past, self.lengths = output.present, lengths
        self.position += count if span is None else span
        return output

    def run_text(self, input_ids: Tensor) -> Output:
        """Run text tokens [1, T] without an image."""
        embeds = torch.zeros(1, 0, self.text.hidden_size)
        return self.step(input_ids, embeds, torch.arange(input_ids.shape[1]), torch.zeros(0, dtype=torch.int64))

    def decode(self, token: int) -> Output:
        """Run one text token."""
        return self.run_text(torch.tensor([[token]]))

    def greedy(self, logits: Tensor, count: int) -> list[int]:
        """`count` greedy tokens that follow `logits` [1, V]; all of them but the last are run."""
        tokens = [int(logits.argmax())]
        while len(tokens) < count:
            tokens.append(int(self.decode(tokens[-1]).logits.argmax()))
        return tokens


def rotary_rows(head_dim: int, theta: float, positions: Tensor, mrope: MRope | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [S, d/2] of positions int64 [S], as transformers' LlamaRotaryEmbedding.

    With `mrope` positions may be [S, 3], time, row and column, as in its Qwen2VLRotaryEmbedding.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if mrope is None or positions.ndim == 1:
        angles = positions.float()[:, None] * frequencies
    else:
        angles = positions.float()[:, list(mrope.axes)] * frequencies
    return angles.cos(), angles.sin()


def mrope_offsets(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> tuple[Tensor, int]:
    """Positions int64 [S, 3] of a prompt from its first on, and how many it takes (arXiv 2409.12191, section 2.1).

    Text counts on in all three. An image stands at one time; its rows and columns count from there on, and the text
    behind it goes on behind the longer side.
    """
    rows: list[tuple[int, int, int]] = []
    at, left = 0, list(grids)
    for token in ids.tolist():
        if token == image_token:
            height, width = left.pop(0)
            rows += [(at, at + y, at + x) for y in range(height) for x in range(width)]
            at += max(height, width)
        else:
            rows.append((at, at, at))
            at += 1
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), at


def place_image(ids: np.ndarray, image_token: int, num_visual: int | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids with one placeholder for each image: text ids [1, T], text slots [T], visual slots [N].

    `num_visual` is of every image, or of each.
    """
    is_image = ids == image_token
    widths = np.ones(len(ids), dtype=np.int64)
    widths[is_image] = num_visual
    wide = np.repeat(ids, widths)
    visual = np.repeat(is_image, widths)
    text_ids = torch.from_numpy(wide[~visual])[None]
    return text_ids, torch.from_numpy(np.flatnonzero(~visual)), torch.from_numpy(np.flatnonzero(visual))


def run_prompt(run: RecordingDecoder, ids: np.ndarray, image_token: int, tokens: int, visual: Visual) -> Output:
    """Run a prompt with images of `tokens` positions, of which the tower may have dropped some."""
    embeds, places, _ = visual
    text_ids, text, image = place_image(ids, image_token, tokens)
    if places is None:
        return run.step(text_ids, embeds, text, image)
    # Rows that are left keep their positions; their slots count only what is there.
    kept = image[places[0]]
    offsets = torch.cat([text, kept]).sort().values
    slots = (torch.searchsorted(offsets, text), torch.searchsorted(offsets, kept))
    return run.step(text_ids, embeds, *slots, offsets=offsets, span=len(text) + len(image))


def run_grids(
    run: RecordingDecoder, ids: np.ndarray, image_token: int, grids: Sequence[Grid], visuals: Sequence[Visual]
) -> Output:
    """Run a prompt of a model whose images have rows and columns for positions, one `visuals` for each image."""
    counts = [rows * columns for rows, columns in grids]
    text_ids, text, image = place_image(ids, image_token, counts)
    offsets, span = mrope_offsets(ids, image_token, grids)
    if any(visual.places is not None for visual in visuals):
        # As in `run_prompt`: rows that are left keep their positions.
        parts = zip(image.split(counts), visuals, strict=True)
        image = torch.cat([slots if one.places is None else slots[one.places[0]] for slots, one in parts])
        left = torch.cat([text, image]).sort().values
        offsets, counts = offsets[left], [visual.embeds.shape[1] for visual in visuals]
        text, image = torch.searchsorted(left, text), torch.searchsorted(left, image)
    size = run.text.hidden_size
    # An empty tensor in front, so that a prompt of text alone needs no other path.
    embeds = torch.cat([torch.zeros(1, 0, size), *(visual.embeds for visual in visuals)], dim=1)
    stacks = [visual.deepstack for visual in visuals if visual.deepstack is not None]
    return run.step(
        text_ids,
        embeds,
        text,
        image,
        offsets=offsets,
        span=span,
        images=torch.repeat_interleave(torch.arange(len(grids)), torch.tensor(counts, dtype=torch.int64)),
        deepstack=torch.cat(stacks, dim=2) if stacks else None,
    )


def encode(tower: torch.nn.Module, pixel_values: Tensor) -> Visual:
    """Visual tokens of images of one size, and what else the tower gives."""
    with torch.no_grad():
        made = tower(pixel_values)
    names = [str(name).removeprefix("visual_") for name in tower.outputs]  # type: ignore[union-attr]
    return Visual(**dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True)))


def record(decoder: RoutedDecoder, tower: torch.nn.Module, model: Model, scenario: Scenario) -> Arrays:
    """Run the scenario in torch, weights on demand; the arrays are those of `reroute.scenario`."""
    arrays = scenario.to_arrays()
    visual = encode(tower, torch.from_numpy(scenario.pixel_values))
    for name, tensor in visual._asdict().items():
        if tensor is not None:
            arrays[f"visual_{name}"] = tensor.numpy()
    for grid, pixel_values in scenario.other_pixels.items():
        for name, tensor in encode(tower, torch.from_numpy(pixel_values))._asdict().items():
            if tensor is not None:
                arrays[f"{grid[0]}x{grid[1]}.visual_{name}"] = tensor.numpy()
    grid = model.grid_of(*scenario.pixel_values.shape[2:])
    tokens = grid[0] * grid[1] if model.vision.grids else model.vision.tokens_per_image
    streamed_of(tower).release()
    text, schedule = len(scenario.prompt_ids) + len(scenario.turn_ids) + scenario.num_tokens, decoder.schedule
    run = RecordingDecoder(decoder, [text + rows for rows in schedule.visual_rows([schedule.entering(tokens)])])
    token = model.tokens.image_token_id
    if model.text.mrope is None:
        prompt = run_prompt(run, scenario.prompt_ids, token, tokens, visual)
    else:
        prompt = run_grids(run, scenario.prompt_ids, token, [grid], [visual])
    arrays["prompt.logits"] = prompt.logits.numpy()
    for stage, (route, decision) in enumerate(zip(prompt.routes, run.decisions, strict=True), start=1):
        arrays[f"routes.{stage}"] = route.numpy()
        arrays[f"scores.{stage}"] = decision[1].numpy()
        arrays[f"candidates.{stage}"] = _slots_of(decision[0], prompt.routes, stage, decoder.schedule).numpy()
    answer = run.greedy(prompt.logits, scenario.num_tokens)
    arrays["tokens"] = np.asarray(answer, dtype=np.int64)

    turn = torch.from_numpy(np.concatenate([answer[-1:], scenario.turn_ids]))[None]
    arrays["turn.logits"] = run.run_text(turn).logits.numpy()
    for layer, cache in enumerate(run.past):
        rows = run.lengths[decoder.schedule.stage_of_layer(layer)]
        for part, tensor in zip(("key", "value"), cache, strict=True):
            arrays[f"cache.{layer}.{part}"] = tensor[:, :, :rows].numpy()
    streamed_of(decoder).release()
    return arrays


def _slots_of(candidates: Tensor, routes: list[Tensor], stage: int, schedule: Schedule) -> Tensor:
    """Candidate rows as slots of the step: removal ranks rows of the compact sequence that still runs."""
    compact = schedule.action == "removal" and stage > 1
    return routes[stage - 2].gather(1, candidates) if compact else candidates
