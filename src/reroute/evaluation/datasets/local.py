"""A question set read from local files: items, which are light, and images, which are read one at a time."""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image, UnidentifiedImageError

from reroute.errors import UserError, nearest
from reroute.evaluation.datasets.protocol import Canvas, Protocol
from reroute.evaluation.questions import Box, Grade, Question, Skill, Writing


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question before its image is opened.

    Attributes:
        id: of the files; `LocalSet` makes it unique.
        image: key in the set's images.
        kind: group of the report.
        prompt: what is asked.
        answers: accepted answers.
        pixels: box (x1, y1, x2, y2) in pixels of the image, for grounding.
        size: (width, height) of the image where the annotation says it; boxes are in this unit.
    """

    id: str
    image: str
    kind: str
    prompt: str
    answers: tuple[str, ...] = ()
    pixels: Box | None = None
    size: tuple[int, int] | None = None


class Images(ABC):
    """Where a set's images are."""

    @abstractmethod
    def open(self, key: str) -> Image.Image:
        """The image as stored, header read and pixels not yet. Raises UserError, naming the place."""

    @abstractmethod
    def place(self, key: str) -> str:
        """File, and row where a file has rows, for messages."""


class LocalSet(ABC):
    """What the readers share of the `QuestionSet` protocol.

    Questions keep the files' order, except that those about one image are moved up to the first of them; `limit`
    counts before that, so that it takes the same questions as elsewhere.
    """

    skill: ClassVar[Skill]
    lengths: ClassVar[Mapping[Protocol, int]]

    def __init__(
        self, items: Iterable[Item], images: Images, *, name: str, protocol: Protocol, limit: int | None = None
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"the limit is {limit}", hint="ask at least 1 question, or leave the limit out")
        by_image: dict[str, list[Item]] = {}
        for item in _first(items, limit):
            by_image.setdefault(item.image, []).append(item)
        if not by_image:
            raise UserError(f"{name} has no questions", hint="the files are empty: download them again")
        self._items = [item for group in by_image.values() for item in group]
        self._sizes = {item.image: item.size for item in self._items if item.size is not None}
        self._images = images
        self._name = name
        self._protocol: Protocol = protocol

    @property
    def name(self) -> str:
        """Dataset and split, and the protocol where it is not the paper's."""
        return self._name if self._protocol == "lmms-eval" else f"{self._name} ({self._protocol})"

    @property
    def protocol(self) -> Protocol:
        """How questions are asked and graded."""
        return self._protocol

    @property
    def max_new_tokens(self) -> int:
        """Longest answer of the protocol."""
        return self.lengths[self._protocol]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Question]:
        seen: dict[str, int] = {}
        key, size = "", (0, 0)
        for item in self._items:
            box = None
            if item.pixels is not None:
                if item.image != key:
                    key, size = item.image, item.size or self._images.open(item.image).size
                box = Canvas.of(size, self._protocol).fractions(item.pixels)
            count = seen[item.id] = seen.get(item.id, 0) + 1
            yield Question(
                id=item.id if count == 1 else f"{item.id}~{count}",
                image=item.image,
                skill=self.skill,
                kind=item.kind,
                prompt=item.prompt,
                answers=item.answers,
                box=box,
            )

    def image(self, key: str) -> Image.Image:
        """The image as the protocol shows it. Raises UserError: missing, damaged, or not of the annotated size."""
        image = self._images.open(key)
        told = self._sizes.get(key)
        if told is not None and told != image.size:
            raise UserError(
                f"{self._images.place(key)} is {image.width} x {image.height} pixels, "
                f"the annotation says {told[0]} x {told[1]}",
                hint="the boxes are in pixels of the original: use the COCO images as published",
            )
        try:
            return Canvas.of(image.size, self._protocol).show(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"the image at {self._images.place(key)} is damaged: {error}", hint="download it again"
            ) from error

    @abstractmethod
    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """Judge one answer as the protocol does."""


def open_image(source: Path | bytes, place: str) -> Image.Image:
    """Read the header of an image file or of its bytes. Raises UserError, naming `place`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except UnidentifiedImageError:
        raise UserError(f"{place} is not an image Pillow can read", hint="download it again") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image at {place}: {error}", hint="download it again") from error


def check_split(dataset: str, split: str | None, splits: Sequence[str]) -> str:
    """The split asked for, or the first. Raises UserError with the nearest match."""
    if split is None:
        return splits[0]
    if split in splits:
        return split
    # testA and testB are told apart by one letter: the same letters in another case are the nearest.
    same = next((name for name in splits if name.lower() == split.lower()), split)
    raise UserError(f"{dataset} has no split {split!r}", hint=nearest(same, splits))


def _first(items: Iterable[Item], limit: int | None) -> Iterator[Item]:
    for count, item in enumerate(items):
        if count == limit:
            return
        yield item
