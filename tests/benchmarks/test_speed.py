"""The arithmetic of prefill, costs, decode and footprint, on figures that are known, and refusals of wrong runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import costs, decode, footprint, plot_scaling, prefill, scaling
from benchmarks.peers.convert import gguf_name, interleave_halves, text_name
from benchmarks.shared import results
from benchmarks.shared.bundles import Workshop
from benchmarks.shared.own import OwnEngine, compare_logits, make_prompt
from reroute.errors import RerouteError, UserError
from reroute.schedule import Schedule, Stage

SCHEDULE = Schedule(
    action="reroute",
    stages=(Stage(start=0, stop=2, keep=None), Stage(start=2, stop=6, keep=100), Stage(start=6, stop=8, keep=10)),
)


def test_allowed_is_what_the_layers_cost_at_the_rows_of_each_stage() -> None:
    dense = {576: [84.0, 168.0], 100: [20.0, 40.0], 10: [12.0, 24.0]}
    # fixed 4, 8 layers: 10, 2 and 1 ms a layer in the first round.
    found = costs.against_allowed(SCHEDULE, dense, [40.0, 80.0], 4.0, 1.0)
    first, second = 4 + 2 * 10 + 4 * 2 + 2 * 1, 4 + 2 * 20.5 + 4 * 4.5 + 2 * 2.5
    assert found["allowed_ms"] == pytest.approx((first + second) / 2)
    expected = np.exp(np.mean(np.log([first / 40, second / 80])))
    assert found["share_of_allowed"]["value"] == pytest.approx(expected)
    assert found["speedup"]["value"] == pytest.approx(2.1)


def test_a_last_layer_that_is_a_part_of_one_is_counted_as_that_part() -> None:
    dense = {576: [79.0], 100: [19.0], 10: [11.5]}  # fixed 4, 7.5 layers: the same 10, 2 and 1 ms
    found = costs.against_allowed(SCHEDULE, dense, [40.0], 4.0, 0.5)
    assert found["allowed_ms"] == pytest.approx(4 + 2 * 10 + 4 * 2 + 1.5 * 1)


def test_the_part_that_the_last_layer_is_comes_from_the_dense_profile() -> None:
    # 8 layers with 3 before attention and in it, 7 of which have 9 behind: 3 of 12.
    groups = {"attention": 16.0, "norms": 4.0, "attention projections": 4.0, "MLP": 53.0, "output projection": 10.0}
    run = {**groups, "output matrix": 13.0, "total": 100.0}
    assert costs.last_layer(costs.summary([run]), 8) == pytest.approx(0.25)


def test_routing_share_counts_select_gather_and_scatter_only() -> None:
    run = {"select": 1.0, "gather": 0.5, "scatter": 0.5, "scoring projection": 30.0, "MLP": 60.0, "total": 100.0}
    data = costs.summary([run, {**run, "select": 3.0}, {**run, "select": 1.0}])
    assert costs.routing_share(data) == pytest.approx(0.02)
    assert data["share"]["scoring projection"] == pytest.approx(0.3)
    assert data["ms"]["quantisation"] == 0.0
    dense = costs.summary([{"output matrix": 5.0, "embedding": 3.0, "shapes": 2.0, "MLP": 90.0, "total": 100.0}])
    assert costs.fixed_ms(dense, [200.0]) == pytest.approx(20.0)


def test_the_baseline_is_the_faster_of_the_authors_two_ways() -> None:
    found = {prefill.hf_name("bfloat16"): 400.0}
    for tier, (one, two, own) in {"64": (240, 200, 100), "128": (250, 260, 125), "192": (300, 330, 100)}.items():
        found[prefill.authors_name("bfloat16", "compact_route", tier)] = one
        found[prefill.authors_name("bfloat16", "compact_route_stagewise", tier)] = two
        found[prefill.own_name("int8", tier)] = own
        found[prefill.own_name("fp32", tier)] = 4 * own
    found |= {prefill.own_name("int8", "dense"): 320, prefill.own_name("fp32", "dense"): 1600}
    rounds = {(name, prefill.TEXT): {"prefill_ms": [value, value, value]} for name, value in found.items()}
    data = prefill.speedups(rounds, ("fp32", "int8"), with_authors=True)
    assert data["speedup_profile"] == "int8"
    assert data["speedup_over_authors_bf16"] == pytest.approx({"dense": 1.25, "64": 2.0, "128": 2.0, "192": 3.0})
    assert data["speedup_by_profile"]["fp32"]["64"]["value"] == pytest.approx(0.5)
    assert data["speedup_baselines"]["64"].endswith("stagewise, 64")
    assert set(prefill.speedups(rounds, ("fp32",), with_authors=False)["speedup_over_authors_bf16"]) == {"dense"}


def test_a_run_that_kept_other_rows_ends_the_measurement(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "TEXT", 6)
    monkeypatch.setattr(prefill, "VISUAL", 36)
    engine = OwnEngine(tiny_bundle, threads=1)
    text = engine.manifest.model.text
    prompt = make_prompt(text=6, visual=36, hidden=text.hidden_size, vocab=text.vocab_size)
    assert prefill.own_run(engine, prompt)()["prefill_ms"] > 0
    assert engine.kept == prefill.expected_rows(engine.manifest) == [42, 42, 13, 13, 10, 10]

    class Dense:  # what transformers 5.23 makes of the authors' patches: nothing is routed
        def call(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"prefill_ms": 1.0, "rows": [42] * 6, "kept": []}

    run = prefill.torch_run(Dense(), "", "bfloat16", engine.manifest, "compact_route")  # type: ignore[arg-type]
    with pytest.raises(RerouteError, match=r"the authors' code cached 42 rows in layer 2, the schedule .* says 13"):
        run()


def test_our_engine_on_embeddings_decodes_as_a_longer_prompt_would(tiny_bundle: Path) -> None:
    engine = OwnEngine(tiny_bundle, threads=1)
    text = engine.manifest.model.text
    prompt = make_prompt(text=9, visual=0, hidden=text.hidden_size, vocab=text.vocab_size)
    _, whole = engine.prefill(prompt)
    expected = whole.logits[0].copy()
    shorter = make_prompt(text=9, visual=0, hidden=text.hidden_size, vocab=text.vocab_size)
    engine.prefill(type(shorter)(words=shorter.words[:6], before=1, embeds=shorter.embeds))
    ms, last = engine.decode(shorter.words[6:].tolist())
    assert ms > 0
    assert engine.kept == [9] * 6
    assert compare_logits(last, expected)["cosine"] > 0.99999


def test_kept_tokens_are_compared_as_places_in_the_image() -> None:
    prompt = make_prompt(text=6, visual=8, hidden=4, vocab=50)
    prompt = type(prompt)(words=prompt.words, before=2, embeds=prompt.embeds)
    routes = (np.array([[0, 1, 3, 5, 10, 11]]), np.array([[0, 1, 2, 10]]))  # slots: 2 words, 8 visual, 4 words
    assert prefill.kept_equal(routes, [[1, 3], [5]], prompt) == [1.0, 0.0]


def test_an_engine_with_other_logits_or_rows_is_refused() -> None:
    rows = np.random.default_rng(0).standard_normal(50)

    def call(logits: Any, cached: int = 656) -> Any:
        return lambda _: {"decode_ms": 1.0, "rows": cached, "logits": logits}

    good = {"transformers float32": call(rows), "own int8": call(rows + 1e-3)}
    assert decode.agree(good)["own int8"]["cosine"] > 0.99
    with pytest.raises(RerouteError, match=r"llama.cpp f16 have a cosine of .* below 0.999"):
        decode.agree({**good, "llama.cpp f16": call(rows + 0.1 * np.random.default_rng(1).standard_normal(50))})
    with pytest.raises(RerouteError, match="genai int4 has 657 rows in its cache, not 656"):
        decode.timed("genai int4", call(rows, 657), 656)()


def test_decode_compares_equal_bits() -> None:
    medians = {"own int8": 20, "own int4": 10, "transformers bfloat16": 70, "genai int8": 30, "llama.cpp Q8_0": 22,
               "llama.cpp Q4_0": 9}  # fmt: skip
    rounds = {(name, decode.CONTEXT): {"decode_ms": [float(ms)] * 3} for name, ms in medians.items()}
    found = decode.speedups(rounds, ("int8", "int4"))
    values = {key: {name: round(one["value"], 3) for name, one in row.items()} for key, row in found.items()}
    assert values == {
        "speedup_over_transformers_bf16": {"int8": 3.5, "int4": 7.0},
        "speedup_over_genai": {"int8": 1.5},
        "speedup_over_llama_cpp": {"int8": 1.1, "int4": 0.9},
    }


def test_a_conversion_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    good = ["python3", "-c", "import sys; open(sys.argv[1], 'w').write('model')"]
    decode.make(good, tmp_path / "a" / "model.gguf")
    assert (tmp_path / "a" / "model.gguf").read_text() == "model"
    with pytest.raises(UserError, match="status 1"):
        decode.make([*good[:2], good[2] + "; raise SystemExit('no')"], tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_weights_of_a_llava_find_their_names() -> None:
    for name in (
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ):
        assert text_name(name) == "model.layers.3.mlp.up_proj.weight"
        assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert text_name("language_model.lm_head.weight") == text_name("lm_head.weight") == "lm_head.weight"
    assert text_name("model.language_model.norm.weight") == "model.norm.weight"
    assert text_name("model.vision_tower.encoder.layers.0.mlp.fc1.weight") is None
    assert text_name("multi_modal_projector.linear_1.weight") is None
    with pytest.raises(ValueError, match="no place in GGUF"):
        gguf_name("model.layers.3.self_attn.q_norm.weight")


def test_rotating_neighbours_of_the_reordered_rows_is_rotating_halves() -> None:
    heads, half, random = 2, 3, np.random.default_rng(0)
    weight, x = random.standard_normal((heads * 2 * half, 5)), random.standard_normal(5)
    angle = random.uniform(0, 3, half)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = (weight @ x).reshape(heads, 2, half).swapaxes(0, 1)
    expected = first * cos - second * sin, second * cos + first * sin
    pairs = (interleave_halves(weight, heads) @ x).reshape(heads, half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    np.testing.assert_allclose(even * cos - odd * sin, expected[0])
    np.testing.assert_allclose(odd * cos + even * sin, expected[1])


def test_the_bound_of_the_footprint() -> None:
    assert footprint.bound_bytes(1e9, 2e8) == pytest.approx(1.53e9)
    memory = {"weight_bytes": 1e9, "cache_bytes": 2e8, "peak_rss_bytes": 1.54e9}
    assert not footprint.session_entry(memory, 10.0, [])["within"]
    assert footprint.session_entry({**memory, "peak_rss_bytes": 1.52e9}, 10.0, [])["within"]
    assert all(0 < seconds < 60 for seconds in footprint.import_seconds(1))


def test_the_scaling_figure_has_a_point_for_every_size(tmp_path: Path) -> None:
    def cells(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        rounds = {(f"own fp32, {tier}", size): {"prefill_ms": [float(size), size + 1.0]}
                  for tier in ("dense", "64") for size in sizes}  # fmt: skip
        return results.cells(rounds)

    data = {
        "settings": {"profiles": ["fp32"]},
        "tiers": ["64"],
        "candidates": ["own fp32, dense", "own fp32, 64"],
        "visual": {"text": 64, "cells": cells((144, 576, 2304))},
        "text": {"visual": 576, "cells": cells((32, 512))},
    }
    plot_scaling.draw(json.loads(json.dumps(data)), tmp_path / "scaling.svg")
    svg = (tmp_path / "scaling.svg").read_text()
    for tier in ("dense", "64"):
        assert all(f'id="point-fp32-{tier}-visual-{size}"' in svg for size in (144, 576, 2304))
        assert f'id="line-fp32-{tier}-text"' in svg
    assert "average 64: 2304" in svg  # the median of 2304 and 2305, to the even
    assert "| own fp32, 64 | 144 | 576 | 2304 |" in scaling.markdown(data)


def test_options_and_what_they_refuse(tmp_path: Path) -> None:
    args = results.options("Doc.", "prefill", repeat=5).parse_args(["--profiles", "fp32,int4"])
    assert (args.profiles, args.repeat, args.output.name) == (("fp32", "int4"), 5, "prefill.json")
    with pytest.raises(argparse.ArgumentTypeError, match="no profile 'int3'"):
        results.profiles("fp32,int3")
    with pytest.raises(UserError, match="no checkpoint"):
        Workshop(checkpoint=tmp_path).model()
    assert Workshop(method="reroute-pdrop@2,7").routing("128") == "reroute-pdrop@2,7:avg=2/9"
    with pytest.raises(UserError, match="is not there"):
        results.need([tmp_path / "none"], "the code")
