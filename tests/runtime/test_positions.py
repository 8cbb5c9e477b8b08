"""Positions of the rows of a step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions, VisualTokens
from tests.runtime import fakes

PLACES = np.asarray([[0, 3, 5, 15], [1, 2, 8, 9]])  # of 4 x 4


def layout(ids: list[int], per_image: int) -> Layout:
    images = ids.count(fakes.IMAGE)
    return lay_out(
        ids, image_token="<image>", image_token_id=fakes.IMAGE, num_images=images, tokens_per_image=per_image
    )


def visual(places: np.ndarray | None, count: int, images: int) -> VisualTokens:
    return VisualTokens(embeds=np.zeros((images, count, fakes.HIDDEN), np.float32), places=places)


def test_dropped_tokens_leave_gaps_and_text_stays_behind_the_whole_image() -> None:
    positions = Positions(fakes.make_manifest(files={}, routing="reroute@1:nuwa=4:keep=2"))
    place = layout([1, fakes.IMAGE, 5, fakes.IMAGE, 6], 4)
    at = positions.offsets(place, PLACES)
    assert at.tolist() == [0, 1, 4, 6, 16, 17, 19, 20, 26, 27, 34]
    step = positions.inputs(
        place, visual(PLACES, 4, 2), np.asarray([7, 5]), shift=positions.shift(visual(PLACES[:1], 4, 1))
    )
    # Seven rows are in the cache, of which one image left twelve positions empty.
    np.testing.assert_array_equal(step.rope_cos, positions.rotary.cos[7 + 12 + at])
    np.testing.assert_array_equal(step.rope_sin, positions.rotary.sin[7 + 12 + at])
    assert positions.tokens(visual(PLACES, 4, 2)).tolist() == [0, 3, 5, 15, 17, 18, 24, 25]


def test_without_dropped_tokens_positions_are_consecutive() -> None:
    positions = Positions(fakes.make_manifest(files={}, routing="reroute@1:keep=2"))
    place = layout([1, fakes.IMAGE, 5], 16)
    step = positions.inputs(place, visual(None, 16, 1), np.asarray([3, 2]), shift=positions.shift(visual(None, 16, 2)))
    np.testing.assert_array_equal(step.rope_cos, positions.rotary.cos[3:21])
    assert positions.tokens(visual(None, 16, 2)).tolist() == list(range(32))


@pytest.mark.parametrize("count", [1, 3])
def test_renumbered_positions_are_the_rows_of_each_stage(count: int) -> None:
    positions = Positions(fakes.make_manifest(files={}, routing="removal@1:keep=2:positions=renumbered"))
    step = positions.inputs(Layout.of_text(range(count)), None, np.asarray([20, 6]))
    assert step.rope_cos.shape == (2, count, fakes.HEAD_DIM // 2)
    np.testing.assert_array_equal(step.rope_cos[0], positions.rotary.cos[20 : 20 + count])
    np.testing.assert_array_equal(step.rope_sin[1], positions.rotary.sin[6 : 6 + count])
