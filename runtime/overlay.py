"""What became of every visual token of one image in each stage: the one description behind all pictures of a route.

`picture` draws it as a PNG, `page` as an HTML page. Visual tokens lie on the crop that the image processor makes, so
pictures show that crop, not the whole image.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from reroute.manifest import Boxes, Manifest
from reroute.runtime.answer import Answer
from reroute.runtime.image import ImageInput, crop, open_image

Box = tuple[float, float, float, float]

# Outlines of tokens that ran, of those that came back, and of the answered box, in every picture.
RAN_COLOUR, BACK_COLOUR, BOX_COLOUR = (59, 130, 246), (236, 0, 140), (22, 163, 74)

_NUMBER = r"(\d*\.\d+|\d+)"
# Two corners, in brackets of any kind: `[12, 30, 50, 61]`, `(12,30),(50,61)`; the 2 of a key `bbox_2d` is not a number.
_CORNERS = re.compile(r"(?<![\w.])" + r"\s*[)\]]?\s*,\s*[(\[]?\s*".join([_NUMBER] * 4))
_FOUR = re.compile(r"(?<![\d.])" + r"[\s,]+".join([_NUMBER] * 4) + r"(?![\d]|\.\d)")


class Fate(enum.IntEnum):
    """What a visual token does in a stage."""

    RAN = 0
    BACK = 1  # ran, and had not in the stage before
    WAITING = 2  # did not run; unchanged, and may come back (reroute)
    GONE = 3  # removed for good (removal)
    DROPPED = 4  # never entered the decoder


def parse_box(text: str, boxes: Boxes = "shares", size: tuple[int, int] = (1000, 1000)) -> Box | None:
    """Box in an answer: (x1, y1, x2, y2) as shares 0..1 of the sides of what the model saw, or None.

    Args:
        text: the answer.
        boxes: how the model writes them, see `reroute.manifest.Model`.
        size: with pixels: (width, height) of the resized image, which is what they are pixels of.

    Pixels and thousandths (Qwen-VL: `{"bbox_2d": [12, 30, 50, 61]}`, `(12,30),(50,61)`): the first four numbers that
    are two corners. Shares: four decimals are shares already (LLaVA: `[0.12, 0.3, 0.5, 0.61]`); four integers 0..99 are
    hundredths of the side (the demo: `12 30 50 61`); more or fewer than four numbers are None. A box without area is
    None.
    """
    if boxes != "shares":
        width, height = size if boxes == "pixels" else (1000, 1000)
        corners = _CORNERS.search(text)
        if corners is None:
            return None
        x1, y1, x2, y2 = (
            float(value) / side for value, side in zip(corners.groups(), (width, height) * 2, strict=True)
        )
        return (x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None
    match = _FOUR.search(text)
    if match is None or len(re.findall(_NUMBER, text)) != 4:
        return None
    whole = all(part.isdigit() for part in match.groups())
    values = [float(part) for part in match.groups()]
    if whole and max(values) <= 1:
        whole = False  # "0 0 1 1" can only mean the whole image
    limit = 99 if whole else 1
    if max(values) > limit:
        return None
    x1, y1, x2, y2 = (v / 100 if whole else v for v in values)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage that has layers.

    Attributes:
        index: number of the stage; 0 is before the first decision.
        start, stop: its layers, `start` to `stop - 1`.
        next_decision: layer of the decision after it, or None.
        fates: int64 [rows, columns] of `Fate`.
    """

    index: int
    start: int
    stop: int
    next_decision: int | None
    fates: np.ndarray

    def count(self, fate: Fate) -> int:
        """Tokens of exactly this fate."""
        return int((self.fates == fate).sum())

    @property
    def ran(self) -> int:
        """Tokens that ran, those that came back among them."""
        return self.count(Fate.RAN) + self.count(Fate.BACK)

    @property
    def share(self) -> float:
        """Tokens that ran as a share of the image's tokens, 0..1."""
        return self.ran / self.fates.size

    @property
    def title(self) -> str:
        """`stage 2 · layers 7-14`."""
        last = self.stop - 1
        layers = f"layer {last}" if self.start == last else f"layers {self.start}-{last}"
        return f"stage {self.index} \N{MIDDLE DOT} {layers}"

    @property
    def counts(self) -> list[tuple[Fate, str]]:
        """A short phrase for each fate that occurs; those that came back also as 0, where some could have."""
        phrases = {
            Fate.RAN: f"{self.ran} of {self.fates.size} ran",
            Fate.BACK: f"{self.count(Fate.BACK)} came back",
            Fate.WAITING: f"{self.count(Fate.WAITING)} waited",
            Fate.GONE: f"{self.count(Fate.GONE)} gone for good",
            Fate.DROPPED: f"{self.count(Fate.DROPPED)} dropped",
        }
        could_return = self.index > 1 and self.count(Fate.WAITING) > 0
        shown = {Fate.RAN: True, Fate.BACK: could_return}
        return [(fate, text) for fate, text in phrases.items() if shown.get(fate) or self.count(fate)]

    @property
    def caption(self) -> str:
        """The stage in whole sentences."""
        text = f"{self.ran} of {self.fates.size} tokens ran ({_percent(self.share)} %)"
        if back := self.count(Fate.BACK):
            text += f"; {'all' if back == self.ran else back} of them came back after waiting in the stage before"
        text += "."
        if waiting := self.count(Fate.WAITING):
            until = "to the end" if self.next_decision is None else f"and compete again at layer {self.next_decision}"
            text += f" {waiting} waited: they stay unchanged {until}."
        if gone := self.count(Fate.GONE):
            text += f" {gone} were removed: they are gone for good."
        if dropped := self.count(Fate.DROPPED):
            text += f" {dropped} were dropped before the decoder."
        return text


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """The crop that the model saw, the answered box and every stage that has layers.

    Attributes:
        shown: RGB crop.
        box: the answered box as shares of the crop's sides, or None.
        grid: (rows, columns) of visual tokens.
        stages: in order; a stage 0 without layers is left out.
    """

    shown: Image.Image
    box: Box | None
    grid: tuple[int, int]
    stages: tuple[StageView, ...]


