"""The plan's arithmetic, against hand-computed cases, published facts and a a counter of every pair."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute.cost import Plan, attention_flops, kv_bytes_per_row, linear_flops, plan_for, vision_flops
from reroute.errors import UserError
from reroute.manifest import Capacity, TextModel, VisionModel
from reroute.routing import RoutingSpec, Schedule
from tests.model_descriptions import CLIP_L_336, LLAVA_7B_TEXT, model_of

TINY = TextModel(
    num_layers=4,
    hidden_size=6,
    intermediate_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    vocab_size=11,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
TINY_VISION = VisionModel(
    image_size=8,
    patch_size=2,
    grid=(4, 4),
    tokens_per_image=16,
    hidden_size=5,
    intermediate_size=7,
    num_heads=2,
    num_layers=2,
)


def schedule_of(spec: str, num_layers: int, num_visual: int) -> Schedule:
    return RoutingSpec.parse(spec).resolve(num_layers=num_layers, num_visual=num_visual)


def tiny_plan(spec: str, num_text: int = 3, num_visual: int = 16) -> Plan:
    schedule = schedule_of(spec, 4, 16)
    capacity = Capacity(max_text=20, max_images=2)
    model = model_of(TINY, TINY_VISION, decoder=1000)
    return plan_for(model, schedule, capacity, num_text=num_text, num_visual=num_visual)


def llava_plan(spec: str, num_text: int = 64) -> Plan:
    capacity = Capacity(max_text=512, max_images=1)
    return plan_for(model_of(), schedule_of(spec, 32, 576), capacity, dtype="float16", num_text=num_text)


class Counter:
    """Counts multiply-adds one dot product at a time, as the paper's pseudocode runs, with no closed form."""

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self.total = 0

    def matmul(self, rows: int, inner: int, columns: int) -> None:
        for _ in range(rows):
            for _ in range(columns):
                self.total += 2 * inner

    def layer(self, rows: int) -> None:
        text = self.text
        heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        for columns in (heads, kv_heads, kv_heads):
            self.matmul(rows, text.hidden_size, columns)
        for _head in range(text.num_heads):
            for query in range(rows):
                for _key in range(query + 1):
                    self.total += 2 * text.head_dim  # score
                    self.total += 2 * text.head_dim  # weighted value
        self.matmul(rows, heads, text.hidden_size)
        for _ in ("gate", "up"):
            self.matmul(rows, text.hidden_size, text.intermediate_size)
        self.matmul(rows, text.intermediate_size, text.hidden_size)

    def decision(self, alive: list[int], ran: list[int]) -> None:
        text = self.text
        for _row in set(alive) - set(ran):
            self.matmul(1, text.hidden_size, text.num_kv_heads * text.head_dim)
        self.matmul(1, text.hidden_size, text.num_heads * text.head_dim)
        for _head in range(text.num_heads):
            self.matmul(1, text.head_dim, len(alive))


def count_flops(text: TextModel, schedule: Schedule, num_text: int, num_visual: int) -> int:
    """Walk over the layers with explicit row sets; which rows are kept makes no difference."""
    counter = Counter(text)
    words = [-1 - i for i in range(num_text)]
    pictures = list(range(num_visual))
    running = [*words, *pictures]
    for layer in range(text.num_layers):
        stage = schedule.stages[schedule.stage_of_layer(layer)]
        if layer == stage.start and stage.keep is not None:
            alive = running if schedule.action == "removal" else [*words, *pictures]
            running = [*words, *[row for row in alive if row >= 0][: stage.keep]]
            counter.decision(alive, running)
        counter.layer(len(running))
    counter.matmul(1, text.hidden_size, text.vocab_size)
    return counter.total


