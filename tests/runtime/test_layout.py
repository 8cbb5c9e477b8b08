import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute.errors import UserError
from reroute.routing import RoutingSpec
from reroute.runtime.layout import Layout, lay_out, rows_added
from reroute.runtime.rope import Rotary

IMAGE = 99


def place(ids: list[int], images: int, per_image: int = 3) -> Layout:
    return lay_out(ids, image_token="<image>", image_token_id=IMAGE, num_images=images, tokens_per_image=per_image)


def test_expands_each_placeholder() -> None:
    layout = place([1, IMAGE, 5, IMAGE, 6, 7], 2)
    assert layout.input_ids.tolist() == [1, 5, 6, 7]
    assert layout.text_slots.tolist() == [0, 4, 8, 9]
    assert layout.visual_slots.tolist() == [1, 2, 3, 5, 6, 7]
    assert layout.text_slots.dtype == layout.visual_slots.dtype == layout.input_ids.dtype == np.int64


def test_text_only() -> None:
    layout = place([4, 5], 0)
    assert layout.visual_slots.tolist() == []
    assert layout.text_slots.tolist() == [0, 1]


@given(st.lists(st.sampled_from([1, 2, IMAGE]), max_size=12), st.integers(1, 4))
def test_slots_are_ascending_disjoint_and_complete(ids: list[int], per_image: int) -> None:
    layout = place([*ids, 7], ids.count(IMAGE), per_image)
    total = layout.num_text + layout.num_visual
    assert sorted([*layout.text_slots, *layout.visual_slots]) == list(range(total))
    assert (np.diff(layout.text_slots) > 0).all()
    assert (np.diff(layout.visual_slots) > 0).all()
    assert layout.text_slots[-1] == total - 1
    assert layout.num_visual == per_image * ids.count(IMAGE)


@pytest.mark.parametrize(("ids", "images"), [([1, IMAGE, 2], 0), ([1, 2], 1), ([IMAGE, IMAGE, 2], 1)])
def test_refuses_a_wrong_number_of_placeholders(ids: list[int], images: int) -> None:
    with pytest.raises(UserError, match=rf"{ids.count(IMAGE)} <image> placeholders, but {images} images"):
        place(ids, images)


def test_one_more_token_in_front() -> None:
    layout = place([1, IMAGE, 5], 1).after(IMAGE)
    assert layout.input_ids.tolist() == [IMAGE, 1, 5]
    assert layout.text_slots.tolist() == [0, 1, 5]
    assert layout.visual_slots.tolist() == [2, 3, 4]
    assert layout.text_slots.dtype == layout.visual_slots.dtype == layout.input_ids.dtype == np.int64


def test_refuses_an_image_at_the_end() -> None:
    with pytest.raises(UserError, match="ends with an image"):
        place([1, IMAGE], 1)


def test_refuses_nothing() -> None:
    with pytest.raises(UserError, match="empty"):
        place([], 0)


def test_inputs_of_one_prompt() -> None:
    layout = place([1, IMAGE, 5], 1)
    rotary = Rotary(head_dim=4, theta=10.0, rows=30)
    embeds = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    step = layout.inputs(embeds, *rotary.rows(7, 5))
    assert step.input_ids.tolist() == [[1, 5]]
    np.testing.assert_array_equal(step.visual_embeds, embeds)
    np.testing.assert_array_equal(step.rope_cos, rotary.cos[7:12])
    np.testing.assert_array_equal(step.rope_sin, rotary.sin[7:12])


def test_several_images_are_joined_in_order() -> None:
    layout = place([IMAGE, 1, IMAGE, 5], 2)
    embeds = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    step = layout.inputs(embeds, *Rotary(head_dim=4, theta=10.0, rows=30).rows(0, 8))
    assert step.visual_embeds.shape == (1, 6, 2)
    assert step.visual_embeds[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_rows_added_per_stage() -> None:
    schedule = RoutingSpec.parse("reroute@2,4:keep=5,3").resolve(num_layers=6, num_visual=16)
    assert rows_added(schedule, num_text=4, num_visual=16).tolist() == [20, 9, 7]
    assert rows_added(schedule, num_text=4, num_visual=4).tolist() == [8, 8, 7]
    assert rows_added(schedule, num_text=1, num_visual=0).tolist() == [1, 1, 1]