def overlay(image: ImageInput, answer: Answer, manifest: Manifest, *, image_index: int = 0) -> Overlay:
    """Work out what each token of an image did.

    Args:
        image: the image that was asked about.
        answer: its answer.
        manifest: of the bundle that answered.
        image_index: which of the answer's images `image` is.
    """
    model, schedule = manifest.model, manifest.schedule
    grids = [view.grid for view in answer.views] or [model.vision.grid] * (image_index + 1)
    rows, columns = grids[image_index]
    # Indices count on from image to image.
    own = np.arange(rows * columns) + sum(high * wide for high, wide in grids[:image_index])
    entered = np.isin(own, answer.entered)
    ran = [entered, *(np.isin(own, route) for route in answer.routes)]
    left_out = Fate.GONE if schedule.action == "removal" else Fate.WAITING
    views: list[StageView] = []
    for index, stage in enumerate(schedule.stages):
        if stage.num_layers == 0:
            continue
        before = ran[max(0, index - 1)]
        fates = np.select(
            [ran[index] & before, ran[index], entered], [Fate.RAN, Fate.BACK, left_out], default=Fate.DROPPED
        )
        view = StageView(
            index=index,
            start=stage.start,
            stop=stage.stop,
            next_decision=stage.stop if index + 1 < len(schedule.stages) else None,
            fates=fates.reshape(rows, columns),
        )
        views.append(view)
    shown = crop(open_image(image), model.image, (rows, columns))
    box = parse_box(answer.text, model.boxes, shown.size)
    return Overlay(shown=shown, box=box, grid=(rows, columns), stages=tuple(views))
