"""Quantisation of a lowered decoder: matrices get the forms of a profile, in the graph and, one at a time, on disk.

ROWS8, of a float32 activation x with rows r:

    largest(r) = max |x(r, :)|                 ReduceMax, ReduceMin, Neg, Max
    x8 = quantise(x / largest)                 Div, QuantizeLinear: every row fills -127..127 around 128
    y  = (x8 @ W8) * scales * largest          MatMulIntegerToFloat, Mul

ONNX Runtime's own dynamic quantisation has one scale for a whole activation, so that one row with a large value, which
decoders have at their first tokens (arXiv 2402.17762), costs all others their precision. Projections that read the
same activation share its quantised form. BLOCKS8 and BLOCKS4 are MatMulNBits with int8 activations (accuracy level 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reroute.engines.packing import Blocks, Columns8, blocks, columns8
from reroute.engines.profiles import Form, Profile
from reroute.engines.weights import Weights
from reroute.engines.widen import FLOAT, NARROW, set_nodes
from reroute.errors import RerouteError
from reroute.schedule import Schedule

MICROSOFT = "com.microsoft"
EMBEDDING = "embed.weight"
_BLOCKS = {Form.BLOCKS8: (8, 128), Form.BLOCKS4: (4, 64)}
PREFIX = "Quantized"  # of the names of all nodes that are made here
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level
# Constants that all activations share; the smallest magnitude, so that a row of zeros is not divided by zero.
_AXES, _SMALLEST, _STEP, _MIDDLE = (f"quantize.{word}" for word in ("axes", "smallest", "step", "middle"))
INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
Made = dict[str, Callable[[], np.ndarray]]


def quantize(model: onnx.ModelProto, weights: Weights, profile: Profile, schedule: Schedule) -> Made:
    """Give the matrices of a lowered decoder their forms, in place.

    Args:
        model: lowered for ONNX Runtime, weights declared float32.
        weights: of the graph that it came from.
        profile: which forms.
        schedule: where scores are made.

    Returns:
        The new initializers: what makes them, to be called once, when they are written.
    """
    if not profile.quantized:
        return {}
    graph = model.graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.data_type == FLOAT}
    work = _Rewrite(graph, weights)
    for node in graph.node:
        weight = node.input[1] if node.op_type == "MatMul" and len(node.input) == 2 else ""
        form = profile.form_of(weight, schedule) if weight in matrices else Form.FLOAT
        if form is Form.FLOAT:
            work.nodes.append(node)
        elif form is Form.ROWS8:
            work.rows8(node, weight)
        else:
            work.blocks(node, weight, *_BLOCKS[form])
    work.narrow_embedding()
    work.finish()
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return work.made


class _Rewrite:
    """The nodes and initializers of a graph as they become."""

    def __init__(self, graph: onnx.GraphProto, weights: Weights) -> None:
        self.graph, self.weights = graph, weights
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.made: Made = {}
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.replaced: set[str] = set()
        self.rows: dict[str, str] = {}  # activations that are there in int8, and the magnitudes of their rows
        self.packed: tuple[str, Columns8 | Blocks] | None = None  # the matrix that was packed last

    def rows8(self, node: onnx.NodeProto, weight: str) -> None:
        """x @ W as ROWS8."""
        x, y = node.input[0], node.output[0]
        rows, columns = self.shapes[weight]
        values, scales, zeros = (f"{weight}.{part}" for part in ("int8", "scales", "zeros"))
        if weight not in self.replaced:
            self.replaced.add(weight)
            self.pack(weight, columns8, {values: (INT8, (rows, columns)), scales: (FLOAT, (columns,))})
            self.constant(zeros, np.zeros(columns, np.int8))
        largest = self.quantize_rows(x)
        inputs = [f"{x}.int8", values, _STEP, scales, _MIDDLE, zeros]
        self.emit("MatMulIntegerToFloat", inputs, [f"{y}.unit"], domain=MICROSOFT)
        self.emit("Mul", [f"{y}.unit", largest], [y])

    def quantize_rows(self, x: str) -> str:
        """The int8 form of an activation, made once; returns the name of its rows' magnitudes, [..., 1]."""
        if x not in self.rows:
            self.rows[x] = largest = f"{x}.largest"
            self.constant(_AXES, np.asarray([-1], np.int64))
            self.constant(_SMALLEST, np.asarray(1e-30, np.float32))
            self.constant(_STEP, np.asarray(1 / 127, np.float32))
            self.constant(_MIDDLE, np.asarray(128, np.uint8))
            self.emit("ReduceMax", [x, _AXES], [f"{x}.highest"], keepdims=1)
            self.emit("ReduceMin", [x, _AXES], [f"{x}.lowest"], keepdims=1)
            self.emit("Neg", [f"{x}.lowest"], [f"{x}.depth"])
            self.emit("Max", [f"{x}.highest", f"{x}.depth", _SMALLEST], [largest])
            self.emit("Div", [x, largest], [f"{x}.even"])
            # Of the domain com.microsoft, because ONNX Runtime 1.23 has no kernel of the standard one in opset 23.
            self.emit("QuantizeLinear", [f"{x}.even", _STEP, _MIDDLE], [f"{x}.int8"], domain=MICROSOFT)
        return self.rows[x]

    def blocks(self, node: onnx.NodeProto, weight: str, bits: int, block: int) -> None:
        """x @ W as BLOCKS8 or BLOCKS4."""
        rows, columns = self.shapes[weight]
        values, scales = f"{weight}.int{bits}", f"{weight}.scales"
        if weight not in self.replaced:
            self.replaced.add(weight)
            count = -(-rows // block)
            made = {values: (UINT8, (columns, count, block * bits // 8)), scales: (FLOAT, (columns * count,))}
            self.pack(weight, partial(blocks, bits=bits, block=block), made)
        self.emit(
            "MatMulNBits",
            [node.input[0], values, scales],
            list(node.output),
            domain=MICROSOFT,
            **{"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": _INT8_ACTIVATIONS},
        )

    def narrow_embedding(self) -> None:
        """Keep the embedding in the 16 bits that the checkpoint has, and widen only the rows that are looked up."""
        table = next((tensor for tensor in self.graph.initializer if tensor.name == EMBEDDING), None)
        readers = [node for node in self.nodes if EMBEDDING in node.input]
        if table is None or any(node.op_type != "Gather" for node in readers):
            return
        stored = self.weights.stored[EMBEDDING]
        if stored.kind not in NARROW or stored.transposed:
            return
        table.data_type = stored.kind
        for node in readers:
            narrow, wide = f"{node.output[0]}.narrow", node.output[0]
            place = next(index for index, other in enumerate(self.nodes) if other is node)
            node.output[0] = narrow
            self.nodes.insert(place + 1, helper.make_node("Cast", [narrow], [wide], to=FLOAT))

    def pack(
        self, weight: str, form: Callable[[np.ndarray], Columns8 | Blocks], made: dict[str, tuple[int, tuple[int, ...]]]
    ) -> None:
        """New initializers, by name with type and shape, that are `values` and `scales` of a packed matrix."""

        def part(which: str) -> np.ndarray:
            if self.packed is None or self.packed[0] != weight:
                self.packed = None  # free it first
                self.packed = weight, form(self.weights.read(weight))
            return getattr(self.packed[1], which)

        for which, (name, (kind, shape)) in zip(("values", "scales"), made.items(), strict=True):
            self.tensors.append(onnx.TensorProto(name=name, data_type=kind, dims=shape))
            self.made[name] = partial(part, which)

    def constant(self, name: str, array: np.ndarray) -> None:
        """A new initializer whose data are here; of one name only once."""
        if name not in self.shapes:
            self.shapes[name] = array.shape
            self.tensors.append(numpy_helper.from_array(array, name))

    def emit(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """A new node, with a name that a profile can be read by."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{PREFIX}.{outputs[0]}", **attributes))

    def finish(self) -> None:
        """Put everything into the graph. Raises RerouteError for a matrix that something else reads too."""
        read = {name for node in self.nodes for name in node.input}
        if shared := sorted(self.replaced & read):
            raise RerouteError(f"the matrix {shared[0]} is not only multiplied with", hint="build with --profile fp32")
        kept = [tensor for tensor in self.graph.initializer if tensor.name not in self.replaced]
        tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in (*kept, *self.tensors)]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)
        set_nodes(self.graph, self.nodes)
