"""Budgets of images that differ in size, and of several images in one prompt: what a spec means, and what it takes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reroute.cost import plan_for, resolve
from reroute.errors import UserError
from reroute.manifest import Capacity, Model, VisionModel
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule, Stage
from tests.model_descriptions import LLAVA_7B_TEXT, model_of

GRIDS = ((24, 24), (18, 30), (12, 12))


def schedule_of(spec: str, *, sizes_vary: bool = True) -> Schedule:
    return RoutingSpec.parse(spec).resolve(num_layers=32, num_visual=576, sizes_vary=sizes_vary)


def grid_model() -> Model:
    vision = VisionModel(
        image_size=672, patch_size=14, grid=GRIDS[0], tokens_per_image=576, hidden_size=1280, intermediate_size=3420,
        num_heads=16, num_layers=32, depth=32, grids=GRIDS, merge=2, window=4, full_layers=4, class_token=False,
        gated_mlp=True, mergers=1,
    )  # fmt: skip
    return model_of(LLAVA_7B_TEXT, vision)


@given(share=st.fractions(Fraction(1, 1000), 1), visual=st.integers(0, 3000))
def test_a_share_of_the_prompt_is_what_the_spec_says(share: Fraction, visual: int) -> None:
    stage = Stage(start=1, stop=2, keep=3, share=(share.numerator, share.denominator))
    assert stage.visual_rows(visual) == min(visual, max(1, int(visual * share)))


def test_shares_follow_and_tokens_do_not() -> None:
    assert [s.share for s in schedule_of("reroute@2,7:keep=.25,100").stages] == [None, (1, 4), None]
    assert [s.share for s in schedule_of("reroute@2,7:keep=.25,100", sizes_vary=False).stages] == [None] * 3
    solved = schedule_of("reroute@2,7,15,23:avg=1/9")
    assert [s.share for s in solved.stages[1:]] == [(k, 576) for k in solved.budgets]
    assert all(s.share is None for s in schedule_of("reroute@2,7,15,23:avg=64").stages)
    # What follows is the same thing for the largest image.
    assert solved.visual_rows([576]) == schedule_of("reroute@2,7,15,23:avg=1/9", sizes_vary=False).visual_rows([576])


def test_pools() -> None:
    one, each = schedule_of("reroute@2:keep=100"), schedule_of("reroute@2:keep=100:pool=image")
    assert one.visual_rows([576, 60]) == (636, 100)
    assert each.visual_rows([576, 60]) == (636, 160)
    assert (one.fixed, each.fixed, schedule_of("reroute@2:keep=.1").fixed) == (True, False, False)
    assert schedule_of("reroute@2:keep=.1:pool=image").visual_rows([576, 60, 4]) == (640, 57 + 6 + 1)
    assert schedule_of("reroute@2:keep=.1").visual_rows([576, 60, 4]) == (640, 64)
    with pytest.raises(UserError, match="unknown pool 'images'"):
        RoutingSpec.parse("reroute@2:keep=5:pool=images")
    with pytest.raises(UserError, match="unknown pool 'none'"):
        Schedule(action="dense", stages=(Stage(start=0, stop=2, keep=None),), pool="none")  # type: ignore[arg-type]


# A share of three images together is a token more than three shares of one.
@example(spec="keep=.0026", turns=[[576, 576, 576]])
@given(
    spec=st.sampled_from(
        ["keep=.1392", "keep=.1392:pool=image", "keep=70", "keep=70:pool=image", "avg=1/2", "keep=.001"]
    ),
    turns=st.lists(st.lists(st.integers(1, 576), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_the_caches_hold_every_way_to_show_the_images(spec: str, turns: list[list[int]]) -> None:
    """One prompt with all images or a turn for each, small or large: never more rows than the capacity has."""
    images = sum(map(len, turns))
    schedule = schedule_of(f"reroute@2:{spec}")
    rows = Capacity(max_text=5, max_images=images).cache_rows(schedule, 576)
    used = [5 + sum(stage) for stage in zip(*(schedule.visual_rows(turn) for turn in turns), strict=True)]
    assert all(have <= room for have, room in zip(used, rows, strict=True))


def test_the_plan_has_a_line_for_each_grid() -> None:
    model = grid_model()
    schedule = resolve(RoutingSpec.parse("reroute@2,7,15,23:keep=.1392,.1392,.0696,.0348"), model)
    plan = plan_for(model, schedule, Capacity())
    assert [one.num_visual for one in plan.grids] == [576, 540, 144]
    assert [one.budgets for one in plan.grids] == [(80, 80, 40, 20), (75, 75, 37, 18), (20, 20, 10, 5)]
    for one in plan.grids:
        rows = 2 * one.num_visual + 5 * one.budgets[0] + 8 * one.budgets[1] + 8 * one.budgets[2] + 9 * one.budgets[3]
        assert one.average_visual_tokens == rows / 32
    assert plan.grids[0].vision_flops == plan.vision_flops
    assert plan.average_visual_tokens == plan.grids[0].average_visual_tokens
    fixed = plan_for(model, resolve(RoutingSpec.parse("reroute@2:keep=200"), model), Capacity())
    assert [one.budgets for one in fixed.grids] == [(200,), (200,), (144,)]
    assert plan_for(model_of(), schedule, Capacity()).grids == ()


def test_a_tower_with_windows_by_hand() -> None:
    """18 x 30 tokens in windows of 4 x 4, cut to 2 at both edges; in 4 layers every patch attends to all."""
    model = grid_model()
    plan = plan_for(model, resolve(RoutingSpec.parse("dense"), model), Capacity(), grid=(18, 30))
    patches, size = 18 * 30 * 4, 1280
    windows = [high * wide * 4 for high in (4, 4, 4, 4, 2) for wide in (*[4] * 7, 2)]
    assert sum(windows) == patches
    linear = 2 * patches * (4 * size * size + 3 * size * 3420)
    attention = 4 * size * (28 * sum(n * n for n in windows) + 4 * patches * patches)
    embedding = 2 * patches * 3 * 14 * 14 * size
    merger = 2 * 540 * (5120 * 5120 + 5120 * 4096)
    assert plan.vision_flops == embedding + 32 * linear + attention + merger
