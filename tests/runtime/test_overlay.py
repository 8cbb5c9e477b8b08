import numpy as np
import pytest
from PIL import Image

from reroute.manifest import Manifest
from reroute.runtime.overlay import Fate, overlay, parse_box
from tests.runtime import fakes
from tests.runtime.fakes import make_answer

GREY = Image.new("RGB", (64, 64), (120, 120, 120))


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


def fates_of(view: object, stage: int) -> dict[int, Fate]:
    fates = view.stages[stage].fates  # type: ignore[attr-defined]
    return {index: Fate(fate) for index, fate in enumerate(fates.ravel().tolist())}


def tokens_with(fates: dict[int, Fate], fate: Fate) -> list[int]:
    return [index for index, other in fates.items() if other is fate]


def test_reroute_lets_tokens_wait_and_come_back(manifest: Manifest) -> None:
    view = overlay(GREY, make_answer("yes", [[0, 1, 2, 3, 4], [1, 6, 15]]), manifest)
    first, second, third = (fates_of(view, stage) for stage in range(3))
    assert tokens_with(first, Fate.RAN) == list(range(16))
    assert tokens_with(second, Fate.RAN) == [0, 1, 2, 3, 4]
    assert tokens_with(second, Fate.WAITING) == list(range(5, 16))
    assert tokens_with(third, Fate.RAN) == [1]
    assert tokens_with(third, Fate.BACK) == [6, 15]
    assert len(tokens_with(third, Fate.WAITING)) == 13
    assert view.grid == (4, 4)
    assert view.box is None
    assert [(stage.ran, stage.share) for stage in view.stages] == [(16, 1.0), (5, 5 / 16), (3, 3 / 16)]


def test_captions_say_what_happened(manifest: Manifest) -> None:
    stages = overlay(GREY, make_answer("yes", [[0, 1, 2, 3, 4], [1, 6, 15]]), manifest).stages
    assert [stage.title for stage in stages] == ["stage 0 · layers 0-1", "stage 1 · layers 2-3", "stage 2 · layers 4-5"]
    assert stages[0].caption == "16 of 16 tokens ran (100 %)."
    assert stages[1].caption == (
        "5 of 16 tokens ran (31.2 %). 11 waited: they stay unchanged and compete again at layer 4."
    )
    assert stages[2].caption == (
        "3 of 16 tokens ran (18.8 %); 2 of them came back after waiting in the stage before. "
        "13 waited: they stay unchanged to the end."
    )
    assert [text for _, text in stages[2].counts] == ["3 of 16 ran", "2 came back", "13 waited"]


def test_removal_is_for_good() -> None:
    manifest = fakes.make_manifest(files={}, routing="removal@2,4:keep=5,3")
    stages = overlay(GREY, make_answer("yes", [[0, 1, 2, 3, 4], [1, 2, 3]]), manifest).stages
    assert stages[1].count(Fate.GONE) == 11
    assert stages[2].count(Fate.GONE) == 13
    assert stages[2].caption == "3 of 16 tokens ran (18.8 %). 13 were removed: they are gone for good."
    assert [text for _, text in stages[2].counts] == ["3 of 16 ran", "13 gone for good"]


def test_tokens_that_never_entered_the_decoder(manifest: Manifest) -> None:
    answer = make_answer("yes", [[1, 5], [9]], entered=[1, 5, 7, 9])
    stages = overlay(GREY, answer, manifest).stages
    assert [stage.count(Fate.DROPPED) for stage in stages] == [12, 12, 12]
    assert [stage.count(Fate.WAITING) for stage in stages] == [0, 2, 3]
    assert stages[0].caption == "4 of 16 tokens ran (25 %). 12 were dropped before the decoder."
    assert stages[2].count(Fate.BACK) == 1
    assert "all of them" in stages[2].caption


def test_nothing_came_back_is_said_where_something_could_have(manifest: Manifest) -> None:
    stages = overlay(GREY, make_answer("yes", [[0, 1, 2], [0, 1]]), manifest).stages
    assert [text for _, text in stages[1].counts] == ["3 of 16 ran", "13 waited"]
    assert [text for _, text in stages[2].counts] == ["2 of 16 ran", "0 came back", "14 waited"]


def test_each_image_of_a_question_has_its_own_tokens(manifest: Manifest) -> None:
    answer = make_answer("yes", [[0, 16 + 5], [2, 31]], images=2)
    for image, ran in ((0, [[0], [2]]), (1, [[5], [15]])):
        stages = overlay(GREY, answer, manifest, image_index=image).stages
        assert [np.flatnonzero(stage.fates <= Fate.BACK).tolist() for stage in stages[1:]] == ran


def test_dense_is_one_stage_and_an_empty_stage_0_is_left_out() -> None:
    dense = overlay(GREY, make_answer("yes", []), fakes.make_manifest(files={}, routing="dense"))
    assert [(stage.title, stage.share) for stage in dense.stages] == [("stage 0 · layers 0-5", 1.0)]
    manifest = fakes.make_manifest(files={}, routing="reroute@0,5:keep=5,3")
    stages = overlay(GREY, make_answer("yes", [[1], [2]]), manifest).stages
    assert [(stage.index, stage.title) for stage in stages] == [(1, "stage 1 · layers 0-4"), (2, "stage 2 · layer 5")]
    assert stages[0].count(Fate.RAN) == 1  # all competed; none can have come back
