"""Positions of the rows of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reroute.manifest import Manifest, MRope
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions, VisualTokens, join
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


def grid_manifest(routing: str = "reroute@1:keep=2", *, deepstack: int = 0) -> Manifest:
    """The fake model with M-RoPE of sections 1 and 1 of two frequencies, and three grids."""
    manifest = fakes.make_manifest(files={}, routing=routing, max_images=3)
    text = replace(manifest.model.text, mrope=MRope(sections=(0, 1, 1)), deepstack=deepstack)
    vision = replace(manifest.model.vision, grids=((4, 4), (2, 3), (3, 2)))
    return replace(manifest, model=replace(manifest.model, text=text, vision=vision))


def images(*grids: tuple[int, int], deepstack: int = 0) -> VisualTokens:
    parts = [
        VisualTokens(
            embeds=np.full((1, rows * columns, fakes.HIDDEN), index, np.float32),
            grids=((rows, columns),),
            deepstack=np.full((deepstack, 1, rows * columns, fakes.HIDDEN), index, np.float32) if deepstack else None,
        )
        for index, (rows, columns) in enumerate(grids)
    ]
    return join(parts)


def test_an_image_stands_at_its_rows_and_columns() -> None:
    """Time, row and column by hand: 2 x 3 from position 1, text behind the longer side, then 3 x 2."""
    positions = Positions(grid_manifest())
    place = lay_out(
        [1, fakes.IMAGE, 5, fakes.IMAGE, 6],
        image_token="<image>",
        image_token_id=fakes.IMAGE,
        num_images=2,
        tokens_per_image=[6, 6],
    )
    at = positions.offsets_3d(place, ((2, 3), (3, 2)))
    first = [(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 2, 2), (1, 2, 3)]
    second = [(5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6), (5, 7, 5), (5, 7, 6)]
    assert at.tolist() == [[0, 0, 0], *map(list, first), [4, 4, 4], *map(list, second), [8, 8, 8]]
    visual = images((2, 3), (3, 2))
    step = positions.inputs(place, visual, np.asarray([7, 5]), shift=-3)
    # The one frequency of rows and the one of columns, from position 7 - 3 on.
    np.testing.assert_array_equal(step.rope_cos[:, 0], positions.rotary.cos[4 + at[:, 1], 0])
    np.testing.assert_array_equal(step.rope_sin[:, 1], positions.rotary.sin[4 + at[:, 2], 1])
    # 12 cache rows, 6 positions: what comes next is shifted by the difference.
    assert positions.shift(visual) == (3 - 6) + (3 - 6)
    assert positions.shift(None) == 0
    assert positions.tokens(visual).tolist() == list(range(12))


def test_tokens_that_are_left_stand_at_their_places() -> None:
    """Half of 2 x 3 and of 1 x 4 enter; the text behind an image stands where it would stand anyway."""
    manifest = grid_manifest()
    schedule = replace(manifest.schedule, nuwa=8, nuwa_share=(1, 2))
    positions = Positions(replace(manifest, schedule=schedule))
    ids = [9, fakes.IMAGE, 9, fakes.IMAGE, 9]
    place = lay_out(ids, image_token="", image_token_id=fakes.IMAGE, num_images=2, tokens_per_image=[3, 2])
    empty = np.zeros((1, 0, fakes.HIDDEN), np.float32)
    kept = {(2, 3): [0, 4, 5], (1, 4): [1, 3]}
    visual = join([VisualTokens(embeds=empty, places=np.asarray([p]), grids=(grid,)) for grid, p in kept.items()])
    first, second = [[1, 1, 1], [1, 2, 2], [1, 2, 3]], [[5, 5, 6], [5, 5, 8]]
    expected = [[0, 0, 0], *first, [4, 4, 4], *second, [9, 9, 9]]
    assert positions.offsets_3d(place, positions.grids(visual), visual.places).tolist() == expected
    assert positions.shift(visual) == (3 - 3) + (4 - 2)
    assert positions.tokens(visual).tolist() == [0, 4, 5, 6 + 1, 6 + 3]


def test_images_of_several_grids_are_joined_in_order() -> None:
    visual = images((2, 3), (4, 4), (3, 2), deepstack=2)
    assert visual.num_images == 3
    assert visual.embeds.shape == (1, 28, fakes.HIDDEN)
    assert visual.deepstack is not None
    assert visual.deepstack.shape == (2, 1, 28, fakes.HIDDEN)
    for array in (visual.embeds[0, :, 0], visual.deepstack[1, 0, :, 3]):
        assert array.tolist() == [0.0] * 6 + [1.0] * 16 + [2.0] * 6


@pytest.mark.parametrize(("pool", "expected"), [("all", None), ("image", [0] * 6 + [1] * 16)])
def test_the_image_of_each_token_is_an_input_only_for_a_budget_per_image(pool: str, expected: list[int] | None) -> None:
    positions = Positions(grid_manifest(f"reroute@1:keep=2:pool={pool}", deepstack=2))
    ids = [fakes.IMAGE, 5, fakes.IMAGE, 6]
    place = lay_out(ids, image_token="<image>", image_token_id=fakes.IMAGE, num_images=2, tokens_per_image=[6, 16])
    step = positions.inputs(place.after(9), images((2, 3), (4, 4), deepstack=2), np.asarray([0, 0]))
    found = step.arrays()
    assert ("visual_images" in found) == (expected is not None)
    assert expected is None or found["visual_images"].tolist() == expected
    assert found["deepstack"].shape == (2, 1, 22, fakes.HIDDEN)
    text = positions.inputs(Layout.of_text([1, 2]), None, np.asarray([25, 4]), shift=-12)
    assert text.arrays()["deepstack"].shape == (2, 1, 0, fakes.HIDDEN)
    np.testing.assert_array_equal(text.rope_cos[1], positions.rotary.cos[14])
