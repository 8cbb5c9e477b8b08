import numpy as np
from PIL import Image

from reroute.manifest import Manifest
from reroute.runtime.overlay import BACK_COLOUR, BOX_COLOUR, RAN_COLOUR
from reroute.runtime.picture import route_picture
from tests.runtime import fakes
from tests.runtime.fakes import make_answer

CELL = 120  # 480 pixels for four tokens
TOP = 70  # margin and caption


def panel_pixel(picture: Image.Image, panel: int, row: float, column: float) -> tuple[int, ...]:
    """Pixel of a token place; panels of 480 in rows of two, with a gap of 20 and a caption of 50."""
    left, top = 20 + panel % 2 * 500, TOP + panel // 2 * 550
    pixel = picture.getpixel((left + int(column * CELL), top + int(row * CELL)))
    assert isinstance(pixel, tuple)
    return pixel


def test_tokens_that_ran_are_clear_and_outlined(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (200, 180, 40))
    picture = route_picture(image, make_answer("yes", [[0, 1, 2, 3, 4], [1, 6, 15]]), manifest)
    assert picture.mode == "RGB"
    assert picture.size == (2 * 500 + 20, 2 * 550 + 20)  # answer, stages 0, 1 and 2
    clear = (200, 180, 40)
    for panel in (0, 1):  # everything ran
        assert panel_pixel(picture, panel, 2.5, 2.5) == clear
    assert panel_pixel(picture, 2, 0.5, 0.5) == clear
    assert panel_pixel(picture, 2, 1.5, 0.5) == clear
    assert sum(panel_pixel(picture, 2, 3.5, 3.5)) < 0.6 * sum(clear)
    assert panel_pixel(picture, 2, 0, 0.5) == RAN_COLOUR  # ran in stage 0 too: nothing came back
    assert panel_pixel(picture, 3, 0, 1.5) == RAN_COLOUR
    assert panel_pixel(picture, 3, 1, 2.5) == BACK_COLOUR
    assert panel_pixel(picture, 3, 3, 3.5) == BACK_COLOUR
    assert panel_pixel(picture, 3, 1.5, 2.5) == clear


def test_the_box_lies_where_it_was_answered(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    picture = route_picture(image, make_answer("25 50 75 99", [[0], [0]]), manifest)
    for panel in range(4):
        assert panel_pixel(picture, panel, 2.5, 1.0) == BOX_COLOUR
        assert panel_pixel(picture, panel, 2.0, 2.0) == BOX_COLOUR
        assert panel_pixel(picture, panel, 3.0, 2.0) != BOX_COLOUR


def test_the_crop_is_what_is_shown(manifest: Manifest) -> None:
    image = Image.new("RGB", (192, 64), (255, 0, 0))
    image.paste((0, 0, 255), (64, 0, 128, 64))  # only the middle is in the crop
    picture = route_picture(image, make_answer("", [[0], [0]]), manifest)
    assert panel_pixel(picture, 0, 0.5, 0.5) == panel_pixel(picture, 0, 3.5, 3.5) == (0, 0, 255)


def test_the_second_of_two_images(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (200, 180, 40))
    two = make_answer("", [[0, 16 + 5], [2, 31]], images=2)
    picture = route_picture(image, two, manifest, image_index=1)
    assert panel_pixel(picture, 2, 1.5, 1.5) == (200, 180, 40)
    assert panel_pixel(picture, 2, 0.5, 0.5) != (200, 180, 40)
    assert panel_pixel(picture, 3, 3, 3.5) == BACK_COLOUR


def test_dense_shows_the_answer_and_one_stage() -> None:
    manifest = fakes.make_manifest(files={}, routing="dense")
    picture = route_picture(Image.new("RGB", (50, 50)), make_answer("yes", []), manifest)
    assert picture.size == (2 * 500 + 20, 550 + 20)


def test_a_decision_at_layer_0_has_no_panel_for_the_empty_stage() -> None:
    manifest = fakes.make_manifest(files={}, routing="reroute@0,3:keep=5,3")
    picture = route_picture(Image.new("RGB", (50, 50)), make_answer("yes", [[1], [2]]), manifest)
    assert picture.size == (3 * 500 + 20, 550 + 20)


def test_removed_tokens_are_darker_than_waiting_ones_and_dropped_ones_are_hatched(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    removal = fakes.make_manifest(files={}, routing="removal@2,4:keep=5,3")
    answer = make_answer("yes", [[0, 1], [0]], entered=[0, 1, 2, 3])
    waiting, gone = (route_picture(image, answer, which) for which in (manifest, removal))
    dark, darker = (sum(panel_pixel(picture, 2, 0.5, 2.3)) for picture in (waiting, gone))
    assert darker < 0.7 * dark < 0.7 * 3 * 250
    panel = np.asarray(waiting)[TOP : TOP + 480, 520:1000]  # stage 0
    cell = panel[3 * CELL : 4 * CELL, 3 * CELL : 4 * CELL]
    assert {tuple(pixel) for pixel in cell[np.arange(CELL), CELL - 1 - np.arange(CELL)].tolist()} == {(92, 100, 112)}
    assert cell[10, 10].sum() < 0.4 * 3 * 250


def test_the_same_answer_gives_the_same_bytes(manifest: Manifest) -> None:
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    answer = make_answer("25 50 75 99", [[0, 3], [0]])
    first, second = (route_picture(image, answer, manifest).tobytes() for _ in range(2))
    assert first == second
