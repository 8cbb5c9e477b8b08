"""Ask bundles the questions of a set: image by image, each image encoded once for every distinct vision part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from reroute.evaluation.questions import Question, QuestionSet, Writing
from reroute.evaluation.records import Record, decisions_of, share_of
from reroute.evaluation.regions import size_of, tokens_in
from reroute.manifest import Manifest, Model
from reroute.runtime import Answer, Bundle

# Bundles are open at the same time, and share rendered images and visual features, as long as their files together
# are no larger; a larger bundle runs alone. Features are not kept: encoding again is cheaper than holding them all.
TOGETHER_BYTES = 2 << 30


class Engine(Protocol):
    """What the runner needs of a `reroute.runtime.Session`."""

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        ...

    @property
    def backend(self) -> Any:
        """Its `lengths` are the cache rows of each stage, and `describe()` says what it is."""
        ...

    @property
    def cache_bytes_used(self) -> int:
        """Bytes of the cache rows that are filled."""
        ...

    def encode(self, image: Any) -> Any:
        """Visual features of an image, which `ask` of any engine with the same vision part takes in its place."""
        ...

    def ask(self, prompt: str, image: Any, *, max_new_tokens: int) -> Answer:
        """Ask greedily."""
        ...

    def reset(self, tier: str | None = None) -> None:
        """Forget the dialogue; go on in a tier of the bundle."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """A bundle and what it made of the questions, in their order."""

    bundle: Bundle
    engine: dict[str, str]
    records: tuple[Record, ...]


def run_bundles(
    bundles: Sequence[Bundle],
    questions: QuestionSet,
    *,
    open_engine: Callable[[Bundle], Engine],
    advance: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Ask every bundle every question.

    Args:
        bundles: to ask; the result has their order.
        questions: of one set.
        open_engine: loads a bundle.
        advance: called after every answer.

    Raises:
        UserError: a bundle cannot be loaded, an image is unusable, or a prompt does not fit a bundle's caches.
    """
    runs: list[Run] = []
    for group in groups(bundles):
        with ExitStack() as stack:
            engines: list[Engine] = []
            for bundle in group:
                # Tiers of a bundle share an engine, which changes to the tier of each question's turn.
                same = [engine for other, engine in zip(group, engines, strict=False) if _shared(other, bundle)]
                engines.append(same[0] if same else stack.enter_context(closing(open_engine(bundle))))
            records: list[list[Record]] = [[] for _ in group]
            for key, asked in groupby(questions, key=lambda question: question.image):
                image = questions.image(key)
                features: dict[Any, Any] = {}
                about = list(asked)
                for bundle, engine, own in zip(group, engines, records, strict=True):
                    vision = (bundle.vision_sha256, bundle.manifest.model.image)
                    if vision not in features:
                        features[vision] = engine.encode(image)
                    for question in about:
                        engine.reset(bundle.manifest.tier or None)
                        answer = engine.ask(question.prompt, features[vision], max_new_tokens=questions.max_new_tokens)
                        own.append(record_of(engine, questions, question, answer, image.size))
                        advance()
            for bundle, engine, own in zip(group, engines, records, strict=True):
                runs.append(Run(bundle=bundle, engine=engine.backend.describe(), records=tuple(own)))
    return runs


def groups(bundles: Iterable[Bundle], limit: int = TOGETHER_BYTES) -> Iterator[list[Bundle]]:
    """Neighbouring bundles whose files together have at most `limit` bytes; a larger bundle alone."""
    group: list[Bundle] = []
    held = 0
    for bundle in bundles:
        size = sum(file.bytes for file in bundle.manifest.files.values())
        if any(_shared(other, bundle) for other in group):
            size = 0
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(bundle)
        held += size
    if group:
        yield group


def _shared(one: Bundle, other: Bundle) -> bool:
    """Whether two are tiers of one bundle."""
    return one.path == other.path and bool(one.manifest.tiers)


def record_of(
    engine: Engine, questions: QuestionSet, question: Question, answer: Answer, size: tuple[int, int]
) -> Record:
    """Grade an answer and follow the object's tokens; `engine` still holds the caches of that answer."""
    manifest = engine.manifest
    text = answer.text.strip()
    grade = questions.grade(question, text, writing_of(manifest.model, answer))
    region = tokens_in(question.box, size, manifest.model) if question.box is not None else None
    text_rows = answer.prompt_tokens + answer.timings.decode_tokens
    return Record(
        id=question.id,
        image=question.image,
        skill=question.skill,
        kind=question.kind,
        size=size_of(question.box) if question.skill == "grounding" and question.box is not None else None,
        answer=text,
        score=grade.score,
        iou=grade.iou,
        box=grade.box,
        entered=share_of(region, answer.entered),
        decisions=decisions_of(manifest.schedule, answer.entered, answer.routes, region),
        rows=tuple(int(rows) - text_rows for rows in np.asarray(engine.backend.lengths)),
        kv_bytes=engine.cache_bytes_used,
    )


def writing_of(model: Model, answer: Answer) -> Writing | None:
    """How the boxes of an answer about one image are written; None for shares, which the sets read by themselves."""
    return None if model.boxes == "shares" else Writing(boxes=model.boxes, size=answer.views[0].pixels)
