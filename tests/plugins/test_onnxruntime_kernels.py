"""The kernels of plugins_cpp/onnxruntime in ONNX Runtime: alone, and in an int8 bundle."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from reroute.cli import main
from reroute.engines import KERNELS_FILE, build
from reroute.engines.dialects.ort import KERNELS
from reroute.engines.lower import lower, plugin_nodes
from reroute.engines.packing import blocked4, blocked8, blocks, columns8
from reroute.errors import EXIT_USAGE, UserError
from reroute.evaluation.fidelity import Fidelity, fidelity
from reroute.evaluation.scenes import SceneSet
from reroute.export import export_checkpoint, ops
from reroute.manifest import Manifest
from reroute.runtime import Session
from reroute.runtime.backend import BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from tests.conftest import TinyLlava, make_llava
from tests.engines.test_engines import ROUTINGS, STEPS, drive_torch, equal_torch


@pytest.fixture(scope="session")
def library(build_folder: Path) -> Path:
    return build_folder / "libreroute_onnxruntime.so"


@pytest.fixture(scope="session")
def fast_library(library: Path) -> Path:
    """Where a build with it is not refused."""
    import ctypes

    instructions = ctypes.CDLL(str(library)).reroute_cpu_instructions
    instructions.restype = ctypes.c_char_p
    if instructions() == b"portable":
        pytest.skip("this processor has no AVX-512 VNNI")
    return library


def session_of(
    library: Path,
    kind: str,
    inputs: dict[str, np.ndarray | int],
    attributes: dict[str, Any],
    outputs: tuple[int, ...],
    bits: int,
) -> ort.InferenceSession:
    """A session of one node.

    Args:
        library: of kernels.
        kind: the operator.
        inputs: by name, in order: the last dimension of rows (0: any), weights of a norm [K], or a matrix [K, N].
        attributes: of the node.
        outputs: last dimensions.
        bits: of the matrices.
    """
    blocked = blocked8 if bits == 8 else blocked4
    arrays = {name: one if one.ndim == 1 else blocked(one) for name, one in inputs.items() if not isinstance(one, int)}
    names = [f"y{i}" for i in range(len(outputs))]

    def rows(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "M", width or "K"])

    graph = helper.make_graph(
        [helper.make_node(kind, list(inputs), names, domain=KERNELS, **attributes)],
        "g",
        [rows(name, one) for name, one in inputs.items() if isinstance(one, int)],
        [rows(name, width) for name, width in zip(names, outputs, strict=True)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(KERNELS, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_weight(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def unpacked(weight: np.ndarray, bits: int) -> np.ndarray:
    """The weights that a packed matrix stands for, in float64."""
    if bits == 8:
        columns = columns8(weight)
        return columns.values.astype(np.float64) * columns.scales
    packed = blocks(weight, bits=4, block=64)
    halves = np.stack([packed.values & 15, packed.values >> 4], axis=-1).reshape(*packed.values.shape[:2], -1)
    wide = (halves.astype(np.float64) - 8) * packed.scales.reshape(weight.shape[1], -1, 1)
    return wide.reshape(weight.shape[1], -1)[:, : weight.shape[0]].T


def defined(x: np.ndarray, weight: np.ndarray, bits: int) -> np.ndarray:
    """plugins_cpp/include/reroute/rows8.h, in numpy."""
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30))
    whole = np.rint(x * (np.float32(127) / largest)).astype(np.float64)
    return (whole @ unpacked(weight, bits) * (largest / np.float32(127))).astype(np.float32)


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, bits: int) -> np.ndarray:
    hidden = defined(x, gate, bits)
    return defined((hidden / (1 + np.exp(-hidden)) * defined(x, up, bits)).astype(np.float32), down, bits)


def normed(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return (wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + epsilon) * weight).astype(np.float32)


def random_rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# What is quantised behind a sum or an exponential can differ by one step of 254 where their last bits differ.
STEP = 3e-3


def near(y: Any, want: np.ndarray, within: float) -> bool:
    return y.shape == want.shape and bool(np.abs(y - want).max() <= within * np.abs(want).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (37, 130), (896, 17)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (1, 90), (3, 40)])
def test_a_linear_is_what_it_is_defined_to_be(
    library: Path, rows: int, columns: int, shape: tuple[int, int], bits: int
):
    weight = random_weight(rows, columns, 0)
    attributes = {"K": rows, "N": columns, "bits": bits}
    session = session_of(library, "Linear", {"x": rows, "w": weight}, attributes, (columns,), bits)
    x = random_rows(1, *shape, rows)
    assert near(session.run(None, {"x": x})[0], defined(x, weight, bits), 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_linears_share_a_norm(library: Path, rows: int, bits: int):
    norm = random_rows(6, 64)
    weights = [random_weight(64, columns, columns) for columns in (96, 32, 17)]
    attributes = {"count": 3, "K": 64, "epsilon": 0.5}
    for i, weight in enumerate(weights):
        attributes |= {f"N{i}": weight.shape[1], f"bits{i}": bits}
    inputs = {"x": 64, "norm": norm} | {f"w{i}": weight for i, weight in enumerate(weights)}
    session = session_of(library, "Linears", inputs, attributes, (96, 32, 17), bits)
    x = random_rows(7, 1, rows, 64)
    for y, weight in zip(session.run(None, {"x": x}), weights, strict=True):
        assert near(y, defined(normed(x, norm, 0.5), weight, bits), STEP)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_an_mlp_is_three_linears(library: Path, rows: int, bits: int):
    gate, up, down = random_weight(64, 150, 2), random_weight(64, 150, 3), random_weight(150, 48, 4)
    attributes = {"K": 64, "F": 150, "N": 48, "bits": bits}
    inputs = {"x": 64, "gate": gate, "up": up, "down": down}
    session = session_of(library, "Mlp", inputs, attributes, (48,), bits)
    x = random_rows(5, 1, rows, 64)
    assert near(session.run(None, {"x": x})[0], gated(x, gate, up, down, bits), STEP)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_rest_of_a_layer_is_made_of_its_parts(library: Path, rows: int, bits: int):
    output, norm = random_weight(48, 64, 1), random_rows(6, 64)
    gate, up, down = random_weight(64, 150, 2), random_weight(64, 150, 3), random_weight(150, 64, 4)
    attributes = {"K": 48, "D": 64, "F": 150, "output_bits": bits, "bits": bits, "epsilon": 1e-5}
    inputs = {"h": 64, "a": 48, "output": output, "norm": norm, "gate": gate, "up": up, "down": down}
    session = session_of(library, "RestOfLayer", inputs, attributes, (64,), bits)
    h, a = random_rows(8, 1, rows, 64), random_rows(9, 1, rows, 48)
    residual = h + defined(a, output, bits)
    want = residual + gated(normed(residual, norm, 1e-5), gate, up, down, bits)
    assert near(session.run(None, {"h": h, "a": a})[0], want, STEP)
    with pytest.raises(Exception, match="last dimension"):
        session.run(None, {"h": h, "a": np.concatenate([a, a], axis=1)})


def test_what_does_not_fit_is_an_error_and_no_access_out_of_bounds(library: Path):
    weight = random_weight(64, 48, 0)
    for inner, message in ((64, "last dimension"), (640, "not of the size")):
        attributes = {"K": inner, "N": 48, "bits": 8}
        session = session_of(library, "Linear", {"x": 0, "w": weight}, attributes, (48,), 8)
        with pytest.raises(Exception, match=message):
            session.run(None, {"x": np.zeros((1, 2, 63 if inner == 64 else inner), np.float32)})


@pytest.mark.parametrize("dialect", ["trt", "trt-jp6"])
@pytest.mark.parametrize("routing", ["reroute", "removal", "renumbered", "growing"])
def test_a_decoder_in_plugin_form_keeps_the_contract_of_the_plugins(
    library: Path, tiny_checkpoint: Path, routing: str, dialect: str, tmp_path: Path
):
    """What TensorRT gets, with its plugin nodes as operators that refuse what the plugins leave undefined."""
    export_checkpoint(tiny_checkpoint, tmp_path / "export", routing=ROUTINGS[routing])
    model = lower(onnx.load(tmp_path / "export" / "decoder.onnx", load_external_data=False), dialect, form="plugin")
    assert {"RerouteSelect", "RerouteGather"} <= plugin_nodes(model).keys()
    onnx.save(model, tmp_path / "export" / "plugin.onnx")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(tmp_path / "export" / "plugin.onnx", options, providers=["CPUExecutionProvider"])
    steps = list(equal_torch(session, drive_torch(tmp_path / "export", tiny_checkpoint), unused=0))
    assert len(steps) == len(STEPS)


@pytest.mark.parametrize("keep", [0, 3, 20, 99])
def test_select_gather_and_scatter_are_the_ops_of_the_neutral_graph(library: Path, keep: int):
    random, (batch, rows, width) = np.random.default_rng(keep), (2, 27, 40)
    slots = np.stack([random.permutation(rows) for _ in range(batch)])
    candidates, always = np.sort(slots[:, :20], axis=1), np.sort(slots[:, 20:], axis=1)
    tensors = {"q": random_rows(1, batch, 48), "keys": random_rows(2, batch, rows, 24)}
    tensors |= {"candidates": candidates, "always": always, "full": random_rows(3, batch, rows, width)}
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    heads = {"keep": keep, "num_heads": 6, "num_kv_heads": 3, "scale": 0.5}
    graph = helper.make_graph(
        [
            helper.make_node(
                "RerouteSelect", ["q", "keys", "candidates", "always"], ["slots"], domain=KERNELS, **heads
            ),
            helper.make_node("RerouteGather", ["full", "slots"], ["rows"], domain=KERNELS),
            helper.make_node("Neg", ["rows"], ["negated"]),
            helper.make_node("RerouteScatter", ["full", "slots", "negated"], ["updated"], domain=KERNELS),
        ],
        "g",
        [helper.make_tensor_value_info(name, kinds[one.dtype], one.shape) for name, one in tensors.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("rows", "updated")]
        + [helper.make_tensor_value_info("slots", TensorProto.INT64, None)],
    )
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(KERNELS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip(("rows", "updated", "slots"), map(np.asarray, session.run(None, tensors)), strict=True))
    torch_tensors = {name: torch.from_numpy(one) for name, one in tensors.items()}
    want = ops.select(*(torch_tensors[name] for name in ("q", "keys", "candidates", "always")), keep, 6, 3, 0.5)
    gathered = ops.gather(torch_tensors["full"], want)
    assert np.array_equal(found["slots"], want.numpy())
    assert np.array_equal(found["rows"], gathered.numpy())
    assert np.array_equal(found["updated"], ops.scatter(torch_tensors["full"], want, -gathered).numpy())
    if keep < 20:  # otherwise nothing is scored
        with pytest.raises(Exception, match="NaN"):
            session.run(None, tensors | {"q": np.full_like(tensors["q"], np.nan)})


@pytest.fixture(scope="module", params=["int8", "int4"])
def bundles(
    request: pytest.FixtureRequest, fast_library: Path, demo_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The demo model in a profile: ONNX Runtime's operators, and the kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    build(demo_export, folder / "plain", profile=request.param)
    build(demo_export, folder / "kernels", profile=request.param, kernels=fast_library)
    return folder / "plain", folder / "kernels"


def test_all_matrices_but_those_that_score_are_the_kernels(bundles: tuple[Path, Path]):
    manifest, plain = Manifest.load(bundles[1]), Manifest.load(bundles[0])
    assert (manifest.profile, manifest.kernels, plain.kernels) == (plain.profile, KERNELS_FILE, "")
    assert KERNELS_FILE in manifest.files
    graph = onnx.load(bundles[1] / "decoder.onnx", load_external_data=False).graph
    layers, scoring = manifest.model.text.num_layers, len(manifest.schedule.scoring_layers)
    kinds = Counter(node.op_type for node in graph.node)
    # In front of attention a norm and its products, without a scoring layer's float32 keys; behind it the rest.
    products = Counter(len(node.output) for node in graph.node if node.op_type == "Linears")
    assert (products[3], products[2], kinds["Linear"]) == (layers - scoring, scoring, 0)
    assert (kinds["RestOfLayer"], kinds["Attention"], kinds["Mlp"]) == (layers, layers, 0)
    wide = layers if manifest.profile == "int8" else manifest.schedule.scoring_layers[-2]
    rests = [node for node in graph.node if node.op_type == "RestOfLayer"]
    bits = [next(one.i for one in node.attribute if one.name == "bits") for node in rests]
    assert bits == [8] * wide + [4] * (layers - wide)
    others = {"MatMulIntegerToFloat", "QuantizeLinear", "Sigmoid", "GroupQueryAttention", "ScatterND", "GatherND"}
    assert not others & kinds.keys()
    assert kinds["MatMulNBits"] == 1  # the output matrix
    manifest.verify_files(bundles[1])


def prefill(path: Path, threads: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Logits and routes of a prompt, and the logits of a token behind it."""
    from benchmarks.shared.own import OwnEngine, make_prompt

    bundle = Bundle.open(path)
    engine = OwnEngine.of(path, open_backend(bundle, BackendOptions(threads=threads)))
    text, vision = bundle.manifest.model.text, bundle.manifest.model.vision
    prompt = make_prompt(text=24, visual=vision.tokens_per_image, hidden=text.hidden_size, vocab=text.vocab_size)
    _, outputs = engine.prefill(prompt)
    logits, routes = outputs.logits[0].copy(), [route.copy() for route in outputs.routes]
    return logits, routes, engine.decode([5])[1]


