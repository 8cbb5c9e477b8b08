"""Tables from records made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reroute.evaluation.markdown import to_markdown
from reroute.evaluation.statistics import Bootstrap
from reroute.evaluation.summary import agreement, decisions, differences, facts, names_of, scores, summarise
from tests.evaluation.fakes import decision, record, run_of

ROUTED = "reroute@2,4:keep=5,3"
REMOVED = "removal@2,4:keep=5,3"
BOOTSTRAP = Bootstrap(resamples=200)
HALF = (0.0, 0.0, 0.5, 1.0)
THIRD = (0.0, 0.0, 0.3, 1.0)


def value(table: dict, *path: str) -> float:
    for key in path:
        table = table[key]
    return table["value"]


def test_scores_by_size_and_kind():
    records = [
        record(0, size="small", score=1.0, iou=0.8),
        record(1, size="small", score=0.0, iou=0.2),
        record(2, size="large", score=1.0, iou=0.5),
        record(3, size="large", score=0.0, iou=0.0, box=None),
        record(4, skill="vqa", kind="count", score=1.0),
        record(5, skill="vqa", kind="left", score=0.0),
        record(6, skill="vqa", kind="left", score=0.0),
        record(7, skill="vqa", kind="left", score=1.0),
    ]
    table = scores(records, BOOTSTRAP)
    assert value(table, "grounding", "accuracy") == 0.5
    assert value(table, "grounding", "mean_iou") == pytest.approx(1.5 / 4)
    assert table["grounding"]["no_box"] == 1
    assert list(table["grounding"]["by_size"]) == ["small", "large"]
    assert value(table, "grounding", "by_size", "small", "mean_iou") == 0.5
    assert value(table, "grounding", "by_size", "large", "accuracy") == 0.5
    assert table["grounding"]["by_size"]["large"]["accuracy"]["questions"] == 2
    assert value(table, "vqa", "accuracy") == 0.5
    assert value(table, "vqa", "by_kind", "left") == pytest.approx(1 / 3)
    assert table["vqa"]["by_kind"]["count"]["questions"] == 1
    assert scores([], BOOTSTRAP) == {}


def test_agreement_is_about_the_text_and_the_place():
    mine = [
        record(0, answer="a", box=HALF),
        record(1, answer="b", box=THIRD),
        record(2, answer="c", box=None),
        record(3, skill="vqa", answer="x"),
        record(4, skill="vqa", answer="y"),
    ]
    dense = [
        record(0, answer="a", box=HALF),
        record(1, answer="d", box=HALF),
        record(2, answer="e"),
        record(3, skill="vqa", answer="x", score=0.0),
        record(4, skill="vqa", answer="z"),
    ]
    table = agreement(run_of(mine, ROUTED), run_of(dense), BOOTSTRAP)
    assert value(table, "grounding") == pytest.approx(1 / 3)
    assert value(table, "same_place") == pytest.approx(2 / 3)
    assert value(table, "vqa") == 0.5  # both are wrong about 3, and agree
    assert table["same_checkpoint"]
    other = agreement(run_of(mine, ROUTED, checkpoint="1"), run_of(dense), BOOTSTRAP)
    assert not other["same_checkpoint"]


def test_differences_are_first_minus_second_and_dense_comes_last():
    good = [record(n, score=1.0, iou=0.9) for n in range(9)] + [record(9, skill="vqa", score=0.0)]
    poor = [record(n, score=0.0, iou=0.4) for n in range(9)] + [record(9, skill="vqa", score=1.0)]
    runs = [run_of(good), run_of(poor, ROUTED), run_of(good, REMOVED)]
    table = differences(names_of(runs), runs, BOOTSTRAP)
    assert [(row["first"], row["second"]) for row in table] == [
        (ROUTED, REMOVED),
        (ROUTED, "dense"),
        (REMOVED, "dense"),
    ]
    against = table[0]
    assert value(against, "grounding", "accuracy") == -1.0
    assert value(against, "grounding", "mean_iou") == pytest.approx(-0.5)
    assert value(against, "grounding", "by_size", "small", "accuracy") == -1.0
    assert value(against, "vqa", "accuracy") == 1.0
    assert against["grounding"]["accuracy"]["high"] < 0
    same = table[2]["grounding"]["mean_iou"]
    assert (same["low"], same["high"]) == (0.0, 0.0)


def test_differences_pair_questions_and_not_positions():
    first = [record(n, score=float(n % 2)) for n in range(8)]
    table = differences(["a", "b"], [run_of(first, ROUTED), run_of(first[::-1], REMOVED)], BOOTSTRAP)
    assert table[0]["grounding"]["accuracy"]["high"] == 0.0


def test_decisions_are_means_and_objects_count_where_there_is_one():
    records = [
        record(0, decisions=(decision(2, kept=5, share=0.5), decision(4, kept=3, returned=1, recovered=2, share=0.0))),
        record(1, decisions=(decision(2, kept=5, share=1.0), decision(4, kept=3, returned=3, recovered=3, share=0.2))),
        record(2, skill="vqa", decisions=(decision(2, kept=5, share=None), decision(4, kept=3, share=None))),
    ]
    first, second = decisions(run_of(records, ROUTED), BOOTSTRAP)
    assert (first["layer"], first["kept"], first["returned"]) == (2, 5.0, 0.0)
    assert value(first, "object", "grounding", "share") == 0.75
    assert value(first, "object", "grounding", "any") == 1.0
    assert (second["layer"], second["kept"]) == (4, 3.0)
    assert second["returned"] == pytest.approx(4 / 3)
    assert second["recovered"] == pytest.approx(5 / 3)
    assert value(second, "object", "grounding", "share") == pytest.approx(0.1)
    assert value(second, "object", "grounding", "any") == 0.5
    assert list(second["object"]) == ["grounding"]


def test_costs_are_measured_and_not_the_plan():
    # Stages of 1, 3 and 2 layers; the second question was measured with fewer rows than the schedule says.
    records = [record(0, rows=(16, 5, 3), kv_bytes=100), record(1, rows=(16, 1, 1), kv_bytes=200)]
    measured = facts(run_of(records, "reroute@1,4:keep=5,3"))["measured"]
    assert measured["visual_tokens_per_layer"] == pytest.approx((37 + 21) / 6 / 2)
    assert measured["visual_tokens_per_stage"] == [16, 3, 2]
    assert measured["kv_bytes"] == 150


def test_names_are_unique():
    records = [record(0)]
    runs = [run_of(records, path="x/a"), run_of(records, ROUTED), run_of(records, path="x/b")]
    assert names_of(runs) == ["dense (a)", ROUTED, "dense (b)"]
    assert names_of([*runs, run_of(records, path="y/b")]) == ["dense (a)", ROUTED, "dense (x/b)", "dense (y/b)"]


def document(*runs: object) -> dict:
    asked = {"set": "fake", "grounding": 2, "vqa": 1, "images": 3}
    statistics = {"level": 0.95, "resamples": 200}
    return {"questions": asked, "statistics": statistics, **summarise(runs, BOOTSTRAP)}  # type: ignore[arg-type]


def test_the_markdown_has_every_table_and_every_row_has_every_cell():
    ran: dict[str, Any] = {"decisions": (decision(2), decision(4, returned=2)), "rows": (16, 5, 3)}
    routed = [
        record(0, score=0.0, iou=0.1, **ran),
        record(1, size="large", score=0.0, iou=0.2, **ran),
        record(2, skill="vqa", answer="3", **ran | {"decisions": (decision(2, share=None), decision(4, share=None))}),
    ]
    dense = [record(0), record(1, size="large"), record(2, skill="vqa", answer="3")]
    text = to_markdown(
        document(run_of(routed, ROUTED, checkpoint="other", path="x"), run_of(dense), run_of(dense, path="a|b"))
    )
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        "# fake",
        "## Bundles",
        "## Grounding",
        "## Answers, % right",
        "## Agreement with the dense engine",
        "## Differences, question by question",
        "## Decisions",
    ]
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    assert (
        f"| `{ROUTED}` - `dense (bundle)` | **-100.0 [-100.0, -100.0]** | **-0.850 [-0.900, -0.800]** | +0.0 |" in text
    )
    assert "Of another checkpoint than `dense (bundle)`: `" + ROUTED + "`." in text
    assert "| `dense (bundle)` - `dense (a\\|b)` | +0.0 [+0.0, +0.0] |" in text  # not bold
    assert f"| `{ROUTED}` | 2 | 16.0 | 0.0 | 0.0 | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | - | - |" in text
    assert f"| `{ROUTED}` | 4 | 16.0 | 1.3 | 0.0 | 100.0" in text
    assert "medium, %" in text
    assert "nan" not in text


def test_a_set_of_one_skill_leaves_the_other_tables_out():
    data = document(run_of([record(0, skill="vqa"), record(1, skill="vqa")]))
    data["questions"] |= {"grounding": 0, "vqa": 2}
    text = to_markdown(data)
    assert "## Answers" in text
    for title in ("Grounding", "Agreement", "Differences", "Decisions"):
        assert title not in text
    json.dumps(data, allow_nan=False)
