"""What a session hands back: tokens as they come, then the finished answer with its routes and timings."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from reroute.manifest import Grid
from reroute.runtime.text import Token


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall times of one answer. Loading, the template and the tokenizer are in none of them.

    Attributes:
        image_ms: reading (files: decoding) and preprocessing the images.
        vision_ms: the vision graph.
        prefill_ms: the decoder's first step, from host arrays (binding included) to logits.
        decode_ms: all later steps, each with choosing and decoding its token; the caller's time between
            tokens of a stream is not counted.
        prefill_tokens: text and visual tokens of the first step.
        decode_tokens: number of later steps: one less than the sampled tokens, whose first belongs to the
            prefill.
        images_reused: images whose features were there already; `vision_ms` is only the time to find them.
    """

    image_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    prefill_tokens: int
    decode_tokens: int
    images_reused: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens, visual ones included, per second of prefill."""
        return 1000 * self.prefill_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode steps per second; 0 when the answer has one token."""
        return 1000 * self.decode_tokens / self.decode_ms if self.decode_ms else 0.0


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image was seen.

    Attributes:
        original: (width, height) of the image.
        pixels: (width, height) that the tower was given, after resizing and cropping.
        grid: (rows, columns) of visual tokens.
        choices: grids that the bundle has.
    """

    original: tuple[int, int]
    pixels: tuple[int, int]
    grid: Grid
    choices: int = 1

    def __str__(self) -> str:
        """`640 x 480 pixels, seen as 756 x 560: 20 x 27 visual tokens`."""
        (width, height), (seen_width, seen_height), (rows, columns) = self.original, self.pixels, self.grid
        seen = f"seen as {seen_width} x {seen_height}"
        return f"{width} x {height} pixels, {seen}: {rows} x {columns} visual tokens"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the pieces of the stream joined.
        token_ids: what was sampled; with `stop_reason` "eos" the last one is the end token.
        stop_reason: "eos", "length" (`max_new_tokens`, or the room left in the caches) or "stop" (a stop
            string).
        routes: for each routed stage, ascending int64 places on the grid, row-major, of the question's visual tokens
            that ran there (several images count on from image to image). Empty arrays without an image; no entry for
            a dense bundle.
        entered: the same for the tokens that entered the decoder: all, unless the vision graph dropped some (Nüwa).
        prompt_tokens: text tokens run for the question, with the template's.
        visual_tokens: visual tokens of the question's images that entered the decoder.
        timings: see `Timings`.
        views: how each of the question's images was seen.
        prefix_tokens: text tokens in front of those, taken from a saved prefix and not run.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: str
    routes: tuple[np.ndarray, ...]
    entered: np.ndarray
    prompt_tokens: int
    visual_tokens: int
    timings: Timings
    views: tuple[View, ...] = ()
    prefix_tokens: int = 0


class AnswerStream(Iterator[Token]):
    """The tokens of an answer as they come; `answer` is there when they have ended.

    Leaving a stream early is fine: the session keeps what ran so far as the answer.
    """

    def __init__(self, tokens: Generator[Token, None, Answer]) -> None:
        self._tokens = tokens
        self._answer: Answer | None = None

    def __next__(self) -> Token:
        try:
            return next(self._tokens)
        except StopIteration as stop:
            self._answer = self._answer or stop.value
            raise StopIteration from None

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises RuntimeError while tokens are left."""
        if self._answer is None:
            raise RuntimeError("the stream has not ended")
        return self._answer
