"""Weights of 16 bits through lowering: what a backend gets is what it would get from the float32 checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from reroute.engines import TensorRTOptions, build
from reroute.engines.half import decoder_to_half
from reroute.engines.targets import LoweringOptions
from reroute.engines.weights import DataFile, load_graph
from reroute.errors import RerouteError, UserError
from reroute.export import export_checkpoint
from reroute.export.grids import parse_grids
from tests.conftest import TinyLlava, make_llava
from tests.narrow import narrow_and_wide
from tests.qwen import make_qwen

CASES = {
    "bfloat16 tied": (torch.bfloat16, lambda folder: make_llava(folder, TinyLlava(layers=2, tied=True))),
    "float16 grids": (torch.float16, lambda folder: make_qwen(folder, layers=2)),
}


@pytest.fixture(scope="module", params=CASES)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Exports of a checkpoint of 16 bits and of the same numbers in float32."""
    dtype, make = CASES[request.param]
    folder = tmp_path_factory.mktemp("weights")
    checkpoints = narrow_and_wide(make(folder / "checkpoint"), dtype)
    grids = parse_grids("4x6,3x3") if "grids" in request.param else ()
    for checkpoint in checkpoints:
        output = folder / f"{checkpoint.name}-export"
        export_checkpoint(checkpoint, output, routing="reroute@1:keep=5", grids=grids, reference_tokens=4)
    return request.param, folder / "narrow-export", folder / "wide-export"


