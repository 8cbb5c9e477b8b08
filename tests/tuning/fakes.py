"""A device whose latencies and scores are a landscape that the test chose, and questions without pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from PIL import Image

from reroute.errors import GateError
from reroute.evaluation.questions import Grade, Question, Writing
from reroute.tuning.budgets import Split, split
from reroute.tuning.screening import Runner

VISION_MS, STEPS_MS = 5.0, 20.0


class FakeDevice:
    """Prefill takes `latency(name)` ms, a question is right with probability `right(name)`.

    Questions are as hard for one candidate as for another: one is right where another one with a higher probability is,
    but for `luck`, which is how much of the probability each draws by itself.
    """

    def __init__(
        self,
        latency: Callable[[str], float],
        right: Callable[[str], float],
        *,
        noise: float = 0.0,
        luck: float = 0.0,
        seed: int = 0,
        broken: Sequence[str] = (),
        sizes: Mapping[str, int] | None = None,
        clock: list[float] | None = None,
    ) -> None:
        self._latency, self._right, self._noise, self._luck, self._seed = latency, right, noise, luck, seed
        self._broken, self._sizes = broken, dict(sizes or {})
        self.slowing = 1.0  # by how much answers get slower after the first call
        self.clock = [0.0] if clock is None else clock
        self.built: list[str] = []
        self.loads: list[list[str]] = []
        self.runs: list[tuple[tuple[str, ...], int, int]] = []
        self.times: list[float] = []  # when each call of `ask` began
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def build(self, name: str) -> None:
        self.clock[0] += 10.0
        if name in self._broken:
            raise GateError("the engine differs from the reference\nin 3 rows")
        self.built.append(name)

    def memory_bytes(self, name: str) -> int:
        return self._sizes.get(name, 1)

    @contextmanager
    def load(self, names: Sequence[str]) -> Iterator[Runner]:
        self.loads.append(list(names))

        def run(
            names: Sequence[str], *, warmup: int, rounds: int, seed: int, advance: Callable[[], None]
        ) -> dict[str, dict[str, list[float]]]:
            assert set(names) <= set(self.loads[-1])
            self.runs.append((tuple(names), warmup, rounds))
            random = np.random.default_rng([self._seed, seed])
            for _ in range(len(names) * (warmup + rounds)):
                advance()
            found = {}
            for name in names:
                prefill = self._latency(name) * random.lognormal(0, self._noise, rounds)
                found[name] = {
                    "vision_ms": [VISION_MS] * rounds,
                    "prefill_ms": prefill.tolist(),
                    "end_to_end_ms": (prefill + VISION_MS + STEPS_MS).tolist(),
                }
                self.clock[0] += float(prefill.sum()) / 1e3
            return found

        yield run

    def ask(
        self, names: Sequence[str], questions: Sequence[Question], advance: Callable[[], None]
    ) -> dict[str, list[float]]:
        self.times.append(self.clock[0])
        self.asked.append((tuple(names), tuple(question.id for question in questions)))
        slow = 1.0 if len(self.asked) == 1 else self.slowing
        self.clock[0] += 0.1 * slow * len(names) * len(questions)
        for _ in range(len(names) * len(questions)):
            advance()
        return {name: [float(self.draw(name, one) < self._right(name)) for one in questions] for name in names}

    def draw(self, name: str, question: Question) -> float:
        hard = uniform(str(self._seed), question.id)
        return (1 - self._luck) * hard + self._luck * uniform(str(self._seed), question.id, name)


def uniform(*words: str) -> float:
    """A number in 0..1 that follows from words."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:6], "big") / 2**48


class PlainSet:
    """`count` questions, three to an image, boxes and words in turn."""

    name = "plain"
    max_new_tokens = 4

    def __init__(self, count: int) -> None:
        self.questions = [
            Question(
                id=f"q{n}",
                image=f"i{n // 3}",
                skill="vqa" if n % 2 else "grounding",
                kind="any",
                prompt=f"q{n}",
            )
            for n in range(count)
        ]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def image(self, key: str) -> Image.Image:
        raise AssertionError(key)

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        raise AssertionError(question.id)


def questions(count: int = 600, seed: int = 0) -> Split:
    return split(PlainSet(count), seed=seed)


class Bars:
    """Progress bars that are counted: each must reach its total."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[int, int]] = {}

    def __call__(self, total: int, label: str) -> AbstractContextManager[Callable[[], None]]:
        return self._bar(total, label)

    @contextmanager
    def _bar(self, total: int, label: str) -> Iterator[Callable[[], None]]:
        moved = [0]

        def advance() -> None:
            moved[0] += 1

        yield advance
        self.done[label] = (moved[0], total)
