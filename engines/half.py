"""fp16 graphs: strongly typed, so precision is written into the ONNX file and a builder has nothing to choose.

The *decoder* (neutral graph) is fp16 throughout: weights, residual stream, caches, visual embeddings. fp32 stay the
logits, the rotary tables as inputs (cast once), and, inside the ops' own bodies, scoring, norm statistics and softmax.

The *vision graph* keeps fp32 between its products: only weighted MatMul and Conv, and attention, run in fp16. So norms,
residual stream and all of Nüwa's choices (salience, similarity, ranks) are as exact as the products allow. It is run
once per image; its weights are halved all the same.

Only types are declared here; `reroute.engines.weights` converts the data when they are written.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence

import onnx
from onnx import helper, numpy_helper

from reroute.engines.dialects import DOMAIN
from reroute.engines.weights import to_half
from reroute.engines.widen import FLOAT, HALF, set_nodes

_ATTENTION = {("", "Attention"), (DOMAIN, "RerouteFullAttention")}


def decoder_to_half(model: onnx.ModelProto) -> None:
    """Declare a neutral decoder graph fp16, in place; its weights are declared fp32."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.data_type = HALF
    first: list[onnx.NodeProto] = []
    for value in graph.input:
        if value.type.tensor_type.elem_type != FLOAT:
            continue
        if value.name.startswith("rope_"):
            first.append(_cast(value.name, f"{value.name}.half", HALF))
        else:
            value.type.tensor_type.elem_type = HALF
    _rename_inputs(graph, {node.input[0]: node.output[0] for node in first})
    for node in graph.node:
        _retype(node)
    last: list[onnx.NodeProto] = []
    for value in graph.output:
        if value.type.tensor_type.elem_type != FLOAT:
            continue
        if value.name == "logits":
            last.append(_cast("logits.half", "logits", FLOAT))
        else:
            value.type.tensor_type.elem_type = HALF
    _rename_outputs(graph, {node.output[0]: node.input[0] for node in last})
    set_nodes(graph, [*first, *graph.node, *last])


def vision_to_half(model: onnx.ModelProto) -> None:
    """Declare the products of a vision graph and its `visual_embeds` fp16, in place; its weights are declared fp32."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == FLOAT}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    chosen = [node for node in graph.node if _is_product(node, set(weights))]
    picked = {id(node) for node in chosen}
    cast_of: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if id(node) not in picked:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name in weights and all(id(user) in picked for user in users[name]):
                weights[name].data_type = HALF
                continue
            if name not in cast_of:
                cast_of[name] = f"{name}.half"
                nodes.append(_cast(name, cast_of[name], HALF))
            node.input[index] = cast_of[name]
        output = node.output[0]
        node.output[0] = f"{output}.product"
        nodes += [node, _cast(node.output[0], output, FLOAT)]
    value = next(value for value in graph.output if value.name == "visual_embeds")
    value.type.tensor_type.elem_type = HALF
    set_nodes(graph, nodes)
    _rename_outputs(graph, {"visual_embeds": "visual_embeds.wide"})
    graph.node.append(_cast("visual_embeds.wide", "visual_embeds", HALF))


def _is_product(node: onnx.NodeProto, weights: set[str]) -> bool:
    if (node.domain, node.op_type) in _ATTENTION:
        return True
    return node.op_type in ("MatMul", "Conv") and not node.domain and any(name in weights for name in node.input)


def _retype(node: onnx.NodeProto) -> None:
    """fp32 constants and casts of a decoder become fp16."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
            attribute.i = HALF
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
            name = attribute.t.name or node.output[0]
            attribute.t.CopyFrom(numpy_helper.from_array(to_half(numpy_helper.to_array(attribute.t), name)))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    _rename(graph, lambda node: node.input, names)


def _rename_outputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename what nodes produce, for the nodes that read it too; the graph's outputs keep their names."""
    _rename(graph, lambda node: node.output, names)
    _rename(graph, lambda node: node.input, names)


def _rename(
    graph: onnx.GraphProto, field: Callable[[onnx.NodeProto], MutableSequence[str]], names: dict[str, str]
) -> None:
    for node in graph.node:
        values = field(node)
        for index, name in enumerate(values):
            values[index] = names.get(name, name)
