"""The torch reference: drives the paper's decoder through a scenario and records what an engine must reproduce."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reroute.export.decoder import Cache, Output, RoutedDecoder
from reroute.manifest import Model
from reroute.scenario import Arrays, Scenario
from reroute.schedule import Schedule

Visual = tuple[Tensor, Tensor | None]


class RecordingDecoder:
    """A `RoutedDecoder` with its caches, positions and lengths, which remembers what every decision ranked.

    Attributes:
        lengths: valid cache rows of each stage.
        position: of the next row, where rows keep their positions.
        decisions: for each decision of the last step, (candidates [B, N], their scores [B, N]).
    """

    def __init__(self, decoder: RoutedDecoder, capacity: int, batch: int = 1) -> None:
        self.decoder = decoder
        self.text, self.schedule = decoder.model, decoder.schedule
        self.lengths = [0] * len(self.schedule.stages)
        self.position = 0
        self.decisions: list[tuple[Tensor, Tensor]] = []
        shape = (batch, self.text.num_kv_heads, capacity, self.text.head_dim)
        self.past: list[Cache] = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.text.num_layers)]

    def step(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        text_slots: Tensor,
        visual_slots: Tensor,
        *,
        offsets: Tensor | None = None,
        span: int | None = None,
    ) -> Output:
        """Run one step at the next positions; shapes as in `reroute.export.decoder`.

        Args:
            input_ids: text tokens.
            visual_embeds: visual tokens.
            text_slots: places of the text.
            visual_slots: places of the visual tokens.
            offsets: int64 [S], position of each row from the step's first on; None: one after the other.
            span: positions that the step takes; None: one for each row.
        """
        count = len(text_slots) + len(visual_slots)
        offsets = torch.arange(count) if offsets is None else offsets
        starts = self.lengths if self.schedule.positions == "renumbered" else [self.position]
        tables = [rotary_rows(self.text.head_dim, self.text.rope_theta, start + offsets) for start in starts]
        cos, sin = (torch.stack(rows) if len(starts) > 1 else rows[0] for rows in zip(*tables, strict=True))
        lengths = [
            length + len(text_slots) + stage.visual_rows(len(visual_slots))
            for length, stage in zip(self.lengths, self.schedule.stages, strict=True)
        ]
        kv_len = torch.tensor(lengths, dtype=torch.int32)
        self.decoder.decisions = self.decisions = []
        try:
            with torch.no_grad():
                output = self.decoder(input_ids, visual_embeds, text_slots, visual_slots, cos, sin, kv_len, self.past)
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


def rotary_rows(head_dim: int, theta: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, d/2] of positions int64 [S], as transformers' LlamaRotaryEmbedding."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def place_image(ids: np.ndarray, image_token: int, num_visual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids with one placeholder for each image: text ids [1, T], text slots [T], visual slots [N]."""
    wide = np.repeat(ids, np.where(ids == image_token, num_visual, 1))
    visual = wide == image_token
    text_ids = torch.from_numpy(wide[~visual])[None]
    return text_ids, torch.from_numpy(np.flatnonzero(~visual)), torch.from_numpy(np.flatnonzero(visual))


def run_prompt(run: RecordingDecoder, ids: np.ndarray, image_token: int, tokens: int, visual: Visual) -> Output:
    """Run a prompt with one image of `tokens` positions, of which the tower may have dropped some."""
    embeds, places = visual
    text_ids, text, image = place_image(ids, image_token, tokens)
    if places is None:
        return run.step(text_ids, embeds, text, image)
    # Rows that are left keep their positions; their slots count only what is there.
    kept = image[places[0]]
    offsets = torch.cat([text, kept]).sort().values
    slots = (torch.searchsorted(offsets, text), torch.searchsorted(offsets, kept))
    return run.step(text_ids, embeds, *slots, offsets=offsets, span=len(text) + len(image))


def encode(tower: torch.nn.Module, pixel_values: Tensor) -> Visual:
    """Visual tokens of images, and the places of those left where the tower drops some."""
    with torch.no_grad():
        made = tower(pixel_values)
    return made if isinstance(made, tuple) else (made, None)


def record(decoder: RoutedDecoder, tower: torch.nn.Module, model: Model, scenario: Scenario) -> Arrays:
    """Run the scenario in torch; the arrays are those of `reroute.scenario`."""
    arrays = scenario.to_arrays()
    visual = encode(tower, torch.from_numpy(scenario.pixel_values))
    arrays["visual_embeds"] = visual[0].numpy()
    if visual[1] is not None:
        arrays["visual_places"] = visual[1].numpy()
    tokens = model.vision.tokens_per_image
    rows = len(scenario.prompt_ids) + tokens + len(scenario.turn_ids) + scenario.num_tokens
    run = RecordingDecoder(decoder, rows)
    prompt = run_prompt(run, scenario.prompt_ids, model.tokens.image_token_id, tokens, visual)
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
    return arrays


def _slots_of(candidates: Tensor, routes: list[Tensor], stage: int, schedule: Schedule) -> Tensor:
    """Candidate rows as slots of the step: removal ranks rows of the compact sequence that still runs."""
    compact = schedule.action == "removal" and stage > 1
    return routes[stage - 2].gather(1, candidates) if compact else candidates
