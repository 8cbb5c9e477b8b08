"""A dialogue with an engine bundle."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from reroute.errors import UserError
from reroute.runtime import chat as messages
from reroute.runtime.answer import Answer, AnswerStream, Timings, View
from reroute.runtime.backend import Backend, BackendOptions, StepOutputs, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.features import DEFAULT_MIB, FeatureCache, Features, see
from reroute.runtime.layout import Layout, lay_out, rows_added
from reroute.runtime.positions import Positions, VisualTokens
from reroute.runtime.prefix import AGAIN, Prefix
from reroute.runtime.sampling import Sampler, Sampling
from reroute.runtime.text import Token, Writer

if TYPE_CHECKING:
    from reroute.runtime.image import ImageInput

Images: TypeAlias = "ImageInput | Sequence[ImageInput] | Features | None"


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A question that fits: everything known before anything runs."""

    number: int
    layout: Layout
    images: list[np.ndarray] | VisualTokens  # float32 [3, H, W] each, or encoded before
    views: tuple[View, ...]
    image_ms: float
    messages: tuple[messages.Message, ...]
    max_new_tokens: int
    prefix_tokens: int = 0


class Session:
    """A dialogue: questions, images and answers whose keys and values stay in the engine's caches.

    State (caches, history) changes only by steps that succeeded, so that after an error the next question
    still works. Not for use from several threads.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, image_cache_mib: float = DEFAULT_MIB) -> None:
        """Use `Session.open`; this constructor takes a backend that is already there."""
        self._features = FeatureCache(image_cache_mib)
        self.bundle = bundle
        self.manifest = bundle.manifest  # both in the tier in use
        self._backend: Backend | None = backend
        self._chat = bundle.chat()
        self._positions = Positions(self.manifest)
        self._turns = 0  # counts resets too: a stream of an earlier state notices
        self.reset()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        tier: str | None = None,
        threads: int | None = None,
        provider: str = "cpu",
        spinning: bool = False,
        verify: bool = True,
        image_cache_mib: float = DEFAULT_MIB,
    ) -> Session:
        """Check and load a bundle.

        Args:
            path: the bundle's folder.
            tier: of a bundle with several, the one to begin in; None for its default.
            threads: CPU threads, None for the engine's choice.
            provider: of ONNX Runtime, see `BackendOptions`.
            spinning: let threads spin between runs too (see `BackendOptions`).
            verify: hash the files first.
            image_cache_mib: MiB of features of the last images to keep, so that an image asked about again is not
                encoded again; 0 for none.

        Raises:
            UserError: whatever is wrong with the bundle or the engine library.
        """
        options = BackendOptions(threads=threads, provider=provider, spinning=spinning)
        bundle = Bundle.open(path, verify=verify).at(tier)
        return cls(bundle, open_backend(bundle, options), image_cache_mib=image_cache_mib)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine, its caches and the kept features; the session cannot be used any more."""
        self._backend = None
        self._features.clear()

    @property
    def tier(self) -> str:
        """The tier in use; empty for a bundle without tiers."""
        return self.manifest.tier

    def reset(self, tier: str | None = None, *, prefix: Prefix | None = None, system: str | None = None) -> None:
        """Forget the dialogue: the next question is the first one. Features of images are kept.

        Args:
            tier: the tier of the next dialogue, without loading anything; None for the same as before.
            prefix: start behind these rows, which are copied into the caches: nothing is run.
            system: start with this system text, which is run with the first question as one prompt. A prefix has its
                own.

        Raises:
            UserError: an unknown tier, a prefix of another engine or tier, or the chat template has no place for the
                system text. The dialogue is then as it was, unless the prefix is damaged.
        """
        if prefix is not None and system is not None:
            raise UserError("a prefix has its own system text", hint="give one of the two")
        bundle = self.bundle.at(tier)
        if prefix is not None and prefix.decoder_sha256 != bundle.decoder_sha256:
            what = f" in its tier {bundle.manifest.tier}" if bundle.manifest.tiers else ""
            raise UserError(
                f"the prefix was made by another engine ({prefix.decoder_sha256[:12]}...) than this bundle's{what} "
                f"({bundle.decoder_sha256[:12]}...)",
                hint=AGAIN,
            )
        if system is not None:
            self._chat.require_system(system)
        if bundle.manifest is self.manifest:
            self.backend.reset()
        else:
            self.backend.use(bundle.manifest.tier)
            self.bundle, self.manifest = bundle, bundle.manifest
        self._prefix = prefix
        text = system if prefix is None else prefix.system
        self._messages: tuple[messages.Message, ...] = () if text is None else (messages.system_message(text),)
        self._begun = False  # whether a question was asked
        self._pending: int | None = None  # a sampled token that belongs to the dialogue but was not run yet
        self._shift = 0  # see `Positions.shift`
        self._turns += 1
        if prefix is not None:
            self._load(prefix)

    def prefix(self, system: str) -> Prefix:
        """Run what the chat template makes of a system text, for `reset(prefix=...)`; forgets the dialogue.

        Raises:
            UserError: the chat template has no place for it, it holds an image's placeholder, or it does not fit the
                caches.
        """
        ids, cut = self._chat.system_prefix(system)
        tokens = self.manifest.model.tokens
        if tokens.image_token_id in ids:
            raise UserError(
                f"the system text holds {tokens.image_token}, but a prefix is text only",
                hint="leave it out, and give the image with a question",
            )
        self.reset()
        layout = Layout.of_text(ids)
        self._room_after(layout)
        try:
            self._step(layout, None)
            layers = range(self.manifest.model.text.num_layers)
            pairs = [self.backend.cache(layer) for layer in layers]
            return Prefix(
                system=system,
                token_ids=tuple(ids),
                cut=cut,
                lengths=self.backend.lengths,
                shift=self._shift,
                caches=tuple((np.array(key), np.array(value)) for key, value in pairs),
                decoder_sha256=self.bundle.decoder_sha256,
            )
        finally:
            self.reset()

    def _load(self, prefix: Prefix) -> None:
        try:
            self.backend.load(prefix.caches, prefix.lengths)
        except ValueError as error:
            self.reset()
            raise UserError(f"the prefix does not fit the engine's caches: {error}", hint=AGAIN) from error
        self._shift = prefix.shift

    def encode(self, image: ImageInput | Sequence[ImageInput]) -> Features:
        """Run the vision graph alone; the dialogue is untouched. Arguments and errors as in `stream`."""
        images = _as_list(image)
        if not images:
            raise UserError("there is no image to encode", hint="give a path, a Pillow image or a uint8 array")
        pixels, views = see(images, self.manifest.model)
        visual, _ = self._features.encode(pixels, self.backend.encode)
        return Features(visual=visual, vision_sha256=self.bundle.vision_sha256, views=views)

    def _visual(self, images: list[np.ndarray] | VisualTokens) -> tuple[VisualTokens | None, int]:
        """Visual tokens of a turn's images, and of how many images they were there already."""
        if isinstance(images, VisualTokens):
            return images, images.num_images
        return self._features.encode(images, self.backend.encode) if images else (None, 0)

    @property
    def backend(self) -> Backend:
        """The engine. Raises RuntimeError after `close`."""
        if self._backend is None:
            raise RuntimeError("the session is closed")
        return self._backend

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches at their capacity, which is what is allocated; of several tiers the one in use."""
        return self.backend.cache_bytes

    @property
    def cache_bytes_used(self) -> int:
        """Bytes of the caches' valid rows, which is what the dialogue so far needs."""
        stages = self.manifest.schedule.stages
        layers = np.asarray([stage.num_layers for stage in stages])
        capacity = int(layers @ np.asarray(self.manifest.cache_rows))
        return self.cache_bytes // capacity * int(layers @ self.backend.lengths)

    def ask(
        self,
        prompt: str,
        image: Images = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Ask and wait for the whole answer; arguments and errors as in `stream`."""
        stream = self.stream(prompt, image, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> AnswerStream:
        """Ask the next question of the dialogue. Checks everything now; runs as the stream is read.

        Args:
            prompt: the question, without placeholders.
            image: a path, a Pillow image or a uint8 array [H, W, 3], several in a list, or what `encode` made of them;
                new in this turn.
            max_new_tokens: tokens of the answer at most; less when the caches are full before.
            sampling: how tokens are chosen; None for greedy.
            stop: the answer ends in front of the first of these strings.

        Raises:
            UserError: an image or the prompt is unusable, or the prompt does not fit what is left of the
                caches.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}", hint="ask for at least 1 token")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise UserError("a stop string is empty", hint="an empty string would stop before the first token")
        turn = self._prepare(prompt, image, max_new_tokens)
        return AnswerStream(self._run(turn, Sampler(sampling or Sampling()), Writer(self._chat.tokenizer, stops)))

    def _prepare(self, prompt: str, image: Images, max_new_tokens: int) -> _Turn:
        model = self.manifest.model
        inputs = [] if isinstance(image, Features) else _as_list(image)
        count = image.visual.num_images if isinstance(image, Features) else len(inputs)
        if isinstance(image, Features) and image.vision_sha256 != self.bundle.vision_sha256:
            raise UserError(
                "these features were encoded by another vision graph than this bundle's",
                hint="encode the image with this session, or with one of a bundle of the same checkpoint",
            )
        if not prompt.strip() and not count:
            raise UserError("the prompt is empty", hint="ask a question")
        messages.require_utf8(prompt, "prompt")
        start = time.perf_counter()
        pixels, views = see(inputs, model)
        image_ms = _ms_since(start)
        images, views = (image.visual, image.views) if isinstance(image, Features) else (pixels, views)
        history = (*self._messages, messages.user_message(prompt, num_images=count))
        ids = self._chat.next_turn(history) if self._begun else self._chat.first_turn(history)
        prefix_tokens = 0
        if self._prefix is not None and not self._begun:
            ids, prefix_tokens = self._prefix.rest(ids), len(self._prefix.token_ids)
        layout = lay_out(
            ids,
            image_token=model.tokens.image_token,
            image_token_id=model.tokens.image_token_id,
            num_images=count,
            tokens_per_image=self._tokens_of(images, views),
        )
        if self._pending is not None:
            layout = layout.after(self._pending)
        return _Turn(
            number=self._turns,
            layout=layout,
            images=images,
            views=views,
            image_ms=image_ms,
            messages=history,
            # The last sampled token is not run, so an answer needs one row less than it has tokens.
            max_new_tokens=min(max_new_tokens, self._room_after(layout) + 1),
            prefix_tokens=prefix_tokens,
        )

    def _tokens_of(self, images: list[np.ndarray] | VisualTokens, views: tuple[View, ...]) -> int | list[int]:
        """Visual tokens of every image that enter the decoder, or, where images differ, of each."""
        schedule, vision = self.manifest.schedule, self.manifest.model.vision
        if not vision.grids:
            return schedule.entering(vision.tokens_per_image)
        grids = self._positions.grids(images) if isinstance(images, VisualTokens) else [view.grid for view in views]
        return [schedule.entering(rows * columns) for rows, columns in grids]

    def _room_after(self, layout: Layout) -> int:
        """Rows left in the fullest stage after a prompt. Raises UserError when the prompt does not fit."""
        schedule = self.manifest.schedule
        needed = rows_added(
            schedule, num_text=layout.num_text, num_visual=layout.num_visual, images=layout.visual_images
        )
        capacity = np.asarray(self.manifest.cache_rows)
        left = capacity - self.backend.lengths
        if (needed > left).any():
            stage = int((needed > left).argmax())
            raise UserError(
                f"the prompt ({layout.num_text} text and {layout.num_visual} visual tokens) needs "
                f"{needed[stage]} cache rows in stage {stage}; {left[stage]} of {capacity[stage]} are left",
                hint="reset the session, ask less, or export with a larger --max-text or --max-images",
            )
        return int((left - needed).min())

    def _run(self, turn: _Turn, sampler: Sampler, writer: Writer) -> Generator[Token, None, Answer]:
        if turn.number != self._turns:
            raise RuntimeError("another question was asked, or the session was reset, after this stream was made")
        self._turns += 1
        number = self._turns
        layout = turn.layout
        start = time.perf_counter()
        visual, reused = self._visual(turn.images)
        vision_ms = _ms_since(start)
        start = time.perf_counter()
        outputs = self._step(layout, visual)
        prefill_ms = _ms_since(start)
        self._shift += self._positions.shift(visual)
        reply = messages.assistant_message("")
        self._messages, self._begun = (*turn.messages, reply), True
        self._pending = None
        entered = np.zeros(0, np.int64) if visual is None else self._positions.tokens(visual)
        routes = tuple(entered[np.isin(layout.visual_slots, r[0])] for r in outputs.routes)
        routes = routes or tuple(np.zeros(0, np.int64) for _ in self.manifest.schedule.budgets)

        ends = self.manifest.model.tokens.eos_token_ids
        ids: list[int] = []
        pieces: list[str] = []
        decode_ms = 0.0
        reason = ""
        while not reason:
            start = time.perf_counter()
            if ids:
                outputs = self._decode(ids[-1])
            token, logprob = sampler.choose(outputs)
            ids.append(token)
            piece = ""
            if token in ends:
                # Not kept: where a template wants an end token after an answer, the next turn's tail has it.
                reason = "eos"
            else:
                self._pending = token
                piece = writer.push(token)
                reason = "length" if len(ids) >= turn.max_new_tokens else ""
            if reason:
                piece += writer.finish()
            if writer.stopped:
                reason = "stop"
            pieces.append(piece)
            reply["content"][0]["text"] += piece
            if len(ids) > 1:
                decode_ms += _ms_since(start)
            yield Token(id=token, text=piece, logprob=logprob)
            if number != self._turns:
                raise RuntimeError("another question was asked, or the session was reset, during this stream")
        timings = Timings(
            image_ms=turn.image_ms,
            vision_ms=vision_ms,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            prefill_tokens=layout.num_text + layout.num_visual,
            decode_tokens=len(ids) - 1,
            images_reused=reused,
        )
        return Answer(
            text="".join(pieces),
            token_ids=tuple(ids),
            stop_reason=reason,
            routes=routes,
            entered=entered,
            prompt_tokens=layout.num_text,
            visual_tokens=layout.num_visual,
            timings=timings,
            views=turn.views,
            prefix_tokens=turn.prefix_tokens,
        )

    def _decode(self, token: int) -> StepOutputs:
        """Run one sampled token."""
        outputs = self._step(Layout.of_text([token]), None)
        self._pending = None
        return outputs

    def _step(self, layout: Layout, visual: VisualTokens | None) -> StepOutputs:
        lengths = self.backend.lengths
        return self.backend.step(self._positions.inputs(layout, visual, lengths, shift=self._shift))


def _as_list(image: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if image is None:
        return []
    return list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
