"""Quantisation of a lowered decoder: matrices get the forms of a profile, in the graph and, one at a time, on disk.

ROWS8, of a float32 activation x with rows r:

    step(r) = max |x(r, :)| / 127              ReduceMax, ReduceMin, Neg, Max, Mul: small, one number for each row
    x8 = quantise(x, step)                     QuantizeLinear, a block for each row: it fills -127..127 around 128
    y  = (x8 @ W8) * scales * step             MatMulIntegerToFloat, Mul

ONNX Runtime's own dynamic quantisation has one scale for a whole activation, so that one row with a large value, which
decoders have at their first tokens (arXiv 2402.17762), costs all others their precision. Projections that read the
same activation share its quantised form. Activations are unsigned around 128 because signed ones have no VNNI kernel.
Of a gated MLP, the product with the steps of `up` waits: it is one number for each row, so that it can follow behind
`down`, where rows are narrow.

BLOCKS8 and BLOCKS4 are MatMulNBits with int8 activations (accuracy level 4).

With the kernels of plugins_cpp a product is one node, which quantises rows as it goes, and several are one where
`reroute.engines.fused` finds them. Their 8 bits are ROWS8, also in place of BLOCKS8; their 4 bits are the weights of
BLOCKS4, with a step for each row of activations. The output matrix stays BLOCKS8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reroute.engines.branches import names_inside, readers_of
from reroute.engines.dialects.ort import KERNELS
from reroute.engines.fused import Fusions, GatedMlp, Linears, RestOfLayer
from reroute.engines.packing import Blocks, Columns8, blocked4, blocked8, blocked_shape, blocks, columns8
from reroute.engines.profiles import Form, Profile
from reroute.engines.weights import Weights
from reroute.engines.widen import FLOAT, NARROW, set_nodes
from reroute.errors import RerouteError
from reroute.schedule import Schedule

MICROSOFT = "com.microsoft"
EMBEDDING, OUTPUT = "embed.weight", "lm_head.weight"
_BLOCKS = {Form.BLOCKS8: (8, 128), Form.BLOCKS4: (4, 64)}
PREFIX = "Quantized"  # of the names of all nodes that are made here
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level
# Constants that all activations share; the smallest step, so that a row of zeros is not divided by zero.
_AXES, _SMALLEST, _LEVELS, _ONE, _MIDDLE = (
    f"quantize.{word}" for word in ("axes", "smallest", "levels", "one", "middle")
)
# ONNX Runtime 1.23, the last for Python 3.10 (JetPack 6), has no kernel of QuantizeLinear in opset 23; the other
# operators of a lowered decoder are all in this one.
_OPSET = 21
INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
Made = dict[str, Callable[[], np.ndarray]]


def quantize(
    model: onnx.ModelProto, weights: Weights, profile: Profile, schedule: Schedule, *, kernels: bool = False
) -> Made:
    """Give the matrices of a lowered decoder their forms, in place.

    Args:
        model: lowered for ONNX Runtime, weights declared float32.
        weights: of the graph that it came from.
        profile: which forms.
        schedule: where scores are made.
        kernels: lowered in the dialect "ort-kernels"; products are nodes of the domain `KERNELS`.

    Returns:
        The new initializers: what makes them, to be called once, when they are written.
    """
    if not profile.quantized:
        return {}
    graph = model.graph
    work = _Rewrite(graph, weights, profile, schedule, kernels=kernels)
    for node in graph.node:
        if work.fuse(node):
            continue
        form = work.form_of(node)
        if form is Form.FLOAT:
            work.keep(node)
        elif work.bits_of(node):
            work.linear(node)
        elif form is Form.ROWS8:
            work.rows8(node, node.input[1])
        else:
            work.blocks(node, node.input[1], *_BLOCKS[form])
    work.narrow_embedding()
    work.finish()
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = min(entry.version, _OPSET)
    known = {entry.domain for entry in model.opset_import}
    if MICROSOFT not in known:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return work.made


class _Rewrite:
    """The nodes and initializers of a graph as they become."""

    def __init__(
        self, graph: onnx.GraphProto, weights: Weights, profile: Profile, schedule: Schedule, *, kernels: bool
    ) -> None:
        self.graph, self.weights = graph, weights
        self.profile, self.schedule, self.kernels = profile, schedule, kernels
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.made: Made = {}
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.matrices = {
            tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.data_type == FLOAT
        }
        self.readers = readers_of(graph)
        # Branches stay as they are: there a decision makes its scores.
        self.inside = {name for node in graph.node for name in names_inside(node)}
        self.outputs = {value.name for value in graph.output}
        self.replaced: set[str] = set()
        self.rows: dict[str, str] = {}  # activations that are there in int8, and the steps of their rows
        self.waiting: dict[str, tuple[str, str]] = {}  # products whose steps wait: the product without, the steps
        self.owed: dict[str, str] = {}  # activations that lack the steps of the row, and those steps
        self.packed: tuple[str, Columns8 | Blocks] | None = None  # the matrix that was packed last
        self.fusions = Fusions(graph, self.bits_of) if kernels else None

    def bits_of(self, node: onnx.NodeProto) -> int:
        """Bits of a product's weights in the kernels; 0 for what they do not do."""
        form = self.form_of(node)
        if not self.kernels or form is Form.FLOAT or node.input[1] == OUTPUT:
            return 0
        return 4 if form is Form.BLOCKS4 else 8

    def fuse(self, node: onnx.NodeProto) -> bool:
        """Put one node of the kernels in place of several; whether `node` is one of them."""
        if self.fusions is None:
            return False
        found = self.fusions.at.get(node.output[0])
        if isinstance(found, GatedMlp):
            (inner, hidden), (_, outer) = (self.shapes[product.input[1]] for product in found.products[1:])
            sizes = {"K": inner, "F": hidden, "N": outer, "bits": self.bits_of(found.down)}
            self.kernel("Mlp", [found.gate.input[0], *map(self.kernel_weight, found.products)], node.output, sizes)
        elif isinstance(found, RestOfLayer):
            output, norm, mlp = found.output, found.norm, found.mlp
            (attended, width), (_, hidden) = (self.shapes[product.input[1]] for product in (output, mlp.gate))
            sizes = {"K": attended, "D": width, "F": hidden, "output_bits": self.bits_of(output)}
            sizes["bits"] = self.bits_of(mlp.down)
            inputs = [found.h, output.input[0], self.kernel_weight(output), norm.weight]
            inputs += map(self.kernel_weight, mlp.products)
            self.kernel("RestOfLayer", inputs, node.output, sizes, epsilon=norm.epsilon)
        elif isinstance(found, Linears):
            sizes = {"count": len(found.products), "K": self.shapes[found.products[0].input[1]][0]}
            for i, product in enumerate(found.products):
                sizes |= {f"N{i}": self.shapes[product.input[1]][1], f"bits{i}": self.bits_of(product)}
            inputs = [found.norm.x, found.norm.weight, *map(self.kernel_weight, found.products)]
            outputs = [product.output[0] for product in found.products]
            self.kernel("Linears", inputs, outputs, sizes, epsilon=found.norm.epsilon)
        return found is not None or node.output[0] in self.fusions.gone

    def linear(self, node: onnx.NodeProto) -> None:
        """x @ W as one node of the kernels."""
        rows, columns = self.shapes[node.input[1]]
        sizes = {"K": rows, "N": columns, "bits": self.bits_of(node)}
        self.kernel("Linear", [node.input[0], self.kernel_weight(node)], node.output, sizes)

    def kernel(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], sizes: dict[str, int], **others: float
    ) -> None:
        """A node of the kernels."""
        self.emit(kind, list(inputs), list(outputs), domain=KERNELS, **sizes, **others)

    def kernel_weight(self, product: onnx.NodeProto) -> str:
        """The name of a product's matrix as the kernels read it."""
        weight, bits = product.input[1], self.bits_of(product)
        name = f"{weight}.int{bits}"
        if weight not in self.replaced:
            self.replaced.add(weight)
            blocked = blocked8 if bits == 8 else blocked4
            rows, columns = self.shapes[weight]
            self.tensors.append(onnx.TensorProto(name=name, data_type=UINT8, dims=blocked_shape(rows, columns, bits)))
            self.made[name] = lambda: blocked(self.weights.read(weight))
        return name

    def form_of(self, node: onnx.NodeProto) -> Form:
        """What becomes of a node: FLOAT is as it is."""
        if node.op_type != "MatMul" or len(node.input) != 2 or node.input[1] not in self.matrices:
            return Form.FLOAT
        weight = node.input[1]
        return self.profile.form_of(weight, self.schedule, scores=weight not in self.inside)

    def keep(self, node: onnx.NodeProto) -> None:
        """A node as it is, but that it reads a product whose steps wait without them, and owes them."""
        for place, name in enumerate(node.input):
            if name in self.waiting:
                node.input[place], self.owed[node.output[0]] = self.waiting[name]
        self.nodes.append(node)

    def rows8(self, node: onnx.NodeProto, weight: str) -> None:
        """x @ W as ROWS8."""
        x, y = node.input[0], node.output[0]
        rows, columns = self.shapes[weight]
        values, scales, zeros = (f"{weight}.{part}" for part in ("int8", "scales", "zeros"))
        if weight not in self.replaced:
            self.replaced.add(weight)
            self.pack(weight, columns8, {values: (INT8, (rows, columns)), scales: (FLOAT, (columns,))})
            self.constant(zeros, np.zeros(columns, np.int8))
        steps = self.quantize_rows(x, rows)
        inputs = [f"{x}.int8", values, _ONE, scales, _MIDDLE, zeros]
        self.emit("MatMulIntegerToFloat", inputs, [f"{y}.unit"], domain=MICROSOFT)
        if self.can_wait(y):
            self.waiting[y] = f"{y}.unit", steps
        else:
            self.emit("Mul", [f"{y}.unit", steps], [y])

    def can_wait(self, y: str) -> bool:
        """Whether all that becomes of y is one product, which only matrices in ROWS8 read."""
        if len(self.readers[y]) != 1 or y in self.outputs:
            return False
        product = self.readers[y][0]
        name = product.output[0]
        return (
            product.op_type == "Mul"
            and list(product.input).count(y) == 1
            and not any(other in self.waiting for other in product.input)
            and name not in self.outputs
            and all(self.form_of(reader) is Form.ROWS8 for reader in self.readers[name])
        )

    def quantize_rows(self, x: str, width: int) -> str:
        """The int8 form of an activation [..., width], made once; returns the name of its rows' steps, [..., 1]."""
        if x not in self.rows:
            self.rows[x] = steps = f"{x}.steps"
            self.constant(_AXES, np.asarray([-1], np.int64))
            self.constant(_SMALLEST, np.asarray(1e-30, np.float32))
            self.constant(_LEVELS, np.asarray(1 / 127, np.float32))
            self.constant(_ONE, np.asarray(1, np.float32))
            self.constant(_MIDDLE, np.asarray(128, np.uint8))
            self.emit("ReduceMax", [x, _AXES], [f"{x}.highest"], keepdims=1)
            self.emit("ReduceMin", [x, _AXES], [f"{x}.lowest"], keepdims=1)
            self.emit("Neg", [f"{x}.lowest"], [f"{x}.depth"])
            self.emit("Max", [f"{x}.highest", f"{x}.depth", _SMALLEST], [f"{x}.largest"])
            self.emit("Mul", [f"{x}.largest", _LEVELS], [steps])
            self.emit("Shape", [steps], [f"{x}.count"])
            self.emit("Expand", [_MIDDLE, f"{x}.count"], [f"{x}.middle"])
            inputs = [x, steps, f"{x}.middle"]
            self.emit("QuantizeLinear", inputs, [f"{x}.int8"], axis=-1, block_size=width)
            if x in self.owed:
                self.rows[x] = f"{x}.all_steps"
                self.emit("Mul", [steps, self.owed[x]], [self.rows[x]])
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
        if shared := sorted(self.replaced.intersection(name for node in self.nodes for name in node.input)):
            raise RerouteError(f"the matrix {shared[0]} is not only multiplied with", hint="build with --profile fp32")
        gone = self.replaced - self.inside
        kept = [tensor for tensor in self.graph.initializer if tensor.name not in gone]
        tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in (*kept, *self.tensors)]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)
        set_nodes(self.graph, self.nodes)
