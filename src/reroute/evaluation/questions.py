"""What an evaluation asks: questions with their true answers, whatever set they come from.

Boxes here are always (x1, y1, x2, y2) as fractions 0..1 of the image's own width and height; what a model writes is
turned into that by the set, which knows its protocol, and for models that write no shares is told how they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from reroute.manifest import Boxes

Box = tuple[float, float, float, float]
Skill = Literal["grounding", "vqa"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image.

    Attributes:
        id: unique within its set.
        image: the set's key of the image; questions about one image follow each other, so that it is encoded once.
        skill: "grounding" is scored by IoU with `box`, "vqa" by `QuestionSet.grade`.
        kind: group of the report, for example "where", "count", or a split's name.
        prompt: what the user asks, without image placeholders.
        answers: accepted answers; empty for grounding.
        box: of the object asked about: the truth of grounding, and for any question the region whose tokens the
            report follows through the decisions. None where there is no single region.
    """

    id: str
    image: str
    skill: Skill
    kind: str
    prompt: str
    answers: tuple[str, ...] = ()
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Grade:
    """How an answer was judged: `score` 0..1, and for grounding the box that was read and its IoU (0 without a box)."""

    score: float
    iou: float | None = None
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How the boxes of an answer are written.

    Attributes:
        boxes: their unit, see `reroute.manifest.Model`.
        size: (width, height) of the image that the tower was given, which pixels are of.
    """

    boxes: Boxes
    size: tuple[int, int]


class QuestionSet(Protocol):
    """Questions in a fixed order, their images, and the protocol's judge."""

    @property
    def name(self) -> str:
        """For reports, for example "scenes/heldout" or "refcoco/val"."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer that the protocol allows."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Question]: ...

    def image(self, key: str) -> Image.Image:
        """The image of a question, as the protocol shows it to the model. Raises UserError."""
        ...

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """Judge one answer; never raises for what a model wrote. `writing` is None for boxes in the protocol's form."""
        ...