def initializers(path: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def assert_equal_folders(one: Path, other: Path) -> None:
    """Equal but for the manifests, which name different checkpoints."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == ["reroute.json"]


def test_an_export_keeps_what_the_checkpoint_has(exports: tuple[str, Path, Path]) -> None:
    case, narrow, wide = exports
    kind = TensorProto.FLOAT16 if "bfloat16" not in case else TensorProto.BFLOAT16
    tensors = initializers(narrow / "decoder.onnx")
    assert {tensors[name].data_type for name in tensors if name.startswith(("layers.", "embed", "norm"))} == {kind}
    # Half of the float32 export, whose tied embedding is stored once too; alignment takes the rest.
    sizes = [(folder / "decoder.onnx.data").stat().st_size for folder in (narrow, wide)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.1)
    if "tied" in case:
        assert "lm_head.weight" not in tensors
    for file in narrow.glob("*.onnx"):
        assert all(len(tensor.raw_data) < 1024 for tensor in initializers(file).values())
    # The reference is torch on the widened weights.
    assert (narrow / "reference.npz").read_bytes() == (wide / "reference.npz").read_bytes()


def test_a_bundle_is_that_of_the_float32_checkpoint(exports: tuple[str, Path, Path], tmp_path: Path) -> None:
    case, narrow, wide = exports
    for export in (narrow, wide):
        manifest = build(export, tmp_path / export.name)
        assert manifest.check is not None
        assert manifest.check["passed"]
    assert_equal_folders(tmp_path / narrow.name, tmp_path / wide.name)
    graph = onnx.load(tmp_path / narrow.name / "decoder.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert not [node for node in graph.node if node.op_type in ("Cast", "Transpose") and node.input[0] in names]
    if "tied" in case:
        assert names >= {"embed.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_lowered_folder_is_that_of_the_float32_checkpoint(
    exports: tuple[str, Path, Path], tmp_path: Path, dtype: str
) -> None:
    case, narrow, wide = exports
    if "grids" in case:
        pytest.skip("several grids are not lowered for TensorRT")
    options = TensorRTOptions(lowering=LoweringOptions(target="orin-jp6", dtype=dtype), only_lower=True)
    for export in (narrow, wide):
        build(export, tmp_path / export.name, backend="tensorrt", tensorrt=options)
    assert_equal_folders(tmp_path / narrow.name, tmp_path / wide.name)


def make_graph(folder: Path, array: np.ndarray, kind: int = TensorProto.BFLOAT16) -> Path:
    """x [1, n] times a weight of 16 bits [n, m] that is stored in a file, and its transpose."""
    tensor = numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    (folder / "data").write_bytes(bytes(8) + tensor.raw_data)
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", 8), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["hidden"]),
        helper.make_node("Transpose", ["wide"], ["back"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "back"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, array.shape[0]]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [tensor])), folder / "g.onnx")
    return folder / "g.onnx"


ARRAY = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_weights_are_read_and_written_wide(tmp_path: Path, kind: int) -> None:
    graph, weights = load_graph(make_graph(tmp_path, ARRAY, kind))
    stored = ARRAY.astype(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float32)
    np.testing.assert_array_equal(weights.read("w"), stored)
    np.testing.assert_array_equal(weights.read("back"), stored.T)
    assert [node.op_type for node in graph.graph.node] == ["MatMul", "MatMul"]
    weights.write(graph, tmp_path / "new")
    onnx.save(graph, tmp_path / "new.onnx")
    tensors = {t.name: t for t in onnx.load(tmp_path / "new.onnx").graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["w"]), stored)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["back"]), stored.T)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("inline", [False, True])
def test_weights_are_written_in_half(tmp_path: Path, kind: int, inline: bool) -> None:
    """Small ones stay in the graph, where float16 goes through float32 and back."""
    array = ARRAY[:4, :4] if inline else ARRAY
    path = make_graph(tmp_path, array, kind)
    if inline:
        onnx.save(onnx.load(path), path)
        assert initializers(path)["w"].raw_data
    graph, weights = load_graph(path)
    decoder_to_half(graph)
    weights.write(graph, tmp_path / "new")
    onnx.save(graph, tmp_path / "new.onnx")
    tensors = {t.name: t for t in onnx.load(tmp_path / "new.onnx").graph.initializer}
    stored = array.astype(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float16)
    assert bool(initializers(tmp_path / "new.onnx")["w"].raw_data) == inline
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["w"]), stored)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["back"]), stored.T)


def test_what_a_pass_adds_is_written_too(tmp_path: Path) -> None:
    """As quantisation needs it: arrays that are made when they are written, in place of weights that go."""
    graph, weights = load_graph(make_graph(tmp_path, ARRAY))
    del graph.graph.initializer[:]
    graph.graph.initializer.append(numpy_helper.from_array(ARRAY, "held"))
    graph.graph.initializer.add(name="made", data_type=TensorProto.INT8, dims=ARRAY.shape)
    weights.write(graph, tmp_path / "new", {"made": lambda: np.sign(weights.read("w")).astype(np.int8)})
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.graph.initializer)
    onnx.save(graph, tmp_path / "new.onnx")
    held, made = onnx.load(tmp_path / "new.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(held), ARRAY)
    np.testing.assert_array_equal(numpy_helper.to_array(made), np.sign(ARRAY))


def test_graphs_of_one_file_share_what_is_equal(tmp_path: Path) -> None:
    path = make_graph(tmp_path, ARRAY)
    with DataFile(tmp_path / "new") as file:
        for _ in range(2):
            graph, weights = load_graph(path)
            file.take(graph, weights)
    assert (tmp_path / "new").stat().st_size == 2 * ARRAY.nbytes  # the matrix and its transpose


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    graph, weights = load_graph(make_graph(tmp_path, np.full((40, 40), 1e5)))
    decoder_to_half(graph)
    with pytest.raises(UserError, match=r"the weight w has a value of 9.984e\+04, fp16 ends at 65504"):
        weights.write(graph, tmp_path / "new")


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    path = make_graph(tmp_path, ARRAY)
    data = (tmp_path / "data").read_bytes()
    (tmp_path / "data").write_bytes(data[:-2])
    graph, weights = load_graph(path)
    with pytest.raises(RerouteError, match="data ends too early"):
        weights.write(graph, tmp_path / "new")
    model = onnx.load(path, load_external_data=False)
    model.graph.node[1].input[1] = "w"
    onnx.save(model, path)
    with pytest.raises(RerouteError, match="the weight w of 16 bits is read by MatMul without a cast"):
        load_graph(path)
