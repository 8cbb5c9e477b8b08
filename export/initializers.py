"""Weights in a traced graph: bound to the checkpoint, and written to a data file one at a time.

A graph is traced and optimised with parameters that have no data (`reroute.export.weights`), so no pass can read or
merge them. `bind` then says for each where its data are, and what the graph makes of them:

* A checkpoint of 16 bits stays one: the initializer has its dtype and a Cast before its first use makes it float32, so
  that the graph computes in float32 wherever it runs, and the file is half as large. Lowering takes the casts away
  (`reroute.engines.widen`).
* A matrix that the graph transposes (torch's own Linear in a vision tower) is stored transposed instead.
* A matrix that is needed both ways (a tied embedding) is stored once; its transpose is a node that lowering takes away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from reroute.export.weights import NARROW, Weight

_KINDS = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


class Unread(ir.LazyTensor):
    """A weight that is read from the checkpoint when its bytes are asked for."""

    def __init__(self, weight: Weight, shape: ir.Shape, name: str) -> None:
        super().__init__(self.held, dtype=_KINDS[weight.dtype], shape=shape, name=name)
        self.weight = weight

    def held(self) -> TorchTensor:
        """The same tensor, read."""
        return TorchTensor(self.weight.stored(), name=self.name)


def unbind(graph: ir.Graph, weights: Mapping[str, Weight]) -> None:
    """Take the placeholders of a trace away, so that passes see weights without a value."""
    for name in weights:
        if name in graph.initializers:
            graph.initializers[name].const_value = None


def bind(graph: ir.Graph, weights: Mapping[str, Weight]) -> None:
    """Give an optimised graph its weights; see the module docstring."""
    bound = {name: weight for name, weight in weights.items() if name in graph.initializers}
    for name in list(bound):
        _store_transposed(graph, name, bound)
    plain = {weight.name: name for name, weight in bound.items() if not weight.transposed}
    for name, weight in bound.items():
        if weight.transposed and weight.name in plain:
            _transpose_node(graph, graph.initializers.pop(name), graph.initializers[plain[weight.name]])
    for name, weight in bound.items():
        if name in graph.initializers:
            _bind(graph, graph.initializers[name], weight)


def _bind(graph: ir.Graph, value: ir.Value, weight: Weight) -> None:
    """Refer an initializer to its weight; one of 16 bits feeds a Cast in its place."""
    name, shape = value.name or "", value.shape
    assert shape is not None
    # A new value: what the trace noted about the old one is of no use. In the order of the weights, whatever they are.
    bound = ir.Value(name=name, shape=shape, type=ir.TensorType(_KINDS[weight.dtype]))
    if weight.dtype in NARROW:
        _replace(graph, value, ir.node("Cast", [bound], {"to": ir.DataType.FLOAT.value}), f"{name}.float32")
    else:
        value.replace_all_uses_with(bound)
    del graph.initializers[name]
    bound.const_value = Unread(weight, shape, name)
    graph.initializers[name] = bound


def _store_transposed(graph: ir.Graph, name: str, bound: dict[str, Weight]) -> None:
    """Let a matrix that a graph only transposes be stored so."""
    value, weight = graph.initializers[name], bound[name]
    nodes = [node for node, _ in value.uses()]
    turned = all(node.domain == "" and node.op_type == "Transpose" for node in nodes)
    if not turned or not nodes or value.shape is None or len(value.shape) != 2:
        return
    other = ir.Value(name=name, shape=ir.Shape(value.shape[::-1]), type=ir.TensorType(ir.DataType.FLOAT))
    for node in nodes:
        node.outputs[0].replace_all_uses_with(other)
        graph.remove(node, safe=True)
    del graph.initializers[name]
    graph.initializers[name] = other
    bound[name] = replace(weight, transposed=not weight.transposed)


def _transpose_node(graph: ir.Graph, value: ir.Value, source: ir.Value) -> None:
    """Make the initializer `value` a transpose of the initializer `source`."""
    _replace(graph, value, ir.node("Transpose", [source], {"perm": [1, 0]}), value.name or "")


def _replace(graph: ir.Graph, value: ir.Value, node: ir.Node, name: str) -> None:
    """Let a new node's output, called `name`, stand for `value`, before the first node that reads it."""
    users = {user for user, _ in value.uses()}
    first = next(candidate for candidate in graph if candidate in users)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    value.replace_all_uses_with(output)
    graph.insert_before(first, node)


class DataFile:
    """A file of weights that one or several graphs refer to, each tensor once. Small ones go into the graphs."""

    SMALLEST = 1024  # bytes
    ALIGNMENT = 64
    LARGE = 1 << 16  # bytes from which a tensor starts at a page, so that an engine can map the file
    PAGE = 4096

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[object, tuple[int, int]] = {}
        self.end = 0

    def take(self, graph: ir.Model) -> None:
        """Move the weights of a graph into the file, reading one after the other."""
        with self.path.open("ab" if self.end else "wb") as file:
            for value in graph.graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    raise RuntimeError(f"the initializer {value.name} has no value")
                if tensor.nbytes < self.SMALLEST:
                    if isinstance(tensor, Unread):
                        value.const_value = tensor.held()
                    continue
                if isinstance(tensor, Unread):
                    key: object = tensor.weight.key
                else:
                    key = hashlib.sha256(tensor.tobytes()).digest(), tensor.dtype
                if key not in self.places:
                    align = self.PAGE if tensor.nbytes >= self.LARGE else self.ALIGNMENT
                    start = -(-self.end // align) * align
                    file.write(bytes(start - self.end))
                    data = tensor.weight.stored() if isinstance(tensor, Unread) else None
                    file.write(tensor.tobytes() if data is None else data.view(-1).view(torch.uint8).numpy().data)
                    self.places[key], self.end = (start, tensor.nbytes), start + tensor.nbytes
                offset, length = self.places[key]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=self.path.parent,
                )
