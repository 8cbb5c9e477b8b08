"""The plan's arithmetic, against hand-computed cases, published facts and a a counter of every pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute.cost import (
    Plan,
    attention_flops,
    kv_bytes_per_row,
    linear_flops,
    measure,
    plan_for,
    resolve,
)
from reroute.errors import UserError
from reroute.export import read_model
from reroute.manifest import Capacity, TextModel, VisionModel
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule
from reroute.tower_cost import extra_tower_parameters, vision_flops
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
    depth=3,
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
    pictures = list(range(min(num_visual, schedule.nuwa or num_visual)))
    running = before = [*words, *pictures]
    for layer in range(text.num_layers):
        stage = schedule.stages[schedule.stage_of_layer(layer)]
        if layer == stage.start and stage.keep is not None:
            alive = running if schedule.action == "removal" else [*words, *pictures]
            before, running = running, [*words, *[row for row in alive if row >= 0][: stage.keep]]
            # The layer before projected the keys of the rows that ran in it, and no others.
            counter.decision(alive, running if schedule.scoring == "own" else before)
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
        "removal@1,3:keep=5,2:score=previous",
        "reroute@1,3:keep=5,7:score=previous",
        "reroute@1,2:keep=5,7:score=previous",
        "removal@1,3:keep=5,2:positions=renumbered",
        "removal@2:nuwa=6:keep=2:score=previous",
        "reroute@1,3:nuwa=6:keep=5,2",
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


@pytest.mark.parametrize("target", ["flops", "kv"])
@pytest.mark.parametrize("amount", ["1/2", ".3"])
@pytest.mark.parametrize("method", ["fastv", "reroute-pdrop", "nuwa"])
def test_targets_in_flops_and_kv_bytes_are_met_and_used_up(target: str, amount: str, method: str):
    model = model_of()
    schedule = resolve(RoutingSpec.parse(f"{method}:{target}={amount}"), model)
    cost, dense = measure(model, target, schedule)  # type: ignore[arg-type]
    share = 0.5 if amount == "1/2" else 0.3
    assert cost <= share * dense
    first, *later = schedule.stages
    more = tuple(dataclasses.replace(stage, keep=(stage.keep or 0) + 1) for stage in later)
    bigger = dataclasses.replace(schedule, stages=(first, *more))
    assert measure(model, target, bigger)[0] > share * dense  # type: ignore[arg-type]


def test_absolute_targets_are_those_of_the_plan():
    model = model_of()
    plan = plan_for(model, resolve(RoutingSpec.parse("dense"), model), Capacity())
    half = resolve(RoutingSpec.parse("fastv:flops=1/2"), model)
    same = resolve(RoutingSpec.parse(f"fastv:flops={plan.dense_decoder_flops / 2e9:.6f}G"), model)
    assert half == same
    kv = resolve(RoutingSpec.parse(f"fastv:kv={plan.dense_kv_bytes // 2**21}MiB"), model)
    assert kv == resolve(RoutingSpec.parse("fastv:kv=1/2"), model)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("fastv:flops=1/1000", "is impossible", "flops="),
        ("fastv:kv=1KiB", "1 KiB KV bytes is impossible", "kv="),
        ("fastv:flops=999T", "exceed the", "dense"),
    ],
)
def test_a_target_out_of_reach_gives_both_numbers(spec: str, message: str, hint: str):
    with pytest.raises(UserError) as error:
        resolve(RoutingSpec.parse(spec), model_of())
    assert message in error.value.message
    assert hint in error.value.hint


PAIRS = [
    ("fastv", "reroute-fastv"),
    ("pdrop", "reroute-pdrop"),
    ("nuwa", "reroute-nuwa"),
]


@pytest.mark.parametrize("average", ["1/3", "2/9", "1/9"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_method_and_its_reroute_form_cost_the_same_at_equal_averages(pair: tuple[str, str], average: str):
    """KV bytes and the layers' FLOPs within 2 %; scoring all rows at every decision adds up to 3.4 %."""
    model = model_of()
    plans = [plan_for(model, resolve(RoutingSpec.parse(f"{m}:avg={average}"), model), Capacity()) for m in pair]
    assert plans[0].kv_bytes == pytest.approx(plans[1].kv_bytes, rel=0.02)
    layers = [plan.decoder_flops - sum(stage.scoring_flops for stage in plan.stages) for plan in plans]
    assert layers[0] == pytest.approx(layers[1], rel=0.02)
    assert plans[0].decoder_flops == pytest.approx(plans[1].decoder_flops, rel=0.035)


