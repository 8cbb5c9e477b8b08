"""One repetition of one bundle at one text length. `BOUNDARY` is the contract of every figure."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from reroute import scenario as scenarios
from reroute.errors import UserError
from reroute.manifest import Manifest
from reroute.runtime.backend import Backend
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions

Sample = dict[str, float]  # quantity -> milliseconds

BOUNDARY = {
    "vision_ms": "the vision graph: preprocessed pixels on the host to visual embeddings on the host",
    "prefill_ms": "the decoder's first step: embeddings and token ids on the host to logits of the last row on the "
    "host, caches empty before; the vision graph is not in it",
    "decode_ms": "one later step of one token, mean over the decode steps of a repetition; choosing the token is not "
    "in it",
    "end_to_end_ms": "one span around all of it: vision, positions, prefill, and every decode step with choosing its "
    "token (greedy)",
    "excluded": "in none of them: loading, reading and preprocessing images, the chat template and the tokenizer, "
    "writing text",
    "peak_rss_bytes": "highest resident memory of a process that opens a session, answers once and ends: Python, "
    "libraries, weights, caches and workspace; device memory of a GPU is not in it",
    "cache_bytes": "the KV caches at the capacity of the session, as allocated",
    "weight_bytes": "graph and weight files of the bundle on disk",
    "load_ms": "opening the session in that process, files not hashed, imports not counted",
}
QUANTITIES = ("vision_ms", "prefill_ms", "decode_ms", "end_to_end_ms")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a repetition runs.

    Attributes:
        text: text tokens of the prompt, image placeholders not counted.
        images: images in the prompt; 0 is a text-only prompt, without the vision graph.
        tokens: decode steps after it.
    """

    text: int
    images: int
    tokens: int


class Workload:
    """Runs `shape` on a loaded bundle. Its words are random and fixed: what is asked does not change the cost."""

    def __init__(self, manifest: Manifest, backend: Backend, shape: Shape) -> None:
        check_capacity(manifest, shape)
        self._backend, self._shape, self._tier = backend, shape, manifest.tier
        self._empty()
        self._positions = Positions(manifest)
        model = manifest.model
        probe = scenarios.probe(model)
        words = np.resize(probe.prompt_ids[probe.prompt_ids != model.tokens.image_token_id], shape.text).tolist()
        before = min(2, shape.text - 1)  # a prompt ends with text
        self._pixels = np.repeat(probe.pixel_values, shape.images, axis=0) if shape.images else None
        self._prompt = lay_out(
            [*words[:before], *[model.tokens.image_token_id] * shape.images, *words[before:]],
            image_token=model.tokens.image_token,
            image_token_id=model.tokens.image_token_id,
            num_images=shape.images,
            tokens_per_image=manifest.schedule.entering(model.vision.tokens_per_image),
        )
        self._layers = np.asarray([stage.num_layers for stage in manifest.schedule.stages], dtype=np.int64)
        row_bytes = backend.cache_bytes / int(self._layers @ np.asarray(manifest.cache_rows, dtype=np.int64))
        self._row_bytes = row_bytes  # of one row in one layer, whatever the caches' dtype
        self.kv_bytes = 0

    def run(self) -> Sample:
        """One repetition from empty caches; afterwards `kv_bytes` are what the prompt fills."""
        backend, positions = self._backend, self._positions
        sample: Sample = {}
        self._empty()
        start = mark = time.perf_counter()
        visual = None
        if self._pixels is not None:
            visual = backend.encode(self._pixels)
            sample["vision_ms"] = _since(mark)
        inputs = positions.inputs(self._prompt, visual, backend.lengths)
        shift = positions.shift(visual)
        mark = time.perf_counter()
        outputs = backend.step(inputs)
        sample["prefill_ms"] = _since(mark)
        self.kv_bytes = round(self._row_bytes * int(self._layers @ backend.lengths))
        decode = 0.0
        for _ in range(self._shape.tokens):
            token = Layout.of_text([int(outputs.logits[0].argmax())])
            mark = time.perf_counter()
            outputs = backend.step(positions.inputs(token, None, backend.lengths, shift=shift))
            decode += _since(mark)
        sample["decode_ms"] = decode / self._shape.tokens
        sample["end_to_end_ms"] = _since(start)
        return sample

    def _empty(self) -> None:
        """Empty caches, and the tier that this is of: others may run on the same engine."""
        if self._tier:
            self._backend.use(self._tier)
        else:
            self._backend.reset()


def check_capacity(manifest: Manifest, shape: Shape) -> None:
    """Refuse what does not fit the bundle's caches, before anything is loaded. Raises UserError."""
    capacity = manifest.capacity
    if shape.text + shape.tokens > capacity.max_text:
        raise UserError(
            f"{shape.text} text and {shape.tokens} decoded tokens do not fit {manifest.routing}, whose caches hold "
            f"{capacity.max_text}",
            hint="give less --text or --tokens, or export with a larger --max-text",
        )
    if shape.images > capacity.max_images:
        raise UserError(
            f"{shape.images} images do not fit {manifest.routing}, which holds {capacity.max_images}",
            hint="give less --images, or export with a larger --max-images",
        )


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
