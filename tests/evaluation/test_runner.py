"""The order in which bundles are opened, images encoded and questions asked."""

from __future__ import annotations

from dataclasses import replace

from reroute.evaluation import runner
from reroute.evaluation.runner import Run, groups, run_bundles
from reroute.manifest import Tier
from reroute.runtime import Bundle
from tests.evaluation.fakes import FakeEngine, FakeSet, bundle_of

ROUTED = "reroute@2,4:keep=5,3"


def run(bundles: list[Bundle], questions: FakeSet) -> tuple[list[Run], list[tuple[str, ...]], list[FakeEngine], int]:
    log: list[tuple[str, ...]] = []
    engines: list[FakeEngine] = []
    answered: list[None] = []

    def open_engine(bundle: Bundle) -> FakeEngine:
        assert all(engine.closed for engine in engines) or bundle.manifest.files["vision.onnx"].bytes < 1 << 30
        engines.append(FakeEngine(bundle, lambda prompt: prompt, log))
        return engines[-1]

    runs = run_bundles(bundles, questions, open_engine=open_engine, advance=lambda: answered.append(None))
    assert all(engine.closed for engine in engines)
    return runs, log, engines, len(answered)


def test_an_image_is_drawn_and_encoded_once_for_all_bundles_that_see_alike():
    bundles = [bundle_of("dense", path="d"), bundle_of(ROUTED, path="r"), bundle_of(ROUTED, path="x", vision="other")]
    questions = FakeSet([1, 1, 2])
    runs, log, _, answered = run(bundles, questions)
    assert questions.opened == ["1", "2"]
    assert [entry[:2] for entry in log] == [
        *[("d", "encode"), ("d", "ask"), ("d", "ask"), ("r", "ask"), ("r", "ask")],
        *[("x", "encode"), ("x", "ask"), ("x", "ask")],
        *[("d", "encode"), ("d", "ask"), ("r", "ask"), ("x", "encode"), ("x", "ask")],
    ]
    assert {entry[2:] for entry in log if entry[1] == "ask"} == {
        ("q0", "features of 1", "5"),
        ("q1", "features of 1", "5"),
        ("q2", "features of 2", "5"),
    }
    assert answered == 9
    assert [run.bundle for run in runs] == bundles


def test_records_hold_the_answer_its_grade_and_what_was_measured():
    (result,), *_ = run([bundle_of(ROUTED)], FakeSet([1, 1, 2]))
    where, word, _ = result.records
    assert [record.id for record in result.records] == ["0", "1", "2"]
    assert (where.skill, where.size, where.iou, where.score) == ("grounding", "large", 1.0, 1.0)
    assert (word.answer, word.score, word.iou, word.size) == ("q1", 1.0, None, None)
    assert where.rows == (16, 5, 3)  # 7 prompt rows and 2 decode steps are not visual
    assert where.kv_bytes == (25 + 14 + 12) * 10
    assert where.entered == 1.0
    assert [(d.layer, d.kept, d.share) for d in where.decisions] == [(2, 5, 5 / 16), (4, 3, 3 / 16)]
    assert word.entered is None
    assert [d.share for d in word.decisions] == [None, None]
    assert result.engine == {"engine": "fake"}


def test_large_bundles_run_alone():
    small, large = bundle_of(path="s", size=10), bundle_of(path="l", size=2 << 30)
    sizes = [small, small, large, small, large, large]
    assert [len(group) for group in groups(sizes)] == [2, 1, 1, 1, 1]
    assert [bundle for group in groups(sizes) for bundle in group] == sizes
    assert list(groups([])) == []
    assert [len(group) for group in groups([small] * 5, limit=40)] == [2, 2, 1]  # two files of 10 bytes each
    questions = FakeSet([1, 2])
    runs, _, _, _ = run([bundle_of(path="l", size=2 << 30), bundle_of(path="m", size=2 << 30)], questions)
    assert questions.opened == ["1", "2", "1", "2"]
    assert [len(run.records) for run in runs] == [2, 2]


def test_tiers_of_a_large_bundle_share_its_engine():
    """They stay together whatever the limit, one engine is opened, and each question is asked in its own tier."""
    manifest = bundle_of(ROUTED).manifest
    names = {"a": ROUTED, "b": "reroute@2,4:keep=9,2"}
    tiers = {}
    for name, routing in names.items():
        one = bundle_of(routing).manifest
        tiers[name] = Tier(
            routing=routing,
            schedule=one.schedule,
            average_visual_tokens=one.average_visual_tokens,
            cache_rows=one.cache_rows,
            estimates=one.estimates,
            reference=f"{name}.npz",
        )
    tiered = replace(bundle_of(ROUTED, path="t", size=2 << 30), manifest=replace(manifest, tier="a", tiers=tiers))
    other = bundle_of(ROUTED, path="o")
    views = [tiered.at("a"), tiered.at("b"), other]
    assert [len(group) for group in groups(views, limit=3)] == [2, 1]
    runs, log, engines, _ = run(views, FakeSet([1, 1]))
    assert [entry[0] for entry in log] == ["t", "t", "t", "t", "t", "o", "o"]
    assert len(engines) == 2
    kept = [[[decision.kept for decision in record.decisions] for record in one.records] for one in runs]
    assert kept == [[[5, 3]] * 2, [[9, 2]] * 2, [[5, 3]] * 2]


def test_the_limit_leaves_room_for_the_demo_and_not_for_7b():
    assert 100 << 20 < runner.TOGETHER_BYTES < 7e9
