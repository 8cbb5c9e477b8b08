"""Pictures of a route: which visual tokens ran in each stage, and which came back.

Visual tokens lie on the crop that the image processor makes, so the picture shows that crop, not the whole
image.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reroute.manifest import Manifest
from reroute.runtime.answer import Answer
from reroute.runtime.image import ImageInput, crop, open_image

Box = tuple[float, float, float, float]

_PANEL = 480  # pixels of a panel's longer side, as near as whole tokens allow
_GAP, _CAPTION = 20, 50
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 28, 36), (108, 116, 128)
_RAN, _BACK, _BOX = (59, 130, 246), (236, 0, 140), (22, 163, 74)
_DIM = 0.35  # how much of a token that did not run is left over the shade
_SHADE = (30, 34, 46)

_NUMBER = r"(\d*\.\d+|\d+)"
_FOUR = re.compile(r"(?<![\d.])" + r"[\s,]+".join([_NUMBER] * 4) + r"(?![\d]|\.\d)")


def parse_box(text: str) -> Box | None:
    """Box in an answer: (x1, y1, x2, y2) as shares 0..1 of the crop's sides, or None.

    Four decimals are shares already (LLaVA: `[0.12, 0.3, 0.5, 0.61]`); four integers 0..99 are hundredths of
    the side (the demo: `12 30 50 61`). A box without area, or more or fewer than four numbers, is None.
    """
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


def route_picture(image: ImageInput, answer: Answer, manifest: Manifest, *, image_index: int = 0) -> Image.Image:
    """Draw the image with the answered box and, for each stage, the tokens that ran in it.

    Tokens that did not run are dimmed; a thin blue outline is around those that ran, a magenta one around
    those that ran here and not in the stage before: they came back. (In stage 1, which follows a stage where
    all run, none can.) A green line is the answered box.

    Args:
        image: the image that was asked about.
        answer: its answer.
        manifest: of the bundle that answered.
        image_index: which of the answer's images `image` is.

    Returns:
        An RGB picture, panels left to right in at most two rows.
    """
    rows, columns = manifest.model.vision.grid
    count = rows * columns
    shown = crop(open_image(image), manifest.model.image)
    cell = max(4, round(_PANEL / max(rows, columns)))
    shown = shown.resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)

    # Stage 0 runs everything; a route's indices count on from image to image.
    ran = [np.ones((rows, columns), dtype=bool)]
    for route in answer.routes:
        own = np.isin(np.arange(count) + image_index * count, route)
        ran.append(own.reshape(rows, columns))

    box = _corners(parse_box(answer.text), shown.size)
    panels = [(_answer_panel(shown, box), "answer", _shorten(answer.text), "")]
    for index, stage in enumerate(manifest.schedule.stages):
        if stage.num_layers == 0:
            continue
        back = ran[index] & ~ran[max(0, index - 1)]
        last = stage.stop - 1
        layers = f"layer {last}" if stage.num_layers == 1 else f"layers {stage.start}-{last}"
        detail = f"{ran[index].sum()} of {count} ran"
        returned = f", {back.sum()} came back" if index > 1 else ""
        panel = _stage_panel(shown, ran[index], back, cell, box)
        panels.append((panel, f"stage {index} · {layers}", detail, returned))
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
        draw.rectangle(box, outline=_BOX, width=3)
    return panel


def _stage_panel(
    shown: Image.Image, ran: np.ndarray, back: np.ndarray, cell: int, box: tuple[int, int, int, int] | None
) -> Image.Image:
    if ran.all():
        return _answer_panel(shown, box)
    pixels = np.asarray(shown).astype(np.float32)
    muted = (pixels + 2 * pixels.mean(axis=2, keepdims=True)) / 3
    dim = _DIM * muted + (1 - _DIM) * np.asarray(_SHADE, dtype=np.float32)
    mask = np.kron(ran, np.ones((cell, cell), dtype=bool))[..., None]
    panel = Image.fromarray(np.where(mask, pixels, dim).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    # Those that came back are drawn last, over their neighbours' lines.
    for kind, colour, width in ((ran & ~back, _RAN, 1), (back, _BACK, max(2, cell // 8))):
        for row, column in np.argwhere(kind).tolist():
            x, y = column * cell, row * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=colour, width=width)
    if box is not None:
        draw.rectangle(box, outline=_BOX, width=2)
    return panel


def _lay_out(panels: list[tuple[Image.Image, str, str, str]], size: tuple[int, int]) -> Image.Image:
    per_row = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    lines = -(-len(panels) // per_row)
    width, height = size[0] + _GAP, size[1] + _CAPTION + _GAP
    picture = Image.new("RGB", (per_row * width + _GAP, lines * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    title, detail = ImageFont.load_default(size=18), ImageFont.load_default(size=16)
    for index, (panel, first, second, returned) in enumerate(panels):
        left, top = _GAP + index % per_row * width, _GAP + index // per_row * height
        picture.paste(panel, (left, top + _CAPTION))
        draw.text((left, top), first, font=title, fill=_INK)
        draw.text((left, top + 24), second, font=detail, fill=_FAINT)
        # In the colour of the outlines, which makes it their legend.
        draw.text((left + draw.textlength(second, detail), top + 24), returned, font=detail, fill=_BACK)
    return picture
