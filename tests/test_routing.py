"""Routing specs: the grammar, its errors, and budgets that keep their promise."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute.errors import EXIT_USAGE, UserError
from reroute.published import METHODS, PUBLISHED
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule, Stage
from reroute.solver import Shape, shares

SHAPES: tuple[Shape, ...] = ("uniform", "geometric", "halving")


def resolve(text: str, num_layers: int = 32, num_visual: int = 576) -> Schedule:
    return RoutingSpec.parse(text).resolve(num_layers=num_layers, num_visual=num_visual)


def test_dense_is_one_stage_of_everything():
    schedule = resolve("dense")
    assert schedule.stages == (Stage(start=0, stop=32, keep=None),)
    assert schedule.budgets == schedule.decision_layers == ()
    assert schedule.average_visual_tokens(576) == 576


def test_budgets_in_tokens_become_stages():
    schedule = resolve("reroute@2,7,15,23:keep=80,90,40,20", num_layers=24)
    edges = [(stage.start, stage.stop, stage.keep) for stage in schedule.stages]
    assert edges == [(0, 2, None), (2, 7, 80), (7, 15, 90), (15, 23, 40), (23, 24, 20)]
    assert schedule.decision_layers == (2, 7, 15, 23)
    assert schedule.budgets == (80, 90, 40, 20)
    assert [schedule.stage_of_layer(layer) for layer in (0, 1, 2, 6, 7, 23)] == [0, 0, 1, 1, 2, 4]


def test_a_first_decision_at_layer_0_keeps_an_empty_stage_0():
    schedule = resolve("reroute@0,4:keep=10,5", num_layers=8)
    assert schedule.stages[0].num_layers == 0
    assert schedule.average_visual_tokens(100) == (4 * 10 + 4 * 5) / 8


def test_budgets_act_as_a_minimum():
    schedule = resolve("reroute@2:keep=200", num_layers=4)
    assert [schedule.stages[1].visual_rows(n) for n in (0, 100, 200, 576)] == [0, 100, 200, 200]


@pytest.mark.parametrize(
    ("share", "tokens"), [(".1392", 80), ("0.1392", 80), ("1/9", 64), ("1.0", 576), ("1/1000", 1), ("12", 12)]
)
def test_a_share_is_floored_and_at_least_1(share: str, tokens: int):
    assert resolve(f"reroute@2:keep={share}").budgets == (tokens,)


# Averages as measured on the published schedules: algorithms of arXiv 2606.12412, LLaVA-1.5-7B.
AVERAGES = {
    "llava15/avg192/fastv": 191.8,
    "llava15/avg128/fastv": 127.4,
    "llava15/avg64/fastv": 64.0,
    "llava15/avg192/reroute-fastv": 191.8,
    "llava15/avg128/reroute-fastv": 127.4,
    "llava15/avg64/reroute-fastv": 64.0,
    "llava15/avg192/pdrop": 191.3,
    "llava15/avg128/pdrop": 127.6,
    "llava15/avg64/pdrop": 80.4,
    "llava15/avg192/reroute-pdrop": 191.5,
    "llava15/avg128/reroute-pdrop": 127.4,
    "llava15/avg64/reroute-pdrop": 84.1,
    "llava15/avg192/nuwa": 192.0,
    "llava15/avg128/nuwa": 128.0,
    "llava15/avg64/nuwa": 64.0,
    # The defaults of the methods' own code: 3 layers of 576 and 29 of 288, of 144; 8 each of 576, 288, 144, 72.
    "llava15/authors/fastv-r50": 315.0,
    "llava15/authors/fastv-r75": 184.5,
    "llava15/authors/pdrop": 270.0,
}
QWEN_LAYERS = {"fastv": (3,), "reroute-fastv": (3, 6, 13, 20), "pdrop": (2, 6, 13, 20), "reroute-pdrop": (2, 6, 13, 20)}


@pytest.mark.parametrize("name", sorted(AVERAGES))
def test_published_schedules_have_their_published_averages(name: str):
    schedule = resolve(f"published:{name}")
    assert schedule.average_visual_tokens(576) == pytest.approx(AVERAGES[name], abs=0.0501)
    assert schedule.action == ("reroute" if "reroute" in name else "removal")


def test_every_published_name_is_covered():
    nuwa = {f"qwen25/keep{percent}/nuwa" for percent in (25, 50, 75)}
    assert set(PUBLISHED) == nuwa | set(AVERAGES) | {
        f"qwen25/avg{tier}/{method}" for tier in (64, 128, 192) for method in QWEN_LAYERS
    }


@pytest.mark.parametrize(("percent", "shares"), [(25, (0.35, 0.42)), (50, (0.6, 0.66)), (75, (0.85, 0.7))])
def test_nuwas_schedules_for_qwen_count_as_its_code(percent: int, shares: tuple[float, float]):
    """ceil(N s1) leave the tower and max(1, int(that s2)) stay behind layer 14, for every size of image."""
    spec = RoutingSpec.parse(f"published:qwen25/keep{percent}/nuwa")
    schedule = spec.resolve(num_layers=28, num_visual=576, sizes_vary=True)
    assert (schedule.action, schedule.decision_layers, schedule.scoring_layers) == ("removal", (15,), (14,))
    assert (schedule.rows, schedule.heads) == (3, "max")
    first, second = (Fraction(str(share)) for share in shares)
    for tokens in (576, 540, 144, 100, 7, 1):
        entering = math.ceil(tokens * first)
        assert schedule.entering(tokens) == entering
        assert schedule.visual_rows([entering]) == (entering, max(1, int(entering * second)))
    assert (schedule.nuwa, *schedule.budgets) == schedule.visual_rows([schedule.entering(576)])


def test_shares_of_a_method_follow_the_size_of_an_image():
    schedule = RoutingSpec.parse("reroute-nuwa:avg=1/4").resolve(num_layers=28, num_visual=576, sizes_vary=True)
    fixed = RoutingSpec.parse("reroute-nuwa:avg=1/4").resolve(num_layers=28, num_visual=576)
    assert (schedule.nuwa, schedule.budgets) == (fixed.nuwa, fixed.budgets)
    assert schedule.nuwa == 7 * schedule.budgets[0]
    for tokens in (576, 300, 144):
        assert schedule.average_visual_tokens(tokens) == pytest.approx(tokens / 4, rel=0.05)
    tokens = RoutingSpec.parse("nuwa:avg=64").resolve(num_layers=28, num_visual=576, sizes_vary=True)
    assert tokens.nuwa_share is None
    assert tokens.entering(50) == 50


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("removal@3:nuwa=100:keep=.1", "lets a number of tokens leave the tower and keeps a share"),
        ("removal@3:nuwa=.2:keep=.3", "the budget at layer 3 is 172 tokens, but there are 116"),
        ("removal@3:keep=.3:rows=0", "0 rows cannot score"),
        ("removal@3:keep=.3:rows=17", "17 rows cannot score"),
        ("removal@3:keep=.3:rows=two", "'two' in .* is not a number of rows"),
        ("removal@3:keep=.3:heads=most", "unknown heads 'most'"),
    ],
)
def test_what_cannot_be_scored_or_shared_is_refused(spec: str, message: str):
    with pytest.raises(UserError, match=message):
        RoutingSpec.parse(spec).resolve(num_layers=28, num_visual=576, sizes_vary=True)


@pytest.mark.parametrize("method", QWEN_LAYERS)
def test_published_qwen_schedules_have_the_same_ratios_at_scaled_layers(method: str):
    """As published for Qwen2.5-VL-7B: decision layers 3 | 2, 6, 13, 20 of 28, the ratios of LLaVA."""
    for tier in (64, 128, 192):
        schedule = resolve(f"published:qwen25/avg{tier}/{method}", num_layers=28)
        assert schedule.decision_layers == QWEN_LAYERS[method]
        assert schedule.budgets == resolve(f"published:llava15/avg{tier}/{method}").budgets


def test_authors_forms_of_the_published_schedules():
    fastv = resolve("published:llava15/authors/fastv-r50")
    assert (fastv.scoring, fastv.positions, fastv.scoring_layers) == ("previous", "original", (2,))
    pdrop = resolve("published:llava15/authors/pdrop")
    assert (pdrop.scoring, pdrop.positions, pdrop.budgets) == ("own", "renumbered", (288, 144, 72))
    nuwa = resolve("published:llava15/avg64/nuwa")
    assert (nuwa.scoring, nuwa.nuwa, nuwa.budgets, nuwa.scoring_layers) == ("previous", 112, (16,), (15,))
    assert nuwa.entering(576) == 112


# (decision layers of 24, tokens out of the tower, budgets) that an average of 1/9 of 576 means, by hand:
# fastv 2 * 576 + 22 * 17 <= 1536; nuwa 12 * 112 + 12 * 16 = 1536.
METHODS_OF_24 = {
    "fastv": ("removal", (2,), None, (17,)),
    "reroute-fastv": ("reroute", (2, 5, 11, 17), None, (18, 18, 17, 17)),
    "pdrop": ("removal", (2, 5, 11, 17), None, (93, 14, 2, 1)),
    "reroute-pdrop": ("reroute", (2, 5, 11, 17), None, (30, 28, 14, 6)),
    "nuwa": ("removal", (12,), 112, (16,)),
    "reroute-nuwa": ("reroute", (12, 15, 18, 21), 112, (16, 16, 16, 16)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_by_name_scales_its_layers_and_solves_its_budgets(method: str):
    schedule = resolve(f"{method}:avg=1/9", num_layers=24)
    found = (schedule.action, schedule.decision_layers, schedule.nuwa, schedule.budgets)
    assert found == METHODS_OF_24[method]
    assert 63.5 < schedule.average_visual_tokens(576) <= 64
    assert schedule.scoring == ("previous" if method == "nuwa" else "own")


@pytest.mark.parametrize("tier", [64, 128, 192])
def test_nuwa_by_name_is_nuwa_as_published(tier: int):
    ours, theirs = resolve(f"nuwa:avg={tier}"), resolve(f"published:llava15/avg{tier}/nuwa")
    assert ours == theirs


def test_options_win_over_a_methods_own():
    assert resolve("fastv@3:avg=128:score=previous").scoring_layers == (2,)
    assert resolve("pdrop:avg=128:shape=uniform").budgets[0] == resolve("pdrop:avg=128:shape=uniform").budgets[-1]
    assert resolve("nuwa:avg=64:nuwa=100").nuwa == 100
    assert resolve("pdrop@8,16,24:keep=.5,.25,.125:positions=renumbered") == resolve("published:llava15/authors/pdrop")


def test_toml_is_the_same_spec(tmp_path: Path):
    path = tmp_path / "routing.toml"
    for toml, text in (
        ('action = "reroute"\nlayers = [2, 7]\nkeep = [22, 11]', "reroute@2,7:keep=22,11"),
        ('method = "pdrop"\navg = "1/9"\npositions = "renumbered"', "pdrop:avg=1/9:positions=renumbered"),
        ('published = "llava15/avg64/pdrop"', "published:llava15/avg64/pdrop"),
        ('action = "dense"', "dense"),
    ):
        path.write_text(f"[routing]\n{toml}\n")
        assert RoutingSpec.parse(str(path)) == RoutingSpec.parse(text)


@pytest.mark.parametrize(
    ("toml", "message", "hint"),
    [
        (None, "cannot read the routing spec", "[routing]"),
        ("[routing", "cannot read the routing spec", "[routing]"),
        ("layers = [2]", "exactly one table, [routing]", "[routing]"),
        ("[routing]\nlayers = [2]", "exactly one of action, method and published", "action = "),
        ('[routing]\naction = "reroute"\nlayers = [2]\nkep = [3]', "unknown key 'kep'", "did you mean 'keep'?"),
        ('[routing]\naction = "reroute"\nlayers = [2]', "incomplete", "ACTION@LAYERS"),
    ],
)
def test_a_bad_toml_file_says_what_is_wrong(tmp_path: Path, toml: str | None, message: str, hint: str):
    path = tmp_path / "routing.toml"
    if toml is not None:
        path.write_text(toml)
    with pytest.raises(UserError) as error:
        RoutingSpec.parse(str(path))
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("rerout@2:keep=3", "unknown routing action 'rerout'", "did you mean 'reroute'?"),
        ("", "unknown routing action ''", "supported: dense, fastv, nuwa, pdrop, published, removal, reroute"),
        ("reroute", "incomplete", "reroute@2,7,15,23:avg=1/9"),
        ("dense@2:keep=3", "dense takes no layers and no options", "`dense` alone"),
        ("reroute@2", "incomplete", "ACTION@LAYERS"),
        ("reroute@a:keep=3", "'a' in 'reroute@a:keep=3' is not a layer number", "ACTION@LAYERS"),
        ("reroute@2:keep=x", "'x' in", "ACTION@LAYERS"),
        ("reroute@2:keep=1/0", "'1/0' in", "ACTION@LAYERS"),
        ("reroute@2:keep=1.5", "the share 1.5", "without a point"),
        ("reroute@2:keep=0.0", "the share 0.0", "without a point"),
        ("reroute@2:kep=3", "unknown key 'kep'", "did you mean 'keep'?"),
        ("reroute@2:avg=9:shape=halfing", "unknown shape 'halfing'", "did you mean 'halving'?"),
        ("reroute@2:shape=halving", "exactly one of keep=, avg=, flops= and kv=", "ACTION@LAYERS"),
        ("reroute@2:keep=3:avg=9", "exactly one of keep=, avg=, flops= and kv=", "ACTION@LAYERS"),
        ("reroute@2:flops=.5:kv=.5", "exactly one of keep=, avg=, flops= and kv=", "ACTION@LAYERS"),
        ("fastv", "incomplete", "ACTION@LAYERS"),
        ("fastw:avg=9", "unknown routing action 'fastw'", "did you mean 'fastv'?"),
        ("reroute@2:keep=3:score=last", "unknown score 'last'", "own, previous"),
        ("reroute@2:keep=3:positions=renumbered", "positions=renumbered has no meaning with reroute", "use removal"),
        ("removal@2:keep=3:nuwa=auto", "nuwa=auto has no meaning with keep=", "nuwa=112"),
        ("reroute@2:flops=3X", "'3X' in", "K, M, G, T"),
        ("reroute@2:kv=3MB", "'3MB' in", "MiB"),
        ("reroute@2:keep=3:keep=4", "keep= occurs twice", "ACTION@LAYERS"),
        ("reroute@2:keep=3:shape=uniform", "shape= has no meaning with keep=", "ACTION@LAYERS"),
        ("published:llava15/avg64/reroute-pdro", "unknown published schedule", "llava15/avg64/reroute-pdrop"),
    ],
)
def test_a_bad_spec_says_what_is_wrong_and_what_to_write(text: str, message: str, hint: str):
    with pytest.raises(UserError) as error:
        RoutingSpec.parse(text)
    assert message in error.value.message
    assert hint in error.value.hint
    assert error.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("reroute@7,2:keep=3,3", "must ascend, got 7,2", "2,7,15,23"),
        ("reroute@2,2:keep=3,3", "must ascend, got 2,2", "2,7,15,23"),
        ("reroute@2,24:keep=3,3", "2,24 do not fit a decoder of 24 layers", "0 to 23"),
        ("reroute@-1:keep=3", "-1 do not fit", "0 to 23"),
        ("reroute@2,7:keep=3", "2 decision layers but 1 budgets", "one budget for each"),
        ("reroute@2:keep=0", "the budget at layer 2 is 0", "at least 1"),
        ("reroute@2:keep=577", "577 tokens, but there are 576", "at most 576"),
        ("removal@2,7:keep=10,20", "removal keeps 20 tokens at layer 7, but only 10", "reroute allows it"),
        # 3 layers run all 576 tokens: 3 * 576 / 24 = 72, and 21 layers run one: 72.875.
        ("reroute@3:avg=64", "the least is 72.88", "earlier than layer 3, or ask for avg=73"),
        ("reroute@0:avg=0", "the least is 1.00", "ask for avg=1 or more"),
        ("removal@0:keep=3:score=previous", "none before layer 0", "score=own"),
        ("removal@2:keep=30:nuwa=20", "30 tokens, but there are 20 after Nüwa's first stage", "at most 20"),
        ("removal@2:keep=3:nuwa=600", "nuwa=600 tokens cannot leave a vision tower of 576", "1 to 576"),
        ("reroute@2:avg=600", "exceeds the 576", "dense"),
    ],
)
def test_a_spec_that_does_not_fit_the_model_gives_both_numbers(text: str, message: str, hint: str):
    with pytest.raises(UserError) as error:
        resolve(text, num_layers=24)
    assert message in error.value.message
    assert hint in error.value.hint
    assert error.value.exit_code == EXIT_USAGE


def test_reroute_budgets_may_grow_again():
    assert resolve("reroute@2,7:keep=10,20").budgets == (10, 20)


def test_the_hint_of_an_impossible_average_is_possible():
    assert resolve("reroute@3:avg=73", num_layers=24).average_visual_tokens(576) <= 73


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (Stage(start=1, stop=4, keep=None),),
        (Stage(start=0, stop=2, keep=None), Stage(start=3, stop=4, keep=1)),
        (Stage(start=0, stop=2, keep=None), Stage(start=2, stop=4, keep=None)),
        (Stage(start=0, stop=2, keep=None), Stage(start=2, stop=4, keep=0)),
        (Stage(start=0, stop=2, keep=3), Stage(start=2, stop=4, keep=3)),
        (Stage(start=0, stop=4, keep=None), Stage(start=4, stop=2, keep=3)),
        (Stage(start=0, stop=4, keep=None),),
    ],
)
def test_a_schedule_with_holes_is_refused(stages: tuple[Stage, ...]):
    with pytest.raises(ValueError, match="stage"):
        Schedule(action="reroute", stages=stages)


@st.composite
def solvable(draw: st.DrawFn) -> tuple[str, int, int, Fraction]:
    """A spec with avg=, a model it fits, and the target in tokens."""
    num_layers = draw(st.integers(2, 80))
    num_visual = draw(st.integers(1, 3000))
    layers = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=8)))
    action = draw(st.sampled_from(["reroute", "removal"]))
    least = layers[0] * num_visual + num_layers - layers[0]
    rows = draw(st.integers(least, num_layers * num_visual))
    target = Fraction(rows, num_layers)
    if draw(st.booleans()):
        target = Fraction(-(-target // 1))
        amount = str(target)
    else:
        amount = f"{rows}/{num_layers * num_visual}"
    text = f"{action}@{','.join(map(str, layers))}:avg={amount}:shape={draw(st.sampled_from(SHAPES))}"
    return text, num_layers, num_visual, target


@given(solvable())
def test_the_solver_never_exceeds_the_target_and_leaves_no_room_unused(case: tuple[str, int, int, Fraction]):
    text, num_layers, num_visual, target = case
    schedule = resolve(text, num_layers, num_visual)
    budgets = schedule.budgets
    rows = sum(stage.num_layers * stage.visual_rows(num_visual) for stage in schedule.stages)
    left = target * num_layers - rows
    assert left >= 0
    assert all(1 <= budget <= num_visual for budget in budgets)
    assert list(budgets) == sorted(budgets, reverse=True)
    # One token more in any stage that may still grow would exceed the target.
    limits = (num_visual, *budgets)
    growable = [
        stage.num_layers
        for stage, budget, limit in zip(schedule.stages[1:], budgets, limits, strict=False)
        if budget < limit
    ]
    assert all(left < span for span in growable)
    assert growable or left < 1


@given(solvable())
def test_the_first_stage_bounds_how_far_below_the_target_the_average_is(case: tuple[str, int, int, Fraction]):
    text, num_layers, num_visual, target = case
    schedule = resolve(text, num_layers, num_visual)
    longest = max(stage.num_layers for stage in schedule.stages[1:])
    assert float(target) - schedule.average_visual_tokens(num_visual) < longest / num_layers + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_solved_budgets_follow_the_shape(shape: Shape):
    budgets = resolve(f"reroute@2,7,15,23:avg=128:shape={shape}").budgets
    # The remainder of flooring goes to the front, so the last budget tells the scale best.
    root = {"uniform": 1, "halving": 1, "geometric": 4}[shape]
    scale = (budgets[-1] / 576 * {"uniform": 1, "halving": 4, "geometric": 1}[shape]) ** (1 / root)
    assert budgets == pytest.approx([share * 576 for share in shares(shape, 4, scale)], abs=6)


def test_shares_of_the_solver_scale_with_the_image():
    for num_visual in (100, 256, 576, 1024):
        average = resolve("reroute@2,7,15,23:avg=1/9", num_visual=num_visual).average_visual_tokens(num_visual)
        assert average == pytest.approx(num_visual / 9, abs=9 / 32)