def test_kernels_agree_with_onnx_runtimes_operators(bundles: tuple[Path, Path]):
    (a, routes_a, next_a), (b, routes_b, next_b) = (prefill(path, 2) for path in bundles)
    for x, y in ((a, b), (next_a, next_b)):
        assert np.corrcoef(x, y)[0, 1] > 0.999
    kept = [len(set(x[0]) & set(y[0])) / len(x[0]) for x, y in zip(routes_a, routes_b, strict=True)]
    assert min(kept) > 0.85


def test_threads_change_nothing(bundles: tuple[Path, Path]):
    one, two = prefill(bundles[1], 1), prefill(bundles[1], 2)
    assert np.allclose(one[0], two[0], atol=1e-4)
    assert all(np.array_equal(x, y) for x, y in zip(one[1], two[1], strict=True))


@pytest.mark.parametrize("profile", ["int8", "int4"])
def test_kernels_keep_99_percent_of_the_tokens_that_float32_keeps(
    profile: str, fast_library: Path, demo_export: Path, tmp_path: Path
):
    """An int4 build may climb, and then loads the library again while it is still mapped."""
    questions = SceneSet(grounding=40, vqa=20, split="validation")

    def compare(base: Path, bundle: Path) -> Fidelity:
        return fidelity(lambda: Session.open(base, threads=1), lambda: Session.open(bundle, threads=1), questions)

    manifest = build(demo_export, tmp_path / "bundle", profile=profile, kernels=fast_library, evaluate=compare)
    assert manifest.check is not None
    assert 0.99 <= manifest.check["fidelity"]["slots"] < 1


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3"])
def test_biases_and_norms_of_heads_stand_between_the_kernels(text: str, fast_library: Path, tmp_path: Path):
    size = TinyLlava(text=text, attention_bias=text == "llama", tied=text == "qwen2", hidden=128)
    make_llava(tmp_path / "checkpoint", size)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export", routing="dense")
    build(tmp_path / "export", tmp_path / "plain", check=False)
    build(tmp_path / "export", tmp_path / "kernels", profile="int8", kernels=fast_library, check=False)
    kinds = {
        node.op_type for node in onnx.load(tmp_path / "kernels" / "decoder.onnx", load_external_data=False).graph.node
    }
    assert {"Linears", "Attention"} <= kinds
    assert ("RestOfLayer" in kinds) == (text != "llama")  # whose output has a bias here
    (plain, *_), (kernels, *_) = prefill(tmp_path / "plain", 1), prefill(tmp_path / "kernels", 1)
    assert np.corrcoef(plain, kernels)[0, 1] > 0.98


