"""Weights of 16 bits in a neutral graph: an export keeps them as the checkpoint has them and casts them where they are
used, so that the graph computes in float32 wherever it runs. Lowering takes the casts away again: what is declared is
then float32, as if the checkpoint had been, and a backend decides what to store (`reroute.engines.weights`).

    before   lm_head.weight FLOAT16 -> Cast(to=FLOAT) -> MatMul
    after    lm_head.weight FLOAT   -> MatMul

A matrix that is used both ways (a tied embedding) is stored once in an export and transposed behind the cast; here the
transposed form becomes a weight of its own, because a backend wants none behind a run-time Transpose.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx
from onnx import numpy_helper

from reroute.errors import RerouteError

FLOAT, HALF, BFLOAT = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
NARROW = (HALF, BFLOAT)
Proto = TypeVar("Proto", onnx.NodeProto, onnx.ValueInfoProto)


def widen(model: onnx.ModelProto) -> dict[str, str]:
    """Declare the weights of a neutral graph as float32, in place; their data have to be written anew.

    Returns:
        New initializers that are the transposed form of another: their names, and whose.

    Raises:
        RerouteError: a weight of 16 bits that something else than a Cast to float32 reads.
    """
    graph = model.graph
    narrow = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in NARROW}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and not node.domain and node.input[0] in narrow and _target(node) == FLOAT:
            names[node.output[0]] = node.input[0]
        elif stray := [name for name in node.input if name in narrow]:
            raise RerouteError(
                f"the weight {stray[0]} of 16 bits is read by {node.op_type} without a cast", hint="export again"
            )
        else:
            nodes.append(node)
    for node in nodes:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
    for tensor in narrow.values():
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
        tensor.data_type = FLOAT
    kept, turned = _without_transposes(graph, nodes)
    # Initializers say their type themselves, and the casts' outputs are no more.
    gone = names.keys() | {tensor.name for tensor in graph.initializer}
    types = [_copy(value) for value in graph.value_info if value.name not in gone]
    set_nodes(graph, kept)
    graph.value_info.extend(types)
    return turned


def _without_transposes(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto]
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """The nodes but those that transpose a matrix of the initializers, whose outputs become initializers."""
    matrices = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    kept: list[onnx.NodeProto] = []
    turned: dict[str, str] = {}
    for node in nodes:
        if node.op_type != "Transpose" or node.domain or node.input[0] not in matrices:
            kept.append(node)
            continue
        source = matrices[node.input[0]]
        turned[node.output[0]] = source.name
        graph.initializer.add(
            name=node.output[0],
            data_type=source.data_type,
            dims=[source.dims[1], source.dims[0]],
            data_location=onnx.TensorProto.EXTERNAL,
        )
    return kept, turned


def _target(node: onnx.NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")


def set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph; the types of values are then to be inferred anew."""
    nodes = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _copy(message: Proto) -> Proto:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