@pytest.mark.parametrize("average", ["1/3", "2/9", "1/9"])
@pytest.mark.parametrize("pair", PAIRS)
def test_on_the_demo_model_a_whole_prompt_costs_the_same(pair: tuple[str, str], average: str, demo_checkpoint: Path):
    """Decoder with scoring, and the tower: within 2 %."""
    model = read_model(demo_checkpoint)
    plans = [plan_for(model, resolve(RoutingSpec.parse(f"{m}:avg={average}"), model), Capacity()) for m in pair]
    totals = [plan.decoder_flops + plan.vision_flops for plan in plans]
    assert totals[0] == pytest.approx(totals[1], rel=0.02)
    assert plans[0].kv_bytes == pytest.approx(plans[1].kv_bytes, rel=0.02)


@pytest.mark.parametrize("share", ["1/3", "1/4", ".2"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_target_in_flops_makes_them_equal_with_scoring(pair: tuple[str, str], share: str):
    model = model_of()
    plans = [plan_for(model, resolve(RoutingSpec.parse(f"{m}:flops={share}"), model), Capacity()) for m in pair]
    assert plans[0].decoder_flops == pytest.approx(plans[1].decoder_flops, rel=0.02)


def test_nuwa_by_hand():
    """Three tower layers instead of two, similarity and sums of 16 patches, six tokens projected."""
    patches, rows, size, kept = 16, 17, 5, 6
    layer = 2 * rows * (4 * size * size + 2 * size * 7) + 4 * rows * rows * size
    embedding = 2 * patches * 3 * 4 * size
    projector = 2 * kept * (size * 6 + 6 * 6)
    stage_1 = 2 * patches**2 * size + 2 * size**2 + 2 * rows * size + 2 * kept * patches * size
    assert vision_flops(TINY_VISION, 6, nuwa=6) == embedding + 3 * layer + stage_1 + projector
    schedule = schedule_of("removal@2:nuwa=6:keep=2:score=previous", 4, 16)
    # q, k, v, out with biases; two MLP matrices with biases; two norms.
    assert extra_tower_parameters(TINY_VISION, schedule) == 4 * 30 + 5 * 7 + 7 + 7 * 5 + 5 + 4 * 5
    assert tiny_plan("removal@2:nuwa=6:keep=2:score=previous").average_visual_tokens == (2 * 6 + 2 * 2) / 4


def test_nuwa_of_a_tower_with_mergers_by_hand():
    """Scores of the last layer once more, the merger once more, similarity and sums of the kept; by grid."""
    vision = dataclasses.replace(
        TINY_VISION, grid=(3, 4), grids=((3, 4), (2, 2)), merge=2, mergers=1, tokens_per_image=12, num_layers=3,
        class_token=False,
    )  # fmt: skip
    wide, size = 4 * 5, 6
    for grid, tokens in (((3, 4), 12), ((2, 2), 4)):
        plain, pruned = (vision_flops(vision, size, nuwa=kept, grid=grid) for kept in (None, 5))
        merger = 2 * tokens * (wide * wide + wide * size)
        assert pruned - plain == 2 * (4 * tokens) ** 2 * 5 + merger + 4 * min(5, tokens) * tokens * size
    model = model_of(dataclasses.replace(TINY, num_layers=4), vision)
    schedule = resolve(RoutingSpec.parse("removal@2:nuwa=.5:keep=.25:rows=3"), model)
    plan = plan_for(model, schedule, Capacity(), num_text=3)
    assert [(one.grid, one.num_visual, one.budgets) for one in plan.grids] == [((3, 4), 12, (3,)), ((2, 2), 4, (1,))]
    assert [one.average_visual_tokens for one in plan.grids] == [(2 * 6 + 2 * 3) / 4, (2 * 2 + 2 * 1) / 4]
    assert plan.grids[1].vision_flops == vision_flops(vision, size, nuwa=2, grid=(2, 2))
    # Three queries instead of one: projections, and scores of all 9 rows.
    single = plan_for(model, dataclasses.replace(schedule, rows=1), Capacity(), num_text=3)
    query = 2 * 6 * 4 * 3 + 2 * 9 * 4 * 3
    assert plan.stages[1].scoring_flops - single.stages[1].scoring_flops == 2 * query
