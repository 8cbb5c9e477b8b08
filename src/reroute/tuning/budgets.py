"""Which questions the search may use, how many in each round, and which are kept back for the final score.

The winner is chosen by its score, so that score flatters it. What is kept back is about images that the search never
saw, and is asked once, when the choice has been made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from reroute.errors import UserError
from reroute.evaluation.questions import Grade, Question, QuestionSet, Writing

FINALISTS = 3
LEAST_FIRST = 8  # questions of the first round, where time is short


@dataclass(frozen=True, kw_only=True)
class Split:
    """Questions of one set by what they are for, in the order in which they are asked."""

    search: tuple[Question, ...]
    fresh: tuple[Question, ...]


def split(questions: QuestionSet, *, seed: int) -> Split:
    """Half of the images, drawn at random, for the search, the other half kept back.

    Raises:
        UserError: questions about a single image.
    """
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    if len(by_image) < 2:
        raise UserError(
            f"{questions.name} asks about {len(by_image)} image, which cannot be split into a search and a final score",
            hint="ask more questions, at least about two images",
        )
    images = list(by_image)
    random.Random(seed).shuffle(images)
    half = (len(images) + 1) // 2
    search, fresh = (
        tuple(question for image in part for question in by_image[image]) for part in (images[:half], images[half:])
    )
    return Split(search=search, fresh=fresh)


class Subset:
    """Some questions of a set, asked and graded as the set does."""

    def __init__(self, questions: QuestionSet, chosen: Sequence[Question]) -> None:
        self._questions, self._chosen = questions, list(chosen)

    @property
    def name(self) -> str:
        """Of the whole set."""
        return self._questions.name

    @property
    def max_new_tokens(self) -> int:
        """Of the whole set."""
        return self._questions.max_new_tokens

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._chosen)

    def image(self, key: str) -> Image.Image:
        """As the whole set."""
        return self._questions.image(key)

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """As the whole set."""
        return self._questions.grade(question, answer, writing)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of the search: `candidates` that have answered the first `questions` of the search afterwards."""

    candidates: int
    questions: int


def rounds_of(candidates: int, pool: int, first: int | None = None) -> list[Round]:
    """Halving from all candidates to at most `FINALISTS`, with twice the questions in each round.

    Args:
        candidates: that are feasible.
        pool: search questions that there are; the last rounds have no more.
        first: questions of the first round; default: so many that the last round has the whole pool.

    Raises:
        UserError: `first` exceeds the pool.
    """
    if first is not None and first > pool:
        raise UserError(
            f"a first round of {first} questions needs as many to search with, there are {pool}",
            hint="half of the images are kept back for the final score: lower --questions or ask more",
        )
    sizes = [candidates]
    while sizes[-1] > FINALISTS:
        sizes.append(math.ceil(sizes[-1] / 2))
    start = first or max(1, pool >> (len(sizes) - 1))
    return [Round(candidates=size, questions=min(pool, start << number)) for number, size in enumerate(sizes)]


def answers_of(rounds: Sequence[Round]) -> int:
    """Answers that the rounds take: each asks only what was not asked before."""
    before = [0, *(one.questions for one in rounds)]
    return sum(one.candidates * (one.questions - done) for one, done in zip(rounds, before, strict=False))


def within(seconds: float, *, candidates: int, search: int, fresh: int, per_answer: float) -> tuple[int, int]:
    """How many search and fresh questions fit, of those that there are, both scaled alike.

    Args:
        seconds: that are left.
        candidates: that are feasible.
        search: questions to search with.
        fresh: questions kept back, for the finalists and the dense engine.
        per_answer: seconds that an answer takes.

    Returns:
        Search and fresh questions. At least enough for `LEAST_FIRST` in the first round, as far as there are, and
        as many fresh ones: a search with fewer would choose by chance. It may then take longer than `seconds`.
    """
    whole = answers_of(rounds_of(candidates, search)) + fresh * (min(FINALISTS, candidates) + 1)
    share = min(1.0, max(0.0, seconds) / max(whole * per_answer, 1e-9))
    least = LEAST_FIRST << (len(rounds_of(candidates, search)) - 1)
    return max(min(least, search), int(search * share)), max(min(LEAST_FIRST, fresh), int(fresh * share))
