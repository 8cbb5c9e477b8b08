"""Profiles: what is packed, what the operators make of it, what becomes of a graph, and the gate on kept tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.shared.own import OwnEngine, make_prompt
from reroute.engines import build, profiles
from reroute.engines.lower import lower
from reroute.engines.packing import blocks, columns8
from reroute.engines.profiles import PROFILES, Form, Profile, profile_named
from reroute.engines.quantize import EMBEDDING, quantize
from reroute.engines.weights import DataFile, Weights, load_graph
from reroute.errors import GateError, UserError
from reroute.evaluation.fidelity import Fidelity, fidelity
from reroute.evaluation.scenes import SceneSet
from reroute.export import export_checkpoint
from reroute.manifest import Manifest
from reroute.runtime import Session
from reroute.schedule import Schedule, Stage
from tests.conftest import TinyLlava, make_llava

LONG = Schedule(
    action="reroute",
    stages=tuple(
        Stage(start=start, stop=stop, keep=9 if start else None)
        for start, stop in ((0, 2), (2, 4), (4, 5), (5, 7), (7, 8))
    ),
)
ROUTED = Schedule(
    action="reroute",
    stages=(
        Stage(start=0, stop=2, keep=None),
        Stage(start=2, stop=4, keep=7),
        Stage(start=4, stop=6, keep=4),
    ),
)


def weight_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * rng.uniform(0.1, 3, columns)).astype(np.float32)


def unpacked(packed: np.ndarray, scales: np.ndarray, bits: int, rows: int) -> np.ndarray:
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    wide = (packed.astype(np.float32) - (8 if bits == 4 else 128)) * scales.reshape(packed.shape[0], -1, 1)
    return wide.reshape(packed.shape[0], -1)[:, :rows].T


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (200, 33), (64, 1500)])
def test_columns_are_right_to_half_a_step(rows: int, columns: int):
    weight = weight_of(rows, columns)
    packed = columns8(weight)
    assert (np.abs(packed.values.astype(np.float32) * packed.scales - weight) <= packed.scales * 0.5001).all()
    assert (np.abs(packed.values).max(axis=0) == 127).all()


@pytest.mark.parametrize(("bits", "block"), [(8, 128), (4, 64)])
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (200, 33), (64, 1500)])
def test_blocks_are_right_to_a_step_and_what_onnx_runtime_reads(bits: int, block: int, rows: int, columns: int):
    weight = weight_of(rows, columns)
    packed = blocks(weight, bits=bits, block=block)
    wide = unpacked(packed.values, packed.scales, bits, rows)
    steps = np.repeat(np.abs(packed.scales.reshape(columns, -1)), block, axis=1)[:, :rows].T
    error = np.abs(wide - weight) / steps
    assert error.max() <= 1.0001  # 4 bits end at 7 steps on one side, of 8 that the largest value takes
    assert np.quantile(error, 0.9) <= 0.5
    sizes: Any = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", "values", "scales"], ["y"], domain="com.microsoft", **sizes)
    made = {"values": packed.values, "scales": packed.scales}
    eye = np.eye(rows, dtype=np.float32)
    assert np.allclose(run([node], made, eye, columns), wide, atol=1e-5)


def test_zeros_stay_zeros():
    weight = weight_of(128, 8)
    weight[:, 3] = 0
    packed = columns8(weight)
    assert (packed.values[:, 3] == 0).all()
    assert np.isfinite(packed.scales).all()
    block = blocks(weight, bits=4, block=64)
    assert (unpacked(block.values, block.scales, 4, 128)[:, 3] == 0).all()


def run(nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray], x: np.ndarray, columns: int) -> np.ndarray:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", columns])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def quantized_product(weight: np.ndarray, x: np.ndarray, form: Form, tmp_path: Path) -> np.ndarray:
    """x @ weight in a form, through the rewrite of a graph."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "layers.0.up_proj.weight"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", weight.shape[1]])],
        [numpy_helper.from_array(weight, "layers.0.up_proj.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    weights = Weights(model, tmp_path)
    dense = Schedule(action="dense", stages=(Stage(start=0, stop=1, keep=None),))
    made = quantize(model, weights, Profile(name="one", rungs=(lambda *_: form,)), dense)
    with DataFile(tmp_path / "g.data") as file:
        file.take(model, weights, made)
    onnx.save(model, tmp_path / "g.onnx")
    session = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_the_steps_of_up_follow_behind_down(tiny_export: Path, tmp_path: Path):
    """silu(gate) * up is narrow again before up's steps are multiplied in: one pass less over the widest rows."""
    build(tiny_export, tmp_path / "bundle", profile="int8", check=False)
    graph = onnx.load(tmp_path / "bundle" / "decoder.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    ups = [node for node in graph.node if "layers.0.up_proj.weight.int8" in node.input]
    downs = [node for node in graph.node if "layers.0.down_proj.weight.int8" in node.input]
    (product,) = [node for node in graph.node if ups[0].output[0] in node.input]
    (scaled,) = [node for node in graph.node if downs[0].output[0] in node.input]
    assert makers[downs[0].input[0]].input[0] == product.output[0]
    assert makers[scaled.input[1]].op_type == "Mul"
    assert [makers[name].output[0] for name in makers[scaled.input[1]].input] == [
        f"{product.output[0]}.steps",
        f"{ups[0].input[0].removesuffix('.int8')}.steps",
    ]


@pytest.mark.parametrize(("form", "error"), [(Form.ROWS8, 0.02), (Form.BLOCKS8, 0.02), (Form.BLOCKS4, 0.15)])
def test_a_row_with_a_large_value_costs_the_other_rows_nothing(form: Form, error: float, tmp_path: Path):
    weight = weight_of(256, 96)
    x = np.random.default_rng(1).standard_normal((12, 256)).astype(np.float32)
    x[4, 7] = 1e4  # as decoders have at their first tokens
    x[9] = 0
    got, want = quantized_product(weight, x, form, tmp_path), x @ weight
    assert (got[9] == 0).all()
    ordinary = [row for row in range(12) if row not in (4, 9)]
    relative = np.linalg.norm((got - want)[ordinary], axis=1) / np.linalg.norm(want[ordinary], axis=1)
    assert relative.max() < error
    assert relative.max() > 1e-5  # and it is quantised


def test_one_scale_for_all_rows_would_be_worse(tmp_path: Path):
    """What the rows' scales are for: ONNX Runtime's own dynamic quantisation of the same activation."""
    weight = weight_of(256, 96)
    x = np.random.default_rng(1).standard_normal((12, 256)).astype(np.float32)
    x[4, 7] = 1e4
    packed = columns8(weight)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain="com.microsoft")
    made = {"w": packed.values, "s": packed.scales, "z": np.zeros(96, np.int8)}
    plain = run([node], made, x, 96) - x @ weight
    ours = quantized_product(weight, x, Form.ROWS8, tmp_path) - x @ weight
    assert np.linalg.norm(ours[:4]) < 0.02 * np.linalg.norm(plain[:4])


def test_scoring_is_float32_and_int4_keeps_8_bits_where_routing_depends_on_them():
    for profile in PROFILES.values():
        for layer in (2, 4):
            assert profile.form_of(f"layers.{layer}.q_proj.weight", ROUTED) is Form.FLOAT
            assert profile.form_of(f"layers.{layer}.k_proj.weight", ROUTED) is Form.FLOAT
        assert profile.form_of("layers.2.input_norm.weight", ROUTED) is Form.FLOAT
    wide = {
        rung: [layer for layer in range(8) if profile.form_of(f"layers.{layer}.up_proj.weight", LONG) is Form.BLOCKS8]
        for rung in ("int4:0", "int4:1", "int4:2", "int4")
        for profile in [profile_named(rung)]
    }
    first, second, third = [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]
    assert wide == {"int4:0": first, "int4:1": second, "int4:2": third, "int4": second}
    for rung, form in (("int4:0", Form.BLOCKS4), ("int4:1", Form.BLOCKS8)):
        assert profile_named(rung).form_of("layers.6.v_proj.weight", LONG) is Form.BLOCKS8
        assert profile_named(rung).form_of("layers.6.o_proj.weight", LONG) is form
    previous = Schedule(action="reroute", stages=ROUTED.stages, scoring="previous")
    assert PROFILES["int8"].form_of("layers.1.k_proj.weight", previous) is Form.FLOAT
    assert PROFILES["int8"].form_of("layers.2.k_proj.weight", previous) is Form.ROWS8


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_every_matrix_is_in_the_bundle_once_and_no_other_is_left_wide(name: str, tiny_export: Path, tmp_path: Path):
    manifest = build(tiny_export, tmp_path / "bundle", profile=name, check=False)
    assert manifest.profile == {"int8": "int8", "int4": "int4:1"}[name]
    model = onnx.load(tmp_path / "bundle" / "decoder.onnx", load_external_data=False)
    graph = model.graph
    # ONNX Runtime 1.23 (Python 3.10, JetPack 6) has no kernel of QuantizeLinear in opset 23.
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21
    stored = [tensor.name for tensor in graph.initializer]
    assert len(stored) == len(set(stored))
    for layer in range(6):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            weight = f"layers.{layer}.{part}.weight"
            matrices = {name for name in stored if name in (weight, *(f"{weight}.int{bits}" for bits in (4, 8)))}
            # Scores are of float32 matrices; the queries of a scoring layer also attend, and are then quantised.
            scores = layer in (2, 4) and part in ("q_proj", "k_proj")
            assert (weight in matrices) == scores, weight
            assert len(matrices) == (2 if scores and part == "q_proj" else 1), weight
    data = (tmp_path / "bundle" / "decoder.onnx.data").stat().st_size
    assert data == manifest.estimates["weight_bytes"] - (tmp_path / "bundle" / "vision.onnx.data").stat().st_size


def test_a_narrow_embedding_stays_narrow_and_exact(demo_export: Path, tmp_path: Path):
    neutral, weights = load_graph(demo_export / "decoder.onnx")
    graph = lower(neutral, "ort")
    quantize(graph, weights, PROFILES["int8"], Manifest.load(demo_export).schedule)
    table = next(tensor for tensor in graph.graph.initializer if tensor.name == EMBEDDING)
    assert table.data_type == TensorProto.FLOAT16
    gather = next(node for node in graph.graph.node if EMBEDDING in node.input)
    cast = next(node for node in graph.graph.node if gather.output[0] in node.input)
    assert (gather.op_type, cast.op_type) == ("Gather", "Cast")


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_projections_with_biases_keep_them(text, tmp_path: Path):
    """Random weights are the worst case for 8 bits: logits close to float32's are what can be asked of them."""
    size = TinyLlava(text=text, attention_bias=text == "llama", tied=text == "qwen2", hidden=128)
    make_llava(tmp_path / "checkpoint", size)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export", routing="dense")
    logits = {}
    for profile in ("fp32", "int8"):
        build(tmp_path / "export", tmp_path / profile, profile=profile, check=False)
        logits[profile] = prompt_logits(tmp_path / profile)
    assert np.corrcoef(logits["fp32"], logits["int8"])[0, 1] > 0.99
    model = onnx.load(tmp_path / "int8" / "decoder.onnx")  # and they are not small
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_proj.bias"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, tmp_path / "int8" / "decoder.onnx")
    assert np.corrcoef(logits["fp32"], prompt_logits(tmp_path / "int8"))[0, 1] < 0.98


def prompt_logits(path: Path) -> np.ndarray:
    engine = OwnEngine(path, threads=1)
    text = engine.manifest.model.text
    prompt = make_prompt(text=12, visual=36, hidden=text.hidden_size, vocab=text.vocab_size)
    return engine.prefill(prompt)[1].logits[0].copy()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_profile_keeps_99_percent_of_the_tokens_that_float32_keeps(name: str, demo_export: Path, tmp_path: Path):
    questions = SceneSet(grounding=40, vqa=20, split="validation")
    manifest = build(demo_export, tmp_path / "bundle", profile=name, evaluate=compare_on(questions))
    assert manifest.check is not None
    found = manifest.check["fidelity"]
    assert 0.99 <= found["slots"] < 1  # the gate, and really another engine
    assert found["scores"]["grounding"][1] >= found["scores"]["grounding"][0] - 0.1
    assert Manifest.load(tmp_path / "bundle").check == manifest.check


def test_a_profile_that_moves_the_tokens_is_not_written(
    demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    everything = Profile(name="int4", rungs=(lambda *_: Form.BLOCKS4,), lm_head=Form.BLOCKS8)
    monkeypatch.setitem(profiles.PROFILES, "int4", everything)
    with pytest.raises(GateError, match=r"slots of float32: 9\d\.\d+%"):
        build(
            demo_export,
            tmp_path / "bundle",
            profile="int4",
            evaluate=compare_on(SceneSet(grounding=40, vqa=0, split="validation")),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_quantisation_fails_the_check(demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(weight: np.ndarray) -> Any:
        packed = columns8(weight)
        return dataclasses.replace(
            packed, scales=packed.scales * np.linspace(0.5, 1.5, len(packed.scales)).astype("f4")
        )

    monkeypatch.setattr("reroute.engines.quantize.columns8", wrong)
    with pytest.raises(GateError, match="cosine"):
        build(demo_export, tmp_path / "bundle", profile="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_build_climbs_to_the_first_rung_that_is_careful_enough(
    demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def four(*_: object) -> Form:
        return Form.BLOCKS4

    def eight(*_: object) -> Form:
        return Form.BLOCKS8

    monkeypatch.setitem(
        profiles.PROFILES, "int4", Profile(name="int4", rungs=(four, eight, eight), rung=2, lm_head=Form.BLOCKS8)
    )
    questions = SceneSet(grounding=30, vqa=0, split="validation")
    said: list[str] = []
    manifest = build(
        demo_export, tmp_path / "bundle", profile="int4", evaluate=compare_on(questions), progress=said.append
    )
    assert manifest.profile == "int4:1"
    assert sum("more layers with 8 bits" in line for line in said) == 1


def compare_on(questions: SceneSet):
    def compare(base: Path, bundle: Path) -> Fidelity:
        return fidelity(lambda: Session.open(base, threads=1), lambda: Session.open(bundle, threads=1), questions)

    return compare


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "int5"}, "unknown profile 'int5'"),
        ({"profile": "int4:3"}, "no rung '3'"),
        ({"profile": "int8:0"}, "no rung '0'"),
        ({"profile": "int8", "backend": "tensorrt"}, "a target"),
        ({"evaluate": lambda *_: None}, "only a quantised engine"),
        ({"profile": "int8", "check": False, "evaluate": lambda *_: None}, "only a quantised engine"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message: str, tiny_export: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        build(tiny_export, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
