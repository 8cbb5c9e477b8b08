"""Our engine on embeddings: the backend of a bundle, driven without the vision tower.

A prompt is text, N visual rows, text; the embeddings of the visual rows are given. What is timed is `Backend.step`, as
in `reroute bench`: embeddings and token ids on the host in, logits of the last row on the host out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.worker import SETTLE_S
from reroute.runtime.backend import Backend, BackendOptions, StepOutputs, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions, VisualTokens

BEFORE = 20  # text tokens in front of the visual ones, of 64 and more
FIRST_WORD = 16  # ids below may be special


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What all candidates are given.

    Attributes:
        words: int64 [T], text tokens.
        before: how many of them stand before the image.
        embeds: float32 [N, D], the visual rows.
    """

    words: np.ndarray
    before: int
    embeds: np.ndarray

    @property
    def rows(self) -> int:
        """S = T + N."""
        return len(self.words) + len(self.embeds)

    def ids(self, image_token_id: int) -> np.ndarray:
        """int64 [S], with a placeholder for each visual row: what transformers takes."""
        image = np.full(len(self.embeds), image_token_id, dtype=np.int64)
        return np.concatenate([self.words[: self.before], image, self.words[self.before :]])

    def save(self, path: Path, image_token_id: int) -> Path:
        """Write ids [S] and embeds [N, D] for the workers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, ids=self.ids(image_token_id), embeds=self.embeds)
        return path


def make_prompt(*, text: int, visual: int, hidden: int, vocab: int, seed: int = 0) -> Prompt:
    """Random words and random embeddings."""
    random = np.random.default_rng(seed)
    words = random.integers(min(FIRST_WORD, vocab - 1), vocab, text)
    embeds = random.standard_normal((visual, hidden), dtype=np.float32)
    return Prompt(words=words, before=min(BEFORE, text - 1), embeds=embeds)


class OwnEngine:
    """A loaded bundle."""

    def __init__(self, path: Path, *, threads: int, spinning: bool = False) -> None:
        """Load it. Raises UserError."""
        bundle = Bundle.open(path, verify=False)
        self._take(bundle, open_backend(bundle, BackendOptions(threads=threads, spinning=spinning)))

    @classmethod
    def of(cls, path: Path, backend: Backend) -> OwnEngine:
        """The bundle at `path` with a backend that is already there."""
        engine = cls.__new__(cls)
        engine._take(Bundle.open(path, verify=False), backend)
        return engine

    def _take(self, bundle: Bundle, backend: Backend) -> None:
        self.manifest, self.backend = bundle.manifest, backend
        self._positions = Positions(self.manifest)

    @property
    def kept(self) -> list[int]:
        """Cache rows of each layer so far: what ran there."""
        schedule = self.manifest.schedule
        lengths = self.backend.lengths
        return [int(lengths[schedule.stage_of_layer(layer)]) for layer in range(schedule.num_layers)]

    def prefill(self, prompt: Prompt) -> tuple[float, StepOutputs]:
        """Run the prompt from empty caches; milliseconds and outputs."""
        tokens = self.manifest.model.tokens
        visual = len(prompt.embeds)
        if visual:
            layout = lay_out(
                [*prompt.words[: prompt.before], tokens.image_token_id, *prompt.words[prompt.before :]],
                image_token=tokens.image_token,
                image_token_id=tokens.image_token_id,
                num_images=1,
                tokens_per_image=visual,
            )
        else:
            layout = Layout.of_text(prompt.words.tolist())
        embeds = VisualTokens(embeds=prompt.embeds[None].astype(self.manifest.dtype)) if visual else None
        self.backend.reset()
        inputs = self._positions.inputs(layout, embeds, self.backend.lengths)
        time.sleep(SETTLE_S)  # as before a worker's call: threads of the one before may still spin
        start = time.perf_counter()
        outputs = self.backend.step(inputs)
        return (time.perf_counter() - start) * 1e3, outputs

    def decode(self, words: list[int]) -> tuple[float, np.ndarray]:
        """Run one step for each word after what is in the caches; mean milliseconds, and the last logits [V]."""
        total, outputs = 0.0, None
        time.sleep(SETTLE_S)
        for word in words:
            inputs = self._positions.inputs(Layout.of_text([word]), None, self.backend.lengths)
            start = time.perf_counter()
            outputs = self.backend.step(inputs)
            total += time.perf_counter() - start
        assert outputs is not None
        return total * 1e3 / len(words), outputs.logits[0].copy()

    def facts(self) -> dict[str, Any]:
        """What the results say of it."""
        manifest = self.manifest
        return {
            "routing": manifest.routing,
            "average_visual_tokens": manifest.average_visual_tokens,
            "decision_layers": list(manifest.schedule.decision_layers),
            "budgets": list(manifest.schedule.budgets),
            "engine": self.backend.describe(),
            "check_passed": manifest.check["passed"] if manifest.check else None,
        }


def compare_logits(ours: Any, theirs: Any) -> dict[str, Any]:
    """How close two rows of logits are: cosine of the centred rows, largest difference, and the same top token."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    x, y = a - a.mean(), b - b.mean()
    return {
        "cosine": float(x @ y / np.sqrt((x @ x) * (y @ y))),
        "largest_difference": float(np.abs(a - b).max()),
        "same_top_1": bool(a.argmax() == b.argmax()),
    }
