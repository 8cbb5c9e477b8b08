"""What rules look at: a graph with the types and shapes of its values and what is constant in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

Shape = tuple[int | str | None, ...]


class Graph:
    """A lowered graph, read only.

    Attributes:
        model: as given.
        rows: most rows that one step can have (text and visual), the bound of every length that is not known.
    """

    def __init__(self, model: onnx.ModelProto, *, functions: Sequence[onnx.FunctionProto] = (), rows: int) -> None:
        """Infer types and shapes; `functions` say what plugin nodes give, for the inference alone."""
        self.model, self.rows = model, rows
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        whole.functions.extend(functions)
        graph = onnx.shape_inference.infer_shapes(whole, data_prop=True).graph
        self._values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    @property
    def nodes(self) -> Iterable[onnx.NodeProto]:
        """The nodes in order."""
        return self.model.graph.node

    @property
    def opset(self) -> int:
        """Version of the default domain."""
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of the graph's inputs."""
        return frozenset(value.name for value in self.model.graph.input)

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(value.name for value in self.model.graph.output)

    def type_of(self, name: str) -> str | None:
        """ONNX type of a value ("FLOAT"), None if the inference does not know."""
        if name in self._weights:
            kind = self._weights[name].data_type
        elif name in self._values:
            kind = self._values[name].type.tensor_type.elem_type
        else:
            return None
        return onnx.TensorProto.DataType.Name(kind) if kind else None

    def shape_of(self, name: str) -> Shape | None:
        """Shape of a value, names for dynamic dimensions; None if not even the rank is known."""
        if name in self._weights:
            return tuple(self._weights[name].dims)
        value = self._values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)

    def is_constant(self, name: str) -> bool:
        """Whether a builder can fold the value: weights, constants, and what is computed from them alone."""
        if name in self._weights:
            return True
        node = self._makers.get(name)
        return node is not None and (node.op_type == "Constant" or all(self.is_constant(i) for i in node.input if i))

    def constant(self, name: str) -> np.ndarray | None:
        """Value of a weight or Constant; None for anything else, and for weights in an external file."""
        if name in self._weights:
            tensor = self._weights[name]
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            return None if external else numpy_helper.to_array(tensor)
        node = self._makers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        value = onnx.helper.get_attribute_value(node.attribute[0])
        return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """Attribute values of a node by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def label(node: onnx.NodeProto) -> str:
    """A node's name, or its first output, which names it as well."""
    return node.name or next(iter(node.output), node.op_type)
