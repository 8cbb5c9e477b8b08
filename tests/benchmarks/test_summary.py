"""Verdicts: met, not met, not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.summary import Aim, aims, read
from reroute.errors import UserError


def ratios(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"value": value, "low": value, "high": value} for name, value in values.items()}


def found() -> dict[str, Any]:
    """Everything met, just."""
    tier = {"share_of_allowed": ratios(x=0.95)["x"], "routing_share": 0.02}
    session = {"peak_rss_bytes": 100.0, "bound_bytes": 100.0, "load_ms": 50.0}
    sizes = [{"candidate": f"own int8, {tier}", "size": size} for tier in ("dense", "64") for size in (144, 576, 2304)]
    return {
        "prefill": {"speedup_profile": "int8",
                    "speedup_over_authors_bf16": {"64": 2.5, "128": 2.2, "192": 1.9, "dense": 1.0}},
        "costs": {"found": {"own int8, 64": tier, "own int8, 192": tier}},
        "decode": {"speedup_over_transformers_bf16": ratios(int8=3.5, int4=5.0),
                   "speedup_over_genai": ratios(int8=1.0, int4=1.0),
                   "speedup_over_llama_cpp": ratios(int8=1.0, int4=1.0)},
        "footprint": {"sessions": {"own int8, 64": session, "own int8, dense": session}, "import_s": {"median": 0.3}},
        "scaling": {"visual": {"cells": sizes}, "text": {"cells": sizes}},
    }  # fmt: skip


def unmet(results: dict[str, Any]) -> list[str]:
    return [aim.name for aim in aims(results) if aim.met is False]


def test_all_are_met_at_their_bounds() -> None:
    assert [aim.word for aim in aims(found())] == ["yes"] * 16


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("prefill speedup_over_authors_bf16 64", 2.49, "average of 64"),
        ("prefill speedup_over_authors_bf16 192", 1.89, "average of 192"),
        ("prefill speedup_over_authors_bf16 dense", 0.99, "transformers' bf16"),
        ("costs found|own int8, 192|share_of_allowed value", 0.949, "gain of routing"),
        ("costs found|own int8, 64|routing_share", 0.021, "routing itself"),
        ("decode speedup_over_transformers_bf16 int4 value", 4.9, "decode int4 over transformers"),
        ("decode speedup_over_genai int8 value", 0.99, "onnxruntime-genai"),
        ("decode speedup_over_llama_cpp int4 value", 0.99, "llama.cpp"),
        ("footprint sessions|own int8, dense|peak_rss_bytes", 101.0, "peak RSS"),
        ("footprint import_s median", 0.31, "import reroute.runtime"),
        ("scaling visual cells", [{"candidate": "own int8, dense", "size": 144}], "visual tokens"),
    ],
)
def test_one_figure_beyond_its_bound_is_one_aim_not_met(path: str, value: Any, name: str) -> None:
    results = json.loads(json.dumps(found()))  # no shared parts
    place: Any = results
    *head, last = [key for part in path.split("|") for key in ([part] if part.startswith("own") else part.split())]
    for key in head:
        place = place[key]
    place[last] = value
    assert len(unmet(results)) == 1
    assert name in unmet(results)[0]


def test_nothing_measured_is_nothing_met() -> None:
    assert {aim.met for aim in aims({})} == {None}
    partial = found()
    del partial["decode"]["speedup_over_llama_cpp"]["int4"]
    assert [aim.name for aim in aims(partial) if aim.met is None] == ["decode int4 over llama.cpp of the same bits"]


def test_the_worst_of_several_is_named() -> None:
    results = json.loads(json.dumps(found()))
    results["costs"]["found"]["own int8, 192"]["share_of_allowed"]["value"] = 0.9
    (aim,) = [aim for aim in aims(results) if aim.met is False]
    assert aim == Aim(name=aim.name, wanted="at least 95.0%", measured="90.0% (own int8, 192)", met=False)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    (tmp_path / "decode.json").write_text('{"kind": "prefill"}')
    with pytest.raises(UserError, match=r"not a result of benchmarks\.decode"):
        read(tmp_path)
    (tmp_path / "decode.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path)
