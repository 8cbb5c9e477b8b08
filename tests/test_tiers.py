"""What a user writes for tiers, what they must have in common, and how the manifest says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reroute.errors import UserError
from reroute.manifest import FILE_NAME, Capacity, Manifest, Tier
from reroute.tiers import parse_tiers, reference_of, resolve_tiers, traced_schedule
from tests.model_descriptions import model_of
from tests.test_manifest import manifest_of

MODEL = model_of()  # 32 layers, 576 visual tokens
CAPACITY = Capacity(max_text=100, max_images=2)
SPECS = ("reroute-pdrop:avg=1/9", "dense", "reroute-pdrop:avg=1/3", "best=reroute-pdrop:avg=2/3")


def resolve(*specs: str) -> dict[str, Tier]:
    return resolve_tiers(parse_tiers(specs[0], specs[1:]), MODEL, CAPACITY)


def tiered(folder: Path) -> Manifest:
    tiers = resolve(*SPECS)
    first = tiers["1/9"]
    return manifest_of(
        folder,
        tiers=tiers,
        tier="1/9",
        routing=first.routing,
        schedule=first.schedule,
        average_visual_tokens=first.average_visual_tokens,
        cache_rows=first.cache_rows,
        estimates=first.estimates,
    )


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (SPECS, ["1/9", "dense", "1/3", "best"]),
        (("fastv:avg=64", "fastv:avg=.25:score=own"), ["64", ".25"]),
        (("reroute@2,4:keep=22,11", "reroute@2,4:keep=.5,.25"), ["22-11", ".5-.25"]),
        (("reroute@2:flops=.5", "reroute@2:flops=1.2T", "reroute@2:kv=64MiB"), ["flops-.5", "flops-1.2T", "kv-64MiB"]),
        (("published:llava15/avg64/pdrop", "published:llava15/avg128/pdrop"), ["avg64", "avg128"]),
        (("reroute@2,4:avg=1/3", "reroute@2,4:avg=1/3:shape=uniform"), ["1/3", "1/3-2"]),
        (("reroute@2:avg=1/3", "1/3=reroute@2:avg=1/4", "reroute@2:avg=1/5"), ["1/3-2", "1/3", "1/5"]),
        (("low = reroute@2:avg=1/3", " 2/9=reroute@2:avg=2/9 "), ["low", "2/9"]),
    ],
)
def test_a_tier_has_the_name_that_is_written_or_its_budgets(specs: tuple[str, ...], names: list[str]):
    found = parse_tiers(specs[0], specs[1:])
    assert list(found) == names
    assert all("=" not in spec.text.split(":")[0] for spec in found.values())


def test_without_tiers_there_are_none():
    assert parse_tiers("dense", ()) == {}


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (("a=dense", "b=fastv:avg=1/3", "a=fastv:avg=1/4"), "two tiers have the name 'a'"),
        (("fastv:avg=1/3", "=fastv:avg=1/4"), "'' in '=fastv:avg=1/4' is no name"),
        (("fastv:avg=1/3", "a b=fastv:avg=1/4"), "'a b' in"),
        (("fastv:avg=1/3", "../x=fastv:avg=1/4"), "'../x' in"),
        (("fastv:avg=1/3", "a="), "the tier 'a' has no routing spec"),
        (("fastv:avg=1/3", "a=fastvv:avg=1/4"), "unknown routing action 'fastvv'"),
        (("dense", "all=dense"), "every tier is dense"),
        (("fastv:avg=1/3", "dense", "all=dense"), "the tiers 'dense' and 'all' are the same schedule"),
        (("fastv:avg=64", "x=fastv:avg=1/9"), "the tiers '64' and 'x' are the same schedule"),
        (("pdrop:avg=1/3", "reroute-pdrop:avg=1/4"), "differ in action (removal and reroute); tiers"),
        (("pdrop:avg=1/3", "fastv:avg=1/4"), "the tiers '1/3' and '1/4' differ in decision layers (2,7,15,23 and 3);"),
        (
            ("dense", "fastv:avg=1/3", "removal@3:avg=1/4:score=previous:positions=renumbered"),
            "the tiers '1/3' and '1/4' differ in score (own and previous), positions (original and renumbered);",
        ),
        (("fastv:avg=1/3", "fastv:avg=1/4:pool=image"), "differ in pool (all and image)"),
        (("removal@16:nuwa=112:keep=16", "removal@16:nuwa=224:keep=32"), "differ in nuwa (112 and 224)"),
        (("removal@16:nuwa=112:keep=16", "removal@16:keep=32"), "differ in nuwa (112 and all)"),
        (("removal@16:nuwa=112:keep=16", "dense"), "the tier 'dense' would be dense, but the vision graph"),
        (("removal@3,5:keep=9,4", "removal@3,5:keep=4,9"), "removal keeps 9 tokens at layer 5"),
    ],
)
def test_tiers_that_cannot_share_a_graph_are_refused(specs: tuple[str, ...], says: str):
    with pytest.raises(UserError) as caught:
        resolve(*specs)
    assert says in caught.value.message
    assert caught.value.hint


def test_dense_keeps_whatever_a_session_can_ask_about():
    tiers = resolve(*SPECS)
    dense, other = tiers["dense"].schedule, tiers["1/9"].schedule
    assert dense.decision_layers == other.decision_layers == (2, 7, 15, 23)
    assert dense.action == "reroute"
    for counts in ([576], [576, 576], [100, 576]):
        assert dense.visual_rows(counts) == (sum(counts),) * 5
    assert tiers["dense"].average_visual_tokens == 576
    assert tiers["dense"].cache_rows == (100 + 2 * 576,) * 5
    assert tiers["dense"].routing == "dense"
    assert tiers["dense"].estimates["kv_bytes"] == tiers["dense"].estimates["dense_kv_bytes"]


def test_each_tier_has_a_file_for_its_reference_and_the_default_the_usual_one():
    tiers = resolve("2/9=fastv:avg=2/9", "2-9=fastv:avg=1/9", "2+9=fastv:avg=1/3", "a/B=fastv:avg=1/2", "dense")
    names = [tier.reference for tier in tiers.values()]
    assert names == [
        "reference.npz", "reference.2-9.npz", "reference.2-9-2.npz", "reference.a-B.npz", "reference.dense.npz",
    ]  # fmt: skip


def test_the_graph_is_traced_with_the_ops_that_every_budget_needs():
    """Shares and budgets for each image need another op than budgets in tokens, and that op can say both."""
    from reroute.schedule import Schedule, Stage

    def tier(*stages: Stage) -> Tier:
        schedule = Schedule(action="reroute", stages=(Stage(start=0, stop=1, keep=None), *stages))
        return Tier(routing="", schedule=schedule, average_visual_tokens=0, cache_rows=(), estimates={}, reference="")

    tokens, more = tier(Stage(start=1, stop=2, keep=3)), tier(Stage(start=1, stop=2, keep=8))
    share = tier(Stage(start=1, stop=2, keep=9, share=(1, 2)))
    assert traced_schedule({"a": more, "b": tokens}) == tokens.schedule
    assert traced_schedule({"a": tokens, "b": share}) == share.schedule
    assert share.schedule.portions == ((1, 2),)
    assert tokens.schedule.portions == ((3, 0),)


def test_a_manifest_with_tiers_is_what_it_was_after_a_round_trip(tmp_path: Path):
    manifest = tiered(tmp_path)
    manifest.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.to_json() == manifest.to_json()
    data = json.loads(manifest.to_json())
    assert data["tier"] == "1/9"
    assert list(data["tiers"]) == ["1/9", "dense", "1/3", "best"]
    assert data["tiers"]["1/3"]["routing"] == "reroute-pdrop:avg=1/3"


def test_a_manifest_without_tiers_does_not_mention_them(tmp_path: Path):
    assert not {"tier", "tiers"} & json.loads(manifest_of(tmp_path).to_json()).keys()


def test_the_manifest_of_a_tier_is_that_of_an_export_of_its_own(tmp_path: Path):
    manifest = tiered(tmp_path)
    for name, tier in manifest.tiers.items():
        view = manifest.at(name)
        assert (view.tier, view.routing, view.schedule) == (name, tier.routing, tier.schedule)
        assert (view.cache_rows, view.average_visual_tokens) == (tier.cache_rows, tier.average_visual_tokens)
        assert view.estimates == tier.estimates
        assert reference_of(view) == tier.reference
        assert view.at("1/9") == manifest
    assert manifest.at(None) is manifest
    assert manifest.at("1/9") is manifest
    assert [view.tier for view in manifest.at("dense").all_tiers] == list(manifest.tiers)
    assert manifest_of(tmp_path).all_tiers == (manifest_of(tmp_path),)


def test_an_unknown_tier_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match="unknown tier 'bets'") as caught:
        tiered(tmp_path).at("bets")
    assert "did you mean 'best'? supported: 1/3, 1/9, best, dense" in caught.value.hint
    with pytest.raises(UserError, match=r"there is no tier 'dense': reroute@.* is all that was exported") as caught:
        manifest_of(tmp_path).at("dense")
    assert "--tier SPEC" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(tier="none"), "the tier 'none' is none of 1/9, dense, 1/3, best"),
        (lambda data: data.update(tiers={}), "the tier '1/9' is none of no tiers"),
        (lambda data: data["cache_rows"].__setitem__(1, 7), "are not those of the tier '1/9'"),
        (lambda data: data["tiers"]["dense"]["schedule"].update(scoring="previous"), "in more than their budgets"),
        (lambda data: data["tiers"]["dense"]["schedule"]["stages"][1].update(keep=0), "at least 1"),
        (lambda data: data["tiers"]["dense"].pop("reference"), "tiers.dense lacks reference"),
    ],
)
def test_a_manifest_whose_tiers_do_not_fit_is_refused(change: Any, says: str, tmp_path: Path):
    data = json.loads(tiered(tmp_path).to_json())
    change(data)
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Manifest.load(tmp_path)
    assert says in caught.value.message
