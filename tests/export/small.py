"""Random decoders of any small size, for tests of the algorithm that need no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from reroute.export.decoder import Output, RoutedDecoder
from reroute.export.llama import decoder_source
from reroute.export.reference import RecordingDecoder
from reroute.manifest import TextModel
from reroute.schedule import Action, Positions, Schedule, Scoring, Stage
from tests.export.independent import Result, independent_forward, last_logits


@dataclass
class Small:
    """A random decoder and one prompt: text, `visual` visual rows from slot `start`, text.

    The same seed gives the same weights and inputs whatever the schedule.
    """

    layers: int = 6
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    visual: int = 20
    text: int = 6
    start: int = 2
    seed: int = 0
    eps: float = 1e-5
    theta: float = 10000.0
    scoring: Scoring = "own"
    positions: Positions = "original"
    model: TextModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = TextModel(
            num_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab_size=50,
            rms_norm_eps=self.eps,
            rope_theta=self.theta,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )

    @property
    def rows(self) -> int:
        return self.visual + self.text

    @property
    def is_visual(self) -> np.ndarray:
        slots = np.arange(self.rows)
        return (slots >= self.start) & (slots < self.start + self.visual)

    def schedule(self, action: Action, decisions: dict[int, int]) -> Schedule:
        edges = [0, *decisions, self.layers]
        keeps = [None, *decisions.values()]
        stages = tuple(Stage(start=a, stop=b, keep=k) for a, b, k in zip(edges, edges[1:], keeps, strict=False))
        if not decisions:
            return Schedule(action="dense", stages=stages)
        return Schedule(action=action, stages=stages, scoring=self.scoring, positions=self.positions)

    def decoder(self, action: Action = "dense", decisions: dict[int, int] | None = None) -> RoutedDecoder:
        decoder = RoutedDecoder(self.model, self.schedule(action, decisions or {})).eval()
        generator = torch.Generator().manual_seed(self.seed)
        state = {}
        for name, parameter in decoder.state_dict().items():
            spread = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            state[name] = 1 + 0.1 * spread if is_norm else spread * (0.5 if name == "embed.weight" else 0.25)
        decoder.load_state_dict(state, assign=True)
        return decoder

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(0, self.model.vocab_size, (1, self.text), generator=generator)
        embeds = 0.5 * torch.randn(1, self.visual, self.hidden, generator=generator)
        mask = torch.from_numpy(self.is_visual)
        return ids, embeds, torch.where(~mask)[0], torch.where(mask)[0]

    def prefill(
        self, action: Action = "dense", decisions: dict[int, int] | None = None
    ) -> tuple[Output, RecordingDecoder]:
        run = RecordingDecoder(self.decoder(action, decisions), capacity=self.rows + 16)
        return run.step(*self.inputs()), run

    def weights(self) -> dict[str, np.ndarray]:
        """The same weights in float64, back to [out, in] and HF names."""
        decoder = self.decoder()
        weights = {}
        for name, tensor in decoder.state_dict().items():
            transposed = name.endswith("_proj.weight") or name == "lm_head.weight"
            source = decoder_source(name, tied=False).removeprefix("language_model.")
            weights[source] = (tensor.T if transposed else tensor).numpy().astype(np.float64)
        return weights

    def expected(self, action: Action, decisions: dict[int, int]) -> tuple[Result, np.ndarray]:
        """The independent statement on the same weights."""
        weights = self.weights()
        ids, embeds, _, _ = self.inputs()
        h = np.zeros((self.rows, self.hidden))
        h[~self.is_visual] = weights["embed_tokens.weight"][ids[0].numpy()]
        h[self.is_visual] = embeds[0].numpy()
        result = independent_forward(
            weights,
            h,
            is_visual=self.is_visual,
            decisions=decisions,
            action=action,
            num_layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            eps=self.eps,
            theta=self.theta,
            scoring=self.scoring,
            renumbered=self.positions == "renumbered",
        )
        return result, last_logits(weights, result, self.eps)


def score_margin(scores: np.ndarray, ran: np.ndarray, is_visual: np.ndarray) -> float:
    """Distance between the worst candidate that ran and the best that waited; inf if none waited."""
    candidates = np.flatnonzero(is_visual & np.isfinite(scores))
    kept = np.isin(candidates, ran)
    if kept.all():
        return float("inf")
    return float(scores[candidates[kept]].min() - scores[candidates[~kept]].max())
