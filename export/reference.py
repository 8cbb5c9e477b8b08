"""The torch reference: drives the paper's decoder through a scenario and records what an engine must reproduce."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reroute.export.decoder import Cache, Output, RoutedDecoder
from reroute.manifest import Model
from reroute.routing import Schedule
from reroute.scenario import Arrays, Scenario


class RecordingDecoder:
    """A `RoutedDecoder` with its caches, positions and lengths, which remembers what every decision ranked.

    Attributes:
        lengths: valid cache rows of each stage.
        decisions: for each decision of the last step, (candidates [B, N], their scores [B, N]).
    """

    def __init__(self, decoder: RoutedDecoder, capacity: int, batch: int = 1) -> None:
        self.decoder = decoder
        self.text, self.schedule = decoder.model, decoder.schedule
        self.lengths = [0] * len(self.schedule.stages)
        self.decisions: list[tuple[Tensor, Tensor]] = []
        shape = (batch, self.text.num_kv_heads, capacity, self.text.head_dim)
        self.past: list[Cache] = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.text.num_layers)]

    def step(self, input_ids: Tensor, visual_embeds: Tensor, text_slots: Tensor, visual_slots: Tensor) -> Output:
        """Run one step at the next positions; shapes as in `reroute.export.decoder`."""
        count = len(text_slots) + len(visual_slots)
        cos, sin = rotary_rows(self.text.head_dim, self.text.rope_theta, self.lengths[0], count)
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


def rotary_rows(head_dim: int, theta: float, start: int, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin [count, d/2] of positions start .. start + count - 1, as transformers' LlamaRotaryEmbedding."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.arange(start, start + count).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def place_image(ids: np.ndarray, image_token: int, num_visual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids with one placeholder for each image: text ids [1, T], text slots [T], visual slots [N]."""
    wide = np.repeat(ids, np.where(ids == image_token, num_visual, 1))
    visual = wide == image_token
    text_ids = torch.from_numpy(wide[~visual])[None]
    return text_ids, torch.from_numpy(np.flatnonzero(~visual)), torch.from_numpy(np.flatnonzero(visual))


def record(decoder: RoutedDecoder, tower: torch.nn.Module, model: Model, scenario: Scenario) -> Arrays:
    """Run the scenario in torch; the arrays are those of `reroute.scenario`."""
    arrays = scenario.to_arrays()
    with torch.no_grad():
        embeds = tower(torch.from_numpy(scenario.pixel_values))
    arrays["visual_embeds"] = embeds.numpy()
    ids, text_slots, visual_slots = place_image(
        scenario.prompt_ids, model.tokens.image_token_id, model.vision.tokens_per_image
    )
    turns = len(scenario.turn_ids) + scenario.num_tokens
    run = RecordingDecoder(decoder, len(text_slots) + len(visual_slots) + turns)
    prompt = run.step(ids, embeds, text_slots, visual_slots)
    arrays["prompt.logits"] = prompt.logits.numpy()
    for stage, (route, decision) in enumerate(zip(prompt.routes, run.decisions, strict=True), start=1):
        arrays[f"routes.{stage}"] = route.numpy()
        arrays[f"scores.{stage}"] = decision[1].numpy()
        arrays[f"candidates.{stage}"] = _slots_of(decision[0], prompt.routes, stage, decoder.schedule).numpy()
    tokens = run.greedy(prompt.logits, scenario.num_tokens)
    arrays["tokens"] = np.asarray(tokens, dtype=np.int64)

    turn = torch.from_numpy(np.concatenate([tokens[-1:], scenario.turn_ids]))[None]
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
