"""Which group a node's time is counted in, and how runs are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.shared.own import OwnEngine, make_prompt
from benchmarks.shared.profile import FIXED, GROUPS, ROUTING, group_of_event, groups_of, nodes_of, profile, split_runs
from reroute.manifest import Manifest
from reroute.runtime.backend import BackendOptions

SELECTED = "RerouteSelect.scores__9"


def test_groups_follow_bodies_and_weights() -> None:
    nodes = [
        ("node_embedding", "Gather", ["embed", "input_ids"]),
        ("RerouteGather.rows__1", "GatherND", ["concat", "order"]),
        ("RerouteRMSNorm.y__2", "RMSNormalization", ["scatter", "layers.0.input_norm.weight"]),
        ("node_matmul", "MatMul", ["rms_norm", "layers.0.k_proj.weight"]),
        ("node_matmul_1", "MatMul", ["rms_norm", "layers.2.k_proj.weight"]),
        (
            "node_matmul_2",
            "MatMulNBits",
            ["rms_norm", "layers.2.gate_proj.weight_q4", "layers.2.gate_proj.weight_scale"],
        ),
        ("node_matmul_3", "MatMul", ["rms_norm", "layers.2.q_proj.weight"]),
        ("node_matmul_4", "MatMul", ["attention", "layers.2.o_proj.weight"]),
        (SELECTED, "GatherElements", ["by_row__9"]),
        ("RerouteSelectPools.slots__10", "TopK", ["unordered__10"]),
        ("RerouteGather.rows__11", "GatherND", ["add"]),
        ("RerouteScatter.scattered__22", "ScatterND", ["flat__22"]),
        ("RerouteAttention.out__12", "GroupQueryAttention", ["rotary"]),
        ("node_add", "Add", ["gather", "matmul"]),
        ("Quantized.linear_1", "Linears", ["add", "layers.0.input_norm.weight", "layers.0.q_proj.weight.int8"]),
        ("node_attention", "Attention", ["rotary", "past.0.key"]),
        ("Quantized.add_1", "RestOfLayer", ["add", "attention", "layers.0.o_proj.weight.int8"]),
        ("node_lm_head", "MatMul", ["rms_norm", "lm_head.weight"]),
        ("node_Shape_0", "Shape", ["input_ids"]),
    ]
    assert list(groups_of(nodes, scoring_layers=[2]).values()) == [
        "embedding", "embedding", "norms", "attention projections", "scoring projection", "MLP",
        "attention projections", "output projection", "select", "select", "gather", "scatter", "attention",
        "elementwise", "attention projections", "attention", "rest of layers", "output matrix", "shapes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "op_type", "group"),
    [
        (SELECTED, "GatherElements", "select"),
        (f"{SELECTED}/MatMulScaleFusion/", "FusedMatMul", "select"),
        ("node_matmul_7", "MatMul", "MLP"),
        ("node_matmul_7_quant_output_scale", "Mul", "MLP"),
        ("node_matmul_70", "MatMul", "other projections"),  # another node, not a suffix
        ("unheard of", "QuickGelu", "elementwise"),
        ("unheard of", "Expand", "shapes"),
    ],
)
def test_a_fused_node_is_found_by_the_beginning_of_its_name_else_by_its_op(name: str, op_type: str, group: str) -> None:
    assert group_of_event(name, op_type, {SELECTED: "select", "node_matmul_7": "MLP"}) == group


def test_runs_are_split_and_what_no_node_took_is_left_between_them() -> None:
    def node(name: str, ts: int, dur: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": ""}}

    def run(ts: int, dur: int) -> dict[str, object]:
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}

    events = [
        run(10_000, 5_000), node("a", 10_500, 1_000), node("b", 12_000, 2_000), node("a", 14_500, 500),
        node("a", 5_000, 900), {"cat": "Node", "name": "a_fence_before", "ts": 10_600, "dur": 3_000, "args": {}},
        run(20_000, 3_000), node("b", 20_000, 3_000),
    ]  # fmt: skip
    assert split_runs(events, lambda name, _: name) == [
        {"a": 1.5, "b": 2.0, "between nodes": 1.5, "total": 5.0},
        {"b": 3.0, "between nodes": 0.0, "total": 3.0},
    ]


def test_every_run_of_a_real_bundle_is_accounted_for(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    text = manifest.model.text
    prompt = make_prompt(text=6, visual=36, hidden=text.hidden_size, vocab=text.vocab_size)

    def use(backend: object) -> None:
        engine = OwnEngine.of(tiny_bundle, backend)  # type: ignore[arg-type]
        for _ in range(3):
            engine.prefill(prompt)

    runs = profile(tiny_bundle, use, BackendOptions(threads=1))
    assert len(runs) == 3
    for run in runs:
        assert sum(run.get(group, 0.0) for group in GROUPS) == pytest.approx(run["total"])
        assert all(run[group] > 0 for group in (*ROUTING, *FIXED, "MLP", "attention", "scoring projection", "norms"))


def test_nodes_of_a_built_decoder_are_named_after_their_op(tiny_bundle: Path) -> None:
    graph = onnx.load(str(tiny_bundle / "decoder.onnx"), load_external_data=False).graph
    names = [node.name for node in nodes_of(graph)]
    assert all(names)
    assert len(set(names)) == len(names)
    routed = len(Manifest.load(tiny_bundle).schedule.decision_layers)
    assert len([name for name in names if name.startswith("RerouteSelect.slots__")]) == routed
    assert np.unique([name.split(".")[0] for name in names if name.startswith("Reroute")]).size >= 6