@pytest.mark.parametrize(
    "spec",
    [
        "dense",
        "reroute@1:keep=5",
        "reroute@0:keep=5",
        "reroute@1,3:keep=5,7",
        "removal@1,3:keep=5,2",
        "removal@0,1,2,3:keep=9,5,5,1",
        "reroute@1,2:keep=16,16",
    ],
)
@pytest.mark.parametrize("num_visual", [0, 4, 16])
def test_decoder_flops_are_those_of_a_brute_force_count(spec: str, num_visual: int):
    plan = tiny_plan(spec, num_text=3, num_visual=num_visual)
    schedule = schedule_of(spec, 4, 16)
    assert plan.decoder_flops == count_flops(TINY, schedule, 3, num_visual)
    assert plan.dense_decoder_flops == count_flops(TINY, schedule_of("dense", 4, 16), 3, num_visual)


def test_one_layer_by_hand():
    # q 6x12, k and v 6x6, o 12x6, three MLP matrices 6x10: 72 + 36 + 36 + 72 + 180 = 396 multiply-adds a row.
    assert linear_flops(TINY, 1) == 2 * 396
    assert linear_flops(TINY, 5) == 5 * 2 * 396
    # 2 rows: 3 pairs, 4 heads, 3 multiply-adds for the score and 3 for the value.
    assert attention_flops(TINY, 2) == 3 * 4 * 2 * (3 + 3)


def test_a_decision_by_hand():
    plan = tiny_plan("reroute@2:keep=5")
    # 19 candidates, 8 run: 11 more key rows of 6x6, one query of 6x12, 19 scores of 3 in 4 heads.
    assert plan.stages[1].scoring_flops == 2 * (11 * 36 + 72 + 19 * 3 * 4)
    assert plan.stages[0].scoring_flops == 0


def test_removal_scores_only_what_is_left():
    reroute, removal = tiny_plan("reroute@1,2:keep=5,4"), tiny_plan("removal@1,2:keep=5,4")
    assert [stage.candidates for stage in reroute.stages] == [19, 19, 19]
    assert [stage.candidates for stage in removal.stages] == [19, 19, 8]
    assert reroute.stages[1].scoring_flops == removal.stages[1].scoring_flops
    assert reroute.stages[2].scoring_flops > removal.stages[2].scoring_flops


def test_memory_by_hand():
    plan = tiny_plan("reroute@1,3:keep=5,2")
    # 2 KV heads of 3, keys and values, 4 bytes: 48 bytes a row. Rows: 1 x 19, 2 x 8, 1 x 5.
    assert plan.kv_bytes == 48 * (19 + 2 * 8 + 5)
    assert plan.dense_kv_bytes == 48 * 4 * 19
    # Capacity: 20 text rows and two images of 16, 5, 2 visual rows.
    assert plan.cache_bytes == 48 * (52 + 2 * 30 + 24)
    assert plan.dense_cache_bytes == 48 * 4 * 52
    assert plan.weight_bytes == 4000
    # 19 rows of full sequence, 19 running, 19 normed (6 wide); attention: q, k, v, output 36 wide and
    # 4 x 19 x 19 float32 probabilities, more than the MLP's 3 x 10; 11 logits.
    decoder = 4 * (3 * 19 * 6) + 4 * 19 * 36 + 4 * 4 * 19 * 19 + 4 * 11
    # 17 rows of residual and norm (5 wide); q, k, v and output, and two heads' probabilities.
    vision = 4 * (2 * 17 * 5) + 4 * (4 * 17 * 5) + 4 * 2 * 17 * 17
    assert plan.workspace_bytes == decoder + vision
    assert plan.peak_bytes == plan.weight_bytes + plan.cache_bytes + decoder + vision


