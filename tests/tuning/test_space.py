"""The search space: what is enumerated, what is the same, what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from reroute.cost import plan_for, resolve
from reroute.errors import UserError
from reroute.manifest import Capacity
from reroute.published import METHODS
from reroute.routing import RoutingSpec
from reroute.tuning.document import to_toml
from reroute.tuning.space import Space, entries_of, parse_space, read_space
from reroute.tuning.trace import Entry
from tests.model_descriptions import model_of

MODEL = model_of()


def entries(space: Space, num_text: int = 64) -> list[Entry]:
    return entries_of(space, MODEL, Capacity(), num_text=num_text)


def by_name(space: Space) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries(space)}


def test_the_default_space_is_every_method_at_four_averages_and_dense():
    names = [entry.name for entry in entries(Space())]
    assert names == ["dense", *(f"{method}:avg={a}" for method in METHODS for a in ("1/9", "1/6", "2/9", "1/3"))]


def test_everything_is_combined_and_own_means_the_method():
    space = Space(
        methods=("pdrop", "reroute"), averages=("1/9", "64"), layers=("own", "2,7"), shapes=("own", "uniform")
    )
    assert space.texts() == [
        "pdrop:avg=1/9",
        "pdrop:avg=1/9:shape=uniform",
        "pdrop@2,7:avg=1/9",
        "pdrop@2,7:avg=1/9:shape=uniform",
        "pdrop:avg=64",
        "pdrop:avg=64:shape=uniform",
        "pdrop@2,7:avg=64",
        "pdrop@2,7:avg=64:shape=uniform",
        "reroute@2,7:avg=1/9",
        "reroute@2,7:avg=1/9:shape=uniform",
        "reroute@2,7:avg=64",
        "reroute@2,7:avg=64:shape=uniform",
    ]


def test_specs_that_mean_one_schedule_are_one_entry():
    # 64 of 576 tokens are a ninth; FastV has one decision, so every shape is uniform.
    space = Space(methods=("fastv",), averages=("1/9", "64"), shapes=("own", "uniform", "geometric"), specs=("dense",))
    dense, fastv = entries(space)
    assert (dense.name, dense.also) == ("dense", ())
    assert fastv.name == "fastv:avg=1/9"
    assert set(fastv.also) == {
        "fastv:avg=1/9:shape=uniform",
        "fastv:avg=1/9:shape=geometric",
        "fastv:avg=64",
        "fastv:avg=64:shape=uniform",
        "fastv:avg=64:shape=geometric",
    }


def test_schedules_of_equal_budgets_and_another_action_are_not_merged():
    found = by_name(Space(methods=("removal", "reroute"), layers=("2,7",), averages=("1/3",), shapes=("uniform",)))
    assert len(found) == 3
    assert all(entry.also == () for entry in found.values())


def test_what_the_model_cannot_do_is_kept_with_its_reason():
    found = by_name(Space(methods=("nuwa", "fastv"), averages=("1/9", "1/100"), layers=("own", "40")))
    assert found["fastv:avg=1/100"].status == "unreachable"
    assert "impossible" in found["fastv:avg=1/100"].reason
    assert "do not fit a decoder of 32 layers" in found["fastv@40:avg=1/9"].reason
    assert found["fastv:avg=1/9"].status == "candidate"


def test_the_plan_is_the_plan_of_the_measured_prompt():
    (_, entry) = entries(Space(methods=("reroute-pdrop",), averages=("1/9",)), num_text=100)
    schedule = resolve(RoutingSpec.parse("reroute-pdrop:avg=1/9"), MODEL)
    assert entry.schedule == schedule
    assert entry.plan == plan_for(MODEL, schedule, Capacity(), num_text=100)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"methods": ("reroute",)}, "no decision layers of their own"),
        ({"methods": ("fastv",), "averages": ("1/100",)}, "none of the 1 specs is possible"),
        ({"methods": ("fastv",), "averages": ("9/1",)}, "not between 0 and 1"),
        ({"methods": ("fastv",), "shapes": ("round",)}, "unknown shape 'round'"),
        ({"methods": ("fastv",), "layers": ("two",)}, "is not a layer number"),
        ({"methods": (), "specs": ("fastv",)}, "incomplete routing spec"),
    ],
)
def test_a_space_without_a_candidate_is_an_error(space: dict, message: str):
    with pytest.raises(UserError) as error:
        entries(Space(**space))
    assert message in error.value.message
    assert error.value.hint


def test_a_file_says_the_same_as_options(tmp_path: Path):
    file = tmp_path / "space.toml"
    file.write_text(
        '[space]\nmethods = ["reroute"]\naverages = ["1/9", 64]\nlayers = [[2, 7], "2,12,17"]\nshapes = ["uniform"]\n'
    )
    options = parse_space(methods="reroute", averages="1/9, 64", layers="2,7;2,12,17", shapes="uniform")
    assert parse_space(file) == options
    assert options.layers == ("2,7", "2,12,17")


def test_a_file_of_specs_is_only_those(tmp_path: Path):
    file = tmp_path / "space.toml"
    file.write_text('[space]\nspecs = ["published:llava15/avg64/pdrop", "removal@3:keep=.25:score=previous"]\n')
    assert read_space(file).texts() == ["published:llava15/avg64/pdrop", "removal@3:keep=.25:score=previous"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[space", "cannot read"),
        ("[routing]\n", "exactly one table, [space]"),
        ('[space]\nmethod = ["fastv"]\n', "unknown key 'method'"),
        ('[space]\nmethods = "fastv"\n', "not a list"),
        ('[space]\nmethods = ["fastw"]\n', "unknown method 'fastw'"),
        ('[space]\nmethods = ["fastv"]\naverages = []\n', "methods but no averages"),
        ("[space]\nspecs = []\n", "0 specs"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path):
    file = tmp_path / "space.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_space(file)
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "spec",
    [
        "dense",
        "reroute-pdrop:avg=1/9",
        "nuwa:avg=64:shape=uniform",
        "reroute@2,7,15,23:keep=22,22,11,6",
        "removal@8,16:keep=.5,.25:positions=renumbered",
        "removal@3:keep=.25:score=previous",
        "reroute-fastv@2,9:kv=164MiB",
        "published:llava15/avg64/reroute-pdrop",
    ],
)
def test_a_spec_written_as_toml_means_the_same(spec: str, tmp_path: Path):
    file = tmp_path / "routing.toml"
    file.write_text(to_toml(spec))
    assert resolve(RoutingSpec.parse(str(file)), MODEL) == resolve(RoutingSpec.parse(spec), MODEL)
