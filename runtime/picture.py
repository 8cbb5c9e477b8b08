"""A route as one picture (PNG): the answer, then a panel for each stage."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reroute.manifest import Manifest
from reroute.runtime.answer import Answer
from reroute.runtime.image import ImageInput
from reroute.runtime.overlay import BACK_COLOUR, BOX_COLOUR, RAN_COLOUR, Box, Fate, StageView, overlay

_PANEL = 480  # pixels of a panel's longer side, as near as whole tokens allow
_GAP, _CAPTION = 20, 50
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 28, 36), (92, 100, 112)
_SHADE = (30, 34, 46)
# How much of a token that did not run is left over the shade.
_LEFT = {Fate.WAITING: 0.35, Fate.GONE: 0.12, Fate.DROPPED: 0.12}

# A panel, its title, and below the title phrases with the fate that they are about.
_Panel = tuple[Image.Image, str, list[tuple[Fate | None, str]]]


def route_picture(image: ImageInput, answer: Answer, manifest: Manifest, *, image_index: int = 0) -> Image.Image:
    """Draw the image with the answered box and, for each stage, the tokens that ran in it.

    A thin blue outline is around tokens that ran, a magenta one around those that ran here and not in the stage
    before: they came back. (In stage 1, which follows a stage where all run, none can.) Tokens that wait are dimmed,
    those that were removed for good are nearly black, and those that never entered the decoder are hatched. A green
    line is the answered box.

    Args:
        image: the image that was asked about.
        answer: its answer.
        manifest: of the bundle that answered.
        image_index: which of the answer's images `image` is.

    Returns:
        An RGB picture, panels left to right in at most two rows.
    """
    view = overlay(image, answer, manifest, image_index=image_index)
    rows, columns = view.grid
    cell = max(4, round(_PANEL / max(rows, columns)))
    shown = view.shown.resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)
    box = _corners(view.box, shown.size)
    panels: list[_Panel] = [(_answer_panel(shown, box), "answer", [(None, _shorten(answer.text))])]
    for stage in view.stages:
        panels.append((_stage_panel(shown, stage, cell, box), stage.title, list(stage.counts)))
    return _lay_out(panels, shown.size)


def _shorten(text: str, limit: int = 56) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _corners(box: Box | None, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    if box is None:
        return None
    (width, height), (x1, y1, x2, y2) = size, box
    return round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)


def _answer_panel(shown: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    panel = shown.copy()
    if box is not None:
        draw = ImageDraw.Draw(panel)
        x1, y1, x2, y2 = box
        draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=_PAPER, width=2)
        draw.rectangle(box, outline=BOX_COLOUR, width=3)
    return panel


def _stage_panel(shown: Image.Image, stage: StageView, cell: int, box: tuple[int, int, int, int] | None) -> Image.Image:
    if stage.share == 1:
        return _answer_panel(shown, box)
    pixels = np.asarray(shown).astype(np.float32)
    muted = (pixels + 2 * pixels.mean(axis=2, keepdims=True)) / 3
    fates = np.kron(stage.fates, np.ones((cell, cell), dtype=np.int64))[..., None]
    for fate, left in _LEFT.items():
        dim = left * muted + (1 - left) * np.asarray(_SHADE, dtype=np.float32)
        pixels = np.where(fates == fate, dim, pixels)
    panel = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    # Those that came back are drawn last, over their neighbours' lines.
    for fate in (Fate.DROPPED, Fate.RAN, Fate.BACK):
        for row, column in np.argwhere(stage.fates == fate).tolist():
            _mark(draw, fate, column * cell, row * cell, cell)
    if box is not None:
        draw.rectangle(box, outline=BOX_COLOUR, width=2)
    return panel


def _mark(draw: ImageDraw.ImageDraw, fate: Fate, x: int, y: int, cell: int) -> None:
    """The line that tells a fate besides the shade."""
    corners = (x, y, x + cell - 1, y + cell - 1)
    if fate is Fate.DROPPED:
        draw.line((x, y + cell - 1, x + cell - 1, y), fill=_FAINT)
    elif fate is Fate.BACK:
        draw.rectangle(corners, outline=BACK_COLOUR, width=max(2, cell // 8))
    elif fate is Fate.RAN:
        draw.rectangle(corners, outline=RAN_COLOUR)


def _lay_out(panels: list[_Panel], size: tuple[int, int]) -> Image.Image:
    per_row = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    lines = -(-len(panels) // per_row)
    width, height = size[0] + _GAP, size[1] + _CAPTION + _GAP
    picture = Image.new("RGB", (per_row * width + _GAP, lines * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    title = ImageFont.load_default(size=18)
    for index, (panel, heading, phrases) in enumerate(panels):
        left, top = _GAP + index % per_row * width, _GAP + index // per_row * height
        picture.paste(panel, (left, top + _CAPTION))
        draw.text((left, top), heading, font=title, fill=_INK)
        _legend(draw, phrases, left, top + 24, size[0])
    return picture


def _legend(draw: ImageDraw.ImageDraw, phrases: list[tuple[Fate | None, str]], x: int, y: int, width: int) -> None:
    """The phrases in one line, as large as fits, each behind a swatch where tokens are told apart."""
    swatch, gap = (18, 14) if len(phrases) > 1 else (0, 0)

    def length(text: str, size: int) -> int:
        return swatch + round(draw.textlength(text, ImageFont.load_default(size=size))) + gap

    sizes = (size for size in range(16, 9, -1) if sum(length(text, size) for _, text in phrases) - gap <= width)
    size = next(sizes, 9)
    for fate, text in phrases:
        if fate is not None and swatch:
            _swatch(draw, fate, x, y + 4)
        draw.text((x + swatch, y + (16 - size) // 2), text, font=ImageFont.load_default(size=size), fill=_FAINT)
        x += length(text, size)


def _swatch(draw: ImageDraw.ImageDraw, fate: Fate, x: int, y: int, side: int = 13) -> None:
    """A small token of the fate: with the phrase beside it the picture's legend."""
    left = _LEFT.get(fate, 1.0)
    fill = tuple(round(left * 236 + (1 - left) * shade) for shade in _SHADE)
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill=fill)
    _mark(draw, fate, x, y, side)