def test_llava_15_7b_facts():
    assert kv_bytes_per_row(LLAVA_7B_TEXT, 2) == 16 * 1024
    plan = llava_plan("dense")
    assert plan.dense_kv_bytes == plan.kv_bytes == 640 * 32 * 16 * 1024
    assert plan.decoder_ratio == plan.kv_ratio == plan.total_ratio == 1
    # 2 FLOPs a weight and row, for all of the 6.74 G parameters but embedding and head; attention is little.
    weights = 6_738_939_904 - 2 * 32064 * 4096
    attention = 32 * attention_flops(LLAVA_7B_TEXT, 640)
    assert plan.decoder_flops - attention == pytest.approx(2 * weights * 640, rel=1e-3)
    assert attention < 0.05 * plan.decoder_flops
    # timm lists 191.1 G multiply-adds for the 24 layers of ViT-L/14-336; LLaVA runs 23 and a projector.
    projector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert vision_flops(CLIP_L_336, 4096) - projector == pytest.approx(2 * 191.1e9 * 23 / 24, rel=0.01)


def test_qwen_25_vl_7b_has_two_kib_of_kv_a_row():
    assert kv_bytes_per_row(dataclasses.replace(LLAVA_7B_TEXT, num_kv_heads=4, head_dim=128), 2) == 2048


def test_an_equal_budget_costs_equal_kv_whatever_the_action():
    reroute, removal = (llava_plan(f"{action}@2,7,15,23:avg=64") for action in ("reroute", "removal"))
    assert reroute.kv_bytes == removal.kv_bytes < reroute.dense_kv_bytes
    assert reroute.cache_bytes == removal.cache_bytes
    assert reroute.peak_bytes == removal.peak_bytes
    # Recoverability costs only scoring, and scoring is less than 1 % of the dense prefill.
    assert 0 < reroute.decoder_flops - removal.decoder_flops < 0.01 * reroute.dense_decoder_flops


def test_keeping_everything_costs_dense_plus_the_scores():
    plan = llava_plan("reroute@2,15:keep=576,576")
    scoring = sum(stage.scoring_flops for stage in plan.stages)
    assert scoring > 0
    assert plan.decoder_flops == plan.dense_decoder_flops + scoring
    assert plan.kv_bytes == plan.dense_kv_bytes


def test_a_text_only_prompt_needs_no_tower():
    plan = tiny_plan("reroute@1:keep=5", num_visual=0)
    assert plan.vision_flops == 0
    assert plan.average_visual_tokens == 0
    assert [stage.rows for stage in plan.stages] == [3, 3]


def test_two_images_run_the_tower_twice():
    part, one, two = (tiny_plan("dense", num_visual=n).vision_flops for n in (4, 16, 32))
    assert two == 2 * one > 0
    assert part == one


@given(
    spec=st.sampled_from(["reroute@1:keep=5", "removal@1,3:keep=9,2", "reroute@0,2:keep=4,8"]),
    visual=st.integers(1, 16),
)
def test_more_visual_tokens_never_cost_less(spec: str, visual: int):
    less, more = tiny_plan(spec, num_visual=visual - 1), tiny_plan(spec, num_visual=visual)
    assert less.decoder_flops < more.decoder_flops
    assert less.kv_bytes <= more.kv_bytes


def test_the_default_prompt_is_one_image():
    assert llava_plan("dense").num_visual == 576


def test_json_and_manifest_forms_agree_with_the_plan():
    plan = llava_plan("reroute@2,7,15,23:avg=64")
    data, estimates = plan.to_dict(), plan.estimates()
    assert data["peak_bytes"] == estimates["peak_bytes"] == plan.peak_bytes
    assert data["stages"][1]["rows"] == plan.stages[1].rows
    assert estimates["decoder_flops"] / estimates["dense_decoder_flops"] == data["decoder_ratio"]
    assert {type(value) for value in estimates.values()} == {float}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "no byte size for dtype 'float8'"),
        ({"num_text": 0}, "at least 1 text token and 0 visual ones, got 0 and 576"),
        ({"num_visual": -1}, "got 64 and -1"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        plan_for(model_of(), schedule_of("dense", 32, 576), Capacity(), **changes)  # type: ignore[arg-type]


def test_a_schedule_of_another_depth_is_refused():
    with pytest.raises(UserError, match="covers 24 layers, the decoder has 32"):
        plan_for(model_of(), schedule_of("dense", 24, 576), Capacity())
