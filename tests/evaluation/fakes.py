"""Records by hand, and an engine that answers from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from reroute.boxes import iou
from reroute.evaluation.questions import Grade, Question, Writing
from reroute.evaluation.records import Decision, Record
from reroute.evaluation.runner import Run
from reroute.manifest import File, Manifest
from reroute.runtime import Answer, Bundle, Timings
from tests.runtime.fakes import VISUAL, make_manifest

WHOLE = (0.0, 0.0, 1.0, 1.0)


def record(number: int, **values: Any) -> Record:
    """A record of a grounding question about an image of its own."""
    given: dict[str, Any] = {
        "id": str(number),
        "image": str(number),
        "skill": "grounding",
        "kind": "where",
        "size": "small",
        "answer": "",
        "score": 1.0,
        "iou": 1.0,
        "box": WHOLE,
        "entered": 1.0,
        "decisions": (),
        "rows": (VISUAL,),
        "kv_bytes": 1,
    }
    if values.get("skill") == "vqa":
        given |= {"kind": "count", "size": None, "iou": None, "box": None, "entered": None}
    return Record(**given | values)


def decision(layer: int, **values: Any) -> Decision:
    """A decision that kept everything."""
    return Decision(**{"layer": layer, "kept": VISUAL, "returned": 0, "recovered": 0, "share": 1.0} | values)


def bundle_of(
    routing: str = "dense", *, path: str = "bundle", vision: str = "a", size: int = 1, checkpoint: str = "0"
) -> Bundle:
    """A bundle that is nowhere on disk: 6 layers, 4 x 4 visual tokens."""
    files = {"vision.onnx": File(bytes=size, sha256=vision), "decoder.onnx": File(bytes=size, sha256=routing)}
    manifest = make_manifest(files=files, routing=routing)
    manifest = replace(manifest, checkpoint_sha256=checkpoint)
    return Bundle(path=Path(path), manifest=manifest)


def run_of(records: Sequence[Record], routing: str = "dense", **values: Any) -> Run:
    """What a bundle made of its questions."""
    return Run(bundle=bundle_of(routing, **values), engine={}, records=tuple(records))


class FakeEngine:
    """Answers with `reply(prompt)`; stage s keeps the first K_s visual tokens, and `log` says what was called."""

    def __init__(self, bundle: Bundle, reply: Callable[[str], str], log: list[tuple[str, ...]]) -> None:
        self.bundle, self.reply, self.log = bundle, reply, log
        self.lengths = np.zeros(len(self.manifest.schedule.stages), dtype=np.int32)
        self.closed = False

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def backend(self) -> Any:
        return SimpleNamespace(lengths=self.lengths, describe=lambda: {"engine": "fake"})

    @property
    def cache_bytes_used(self) -> int:
        return int(self.lengths.sum()) * 10

    def encode(self, image: Any) -> Any:
        self.log.append((str(self.bundle.path), "encode", str(image.getpixel((0, 0)))))
        return f"features of {image.getpixel((0, 0))}"

    def ask(self, prompt: str, image: Any, *, max_new_tokens: int) -> Answer:
        assert not self.closed
        assert not self.lengths.any(), "the session was not reset"
        self.log.append((str(self.bundle.path), "ask", prompt, image, str(max_new_tokens)))
        stages = self.manifest.schedule.stages
        # 7 text rows in front, and 2 decode steps behind.
        self.lengths += np.asarray([7 + stage.visual_rows(VISUAL) + 2 for stage in stages], dtype=np.int32)
        routes = tuple(np.arange(stage.visual_rows(VISUAL)) for stage in stages[1:])
        return Answer(
            text=f" {self.reply(prompt)} ",
            token_ids=(1, 2, 3),
            stop_reason="eos",
            routes=routes,
            entered=np.arange(VISUAL),
            prompt_tokens=7,
            visual_tokens=VISUAL,
            timings=Timings(
                image_ms=0.0,
                vision_ms=0.0,
                prefill_ms=0.0,
                decode_ms=0.0,
                prefill_tokens=7 + VISUAL,
                decode_tokens=2,
            ),
        )

    def reset(self, tier: str | None = None) -> None:
        self.bundle = self.bundle.at(tier)
        self.lengths[:] = 0

    def close(self) -> None:
        self.closed = True


class FakeSet:
    """Images whose first pixel is their number; an answer is right when it is the prompt."""

    name = "fake"
    max_new_tokens = 5

    def __init__(self, images: Sequence[int]) -> None:
        self.opened: list[str] = []
        self._questions = [
            Question(id=str(n), image=str(image), skill="vqa", kind="echo", prompt=f"q{n}", answers=(f"q{n}",))
            for n, image in enumerate(images)
        ]
        self._questions[0] = replace(self._questions[0], skill="grounding", kind="where", answers=(), box=WHOLE)

    def __len__(self) -> int:
        return len(self._questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._questions)

    def image(self, key: str) -> Image.Image:
        self.opened.append(key)
        return Image.new("L", (32, 32), int(key))

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        if question.skill == "grounding" and question.box is not None:
            return Grade(score=1.0, iou=iou(question.box, WHOLE), box=WHOLE)
        return Grade(score=float(answer in question.answers))