def test_a_changed_or_foreign_library_is_refused(bundles: tuple[Path, Path], tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles[1], folder)
    (folder / KERNELS_FILE).write_bytes(b"not a library")
    with pytest.raises(UserError, match=KERNELS_FILE):
        Bundle.open(folder)
    with pytest.raises(UserError, match=f"cannot load {KERNELS_FILE}"):
        open_backend(Bundle.open(folder, verify=False), BackendOptions(threads=1))


def test_what_a_build_refuses(demo_export: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "libother.so"
    other.write_bytes(b"no library")
    for words, message in (
        (["--kernels", str(library)], "no meaning without a quantised profile"),
        (["--profile", "int8", "--kernels", str(tmp_path / "none.so")], "there is no library"),
        (["--profile", "int8", "--kernels", str(other)], "is not the library of kernels"),
    ):
        assert main(["build", str(demo_export), "-o", str(tmp_path / "bundle"), *words]) == EXIT_USAGE
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_processor_without_the_instructions_is_told(
    demo_export: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Portable:
        def __init__(self, path: str) -> None:
            def instructions() -> bytes:
                return b"portable"

            self.reroute_cpu_instructions = instructions

    monkeypatch.setattr("ctypes.CDLL", Portable)
    with pytest.raises(UserError, match="no AVX-512 VNNI"):
        build(demo_export, tmp_path / "bundle", profile="int8", kernels=library)


def test_two_sessions_of_a_process_do_not_disturb_each_other(bundles: tuple[Path, Path]):
    first = prefill(bundles[1], 2)
    kept = Session.open(bundles[1], threads=1)
    second = prefill(bundles[1], 2)
    assert np.array_equal(first[0], second[0])
    assert kept is not None
