import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from reroute.manifest import Manifest
from reroute.runtime.answer import Answer, Timings
from reroute.runtime.picture import _BACK, _BOX, _RAN, parse_box, route_picture
from tests.runtime import fakes

TIMINGS = Timings(image_ms=0, vision_ms=0, prefill_ms=0, decode_ms=0, prefill_tokens=0, decode_tokens=0)
CELL = 120  # 480 pixels for four tokens
TOP = 70  # margin and caption


def answer(text: str, routes: Sequence[Sequence[int]]) -> Answer:
    return Answer(
        text=text,
        token_ids=(),
        stop_reason="eos",
        routes=tuple(np.asarray(route, dtype=np.int64) for route in routes),
        prompt_tokens=5,
        visual_tokens=16,
        timings=TIMINGS,
    )


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("10 20 30 40", (0.10, 0.20, 0.30, 0.40)),
        ("10, 20, 30, 40", (0.10, 0.20, 0.30, 0.40)),
        ("0 0 99 99", (0.0, 0.0, 0.99, 0.99)),
        ("[0.1, 0.25, 0.5, 1.0]", (0.1, 0.25, 0.5, 1.0)),
        ("It is at [0.12, .3, .5, 0.61].", (0.12, 0.3, 0.5, 0.61)),
        ("[0, 0.2, 1, 0.9]", (0.0, 0.2, 1.0, 0.9)),
        ("0 0 1 1", (0.0, 0.0, 1.0, 1.0)),
        ("30 20 10 40", None),
        ("10 20 10 40", None),
        ("10 20 30", None),
        ("10 20 30 40 50", None),
        ("10 20 30 400", None),
        ("0.1 0.2 0.3 1.5", None),
        ("10 0.5 20 30", None),
        ("1.2.3 4 5 6", None),
        ("yes", None),
        ("", None),
    ],
)
def test_parse_box(text: str, box: tuple[float, ...] | None) -> None:
    assert parse_box(text) == (box if box is None else pytest.approx(box))


def panel_pixel(picture: Image.Image, panel: int, row: float, column: float) -> tuple[int, ...]:
    """Pixel of a token place; panels of 480 in rows of two, with a gap of 20 and a caption of 50."""
    left, top = 20 + panel % 2 * 500, TOP + panel // 2 * 550
    pixel = picture.getpixel((left + int(column * CELL), top + int(row * CELL)))
    assert isinstance(pixel, tuple)
    return pixel


def test_tokens_that_ran_are_clear_and_outlined(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (200, 180, 40))
    picture = route_picture(image, answer("yes", [[0, 1, 2, 3, 4], [1, 6, 15]]), manifest)
    assert picture.mode == "RGB"
    assert picture.size == (2 * 500 + 20, 2 * 550 + 20)  # answer, stages 0, 1 and 2
    clear = (200, 180, 40)
    for panel in (0, 1):  # everything ran
        assert panel_pixel(picture, panel, 2.5, 2.5) == clear
    assert panel_pixel(picture, 2, 0.5, 0.5) == clear
    assert panel_pixel(picture, 2, 1.5, 0.5) == clear
    assert sum(panel_pixel(picture, 2, 3.5, 3.5)) < 0.6 * sum(clear)
    assert panel_pixel(picture, 2, 0, 0.5) == _RAN  # ran in stage 0 too: nothing came back
    assert panel_pixel(picture, 3, 0, 1.5) == _RAN
    assert panel_pixel(picture, 3, 1, 2.5) == _BACK
    assert panel_pixel(picture, 3, 3, 3.5) == _BACK
    assert panel_pixel(picture, 3, 1.5, 2.5) == clear


def test_the_box_lies_where_it_was_answered(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    picture = route_picture(image, answer("25 50 75 99", [[0], [0]]), manifest)
    for panel in range(4):
        assert panel_pixel(picture, panel, 2.5, 1.0) == _BOX
        assert panel_pixel(picture, panel, 2.0, 2.0) == _BOX
        assert panel_pixel(picture, panel, 3.0, 2.0) != _BOX


def test_the_crop_is_what_is_shown(manifest: Manifest) -> None:
    image = Image.new("RGB", (192, 64), (255, 0, 0))
    image.paste((0, 0, 255), (64, 0, 128, 64))  # only the middle is in the crop
    picture = route_picture(image, answer("", [[0], [0]]), manifest)
    assert panel_pixel(picture, 0, 0.5, 0.5) == panel_pixel(picture, 0, 3.5, 3.5) == (0, 0, 255)


def test_the_second_of_two_images(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (200, 180, 40))
    two = dataclasses.replace(answer("", [[0, 16 + 5], [31, 2]]), visual_tokens=32)
    picture = route_picture(image, two, manifest, image_index=1)
    assert panel_pixel(picture, 2, 1.5, 1.5) == (200, 180, 40)
    assert panel_pixel(picture, 2, 0.5, 0.5) != (200, 180, 40)
    assert panel_pixel(picture, 3, 3, 3.5) == _BACK


def test_dense_shows_the_answer_and_one_stage() -> None:
    manifest = fakes.make_manifest(files={}, routing="dense")
    picture = route_picture(Image.new("RGB", (50, 50)), answer("yes", []), manifest)
    assert picture.size == (2 * 500 + 20, 550 + 20)


def test_a_decision_at_layer_0_has_no_panel_for_the_empty_stage() -> None:
    manifest = fakes.make_manifest(files={}, routing="reroute@0,3:keep=5,3")
    picture = route_picture(Image.new("RGB", (50, 50)), answer("yes", [[1], [2]]), manifest)
    assert picture.size == (3 * 500 + 20, 550 + 20)
