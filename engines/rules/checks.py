"""One function for each rule: it yields the nodes that break it, with what is wrong there.

A rule that needs a fact that the shape inference does not know says nothing: the rules refuse what is certain to fail,
and passing them does not prove that TensorRT parses the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from reroute.engines.dialects import PLUGIN_OPS
from reroute.engines.rules import operators as data
from reroute.engines.rules.graph import Graph, attributes, label
from reroute.engines.rules.operators import Version

Broken = Iterator[tuple[str, str]]


def opset(graph: Graph, version: Version) -> Broken:
    """The default domain's version lies in the documented range."""
    highest, _ = data.HIGHEST_OPSET[max(since for since in data.HIGHEST_OPSET if since <= version)]
    if not data.LOWEST_OPSET <= graph.opset <= highest:
        yield "graph", f"opset {graph.opset}, supported are {data.LOWEST_OPSET} to {highest}"


def operator(graph: Graph, version: Version) -> Broken:
    """Every node is an operator that the parser imports at this version, or one of our plugins."""
    for node in graph.nodes:
        if node.op_type in PLUGIN_OPS:
            continue
        entry = data.OPERATORS.get(node.op_type)
        if entry is None:
            yield label(node), f"no importer for {node.op_type}"
        elif entry[0] > version:
            yield label(node), f"{node.op_type} is imported since {text(entry[0])} only"


def name_taken(graph: Graph, version: Version) -> Broken:
    """Dispatch is by op type alone: a custom op called like a standard one is taken for it."""
    del version
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") and node.op_type in data.OPERATORS:
            yield label(node), f"{node.domain}.{node.op_type} would be imported as the standard {node.op_type}"


def function_left(graph: Graph, version: Version) -> Broken:
    """No function shares a name with a plugin: which of the two is taken depends on the version."""
    wins = "plugin" if (10, 7) <= version < (10, 15) else "function"
    for function in graph.model.functions:
        if function.name in PLUGIN_OPS:
            yield function.name, f"has a function and a plugin, of which {text(version)} takes the {wins}"


def first_type(graph: Graph, version: Version) -> Broken:
    """The type of a node's first input is one that the operator is documented for."""
    del version
    for node in graph.nodes:
        entry = data.OPERATORS.get(node.op_type)
        if entry is None or not node.input or not node.input[0]:
            continue
        kind = graph.type_of(node.input[0])
        if kind is not None and kind not in entry[1]:
            yield label(node), f"{node.op_type} of {kind}, supported are {', '.join(sorted(entry[1]))}"


def foreign_type(graph: Graph, version: Version) -> Broken:
    """No tensor has a type that TensorRT does not have."""
    del version
    for name in (*sorted(graph.inputs), *(output for node in graph.nodes for output in node.output)):
        if (kind := graph.type_of(name)) in data.FOREIGN_TYPES:
            yield name, f"is of type {kind}"


def constant_input(graph: Graph, version: Version) -> Broken:
    """Inputs that the importer reads at build time are constants."""
    del version
    for node in graph.nodes:
        for index in data.CONSTANT_INPUTS.get(node.op_type, ()):
            if index < len(node.input) and node.input[index] and not graph.is_constant(node.input[index]):
                yield label(node), f"input {index} of {node.op_type} ({node.input[index]}) is not a constant"


def top_k(graph: Graph, version: Version) -> Broken:
    """TopK is sorted and its K positive and below 3840; K that is computed may reach the longest step."""
    del version
    for node in _standard(graph, "TopK"):
        values = attributes(node)
        if values.get("sorted", 1) != 1:
            yield label(node), "TopK with sorted = 0"
        known = graph.constant(node.input[1])
        if known is not None and not 1 <= int(known.ravel()[0]) < data.TOP_K_BELOW:
            yield label(node), f"TopK of K = {int(known.ravel()[0])}, it must be 1 to {data.TOP_K_BELOW - 1}"
        if known is None and (most := _longest(graph, node)) >= data.TOP_K_BELOW:
            yield label(node), f"TopK whose K can reach {most}, it must stay below {data.TOP_K_BELOW}"


def data_dependent(graph: Graph, version: Version) -> Broken:
    """No output shape depends on values: decode could not be captured in a CUDA graph."""
    del version
    for node in graph.nodes:
        if node.op_type in data.DATA_DEPENDENT:
            yield label(node), f"the output shape of {node.op_type} depends on values"


def subgraph(graph: Graph, version: Version) -> Broken:
    """No control flow: its bodies are not looked at."""
    del version
    for node in graph.nodes:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            yield label(node), f"{node.op_type} has a subgraph, which these rules do not see"


def scatter_reduction(graph: Graph, version: Version) -> Broken:
    """ScatterND has no `reduction` attribute, not even "none"."""
    del version
    for node in _standard(graph, "ScatterND"):
        if "reduction" in attributes(node):
            yield label(node), "ScatterND with the attribute reduction"


def attention(graph: Graph, version: Version) -> Broken:
    """Attention is 4-D, without caches, softcap and score outputs, and its mask is explicit."""
    del version
    for node in _standard(graph, "Attention"):
        names = [name for name in node.input if name]
        if len(names) > 4 or len([name for name in node.output if name]) > 1:
            yield (
                label(node),
                f"Attention with {len(names)} inputs and {len(node.output)} outputs: no caches, no scores",
            )
        for name in names:
            if (shape := graph.shape_of(name)) is not None and len(shape) != 4:
                yield label(node), f"the input {name} of Attention is {len(shape)}-D, it must be 4-D"
        values = attributes(node)
        for name in sorted({"softcap", "qk_matmul_output_mode"} & values.keys()):
            yield label(node), f"Attention with the attribute {name}"
        if values.get("is_causal"):
            yield label(node), "Attention with is_causal, which is upper-left: wrong as soon as the cache is longer"


def tensor_scatter(graph: Graph, version: Version) -> Broken:
    """TensorScatter updates a 4-D network input of static capacity into a network output, along axis -2."""
    del version
    for node in _standard(graph, "TensorScatter"):
        cache, out = node.input[0], node.output[0]
        shape = graph.shape_of(cache)
        if attributes(node).get("axis", -2) != -2:
            yield label(node), "TensorScatter along another axis than -2"
        if shape is not None and len(shape) != 4:
            yield label(node), f"TensorScatter of a {len(shape)}-D cache, it must be 4-D"
        elif shape is not None and not isinstance(shape[2], int):
            yield label(node), f"the cache {cache} has the capacity {shape[2]}, it must be a number"
        if cache not in graph.inputs or out not in graph.outputs:
            yield label(node), f"{cache} -> {out} must be an input and an output of the graph"


def rotary(graph: Graph, version: Version) -> Broken:
    """Position ids of RotaryEmbedding are int64."""
    del version
    for node in _standard(graph, "RotaryEmbedding"):
        if len(node.input) > 3 and node.input[3]:
            kind = graph.type_of(node.input[3])
            if kind not in (None, "INT64"):
                yield label(node), f"the position ids are {kind}, they must be INT64"


def rank(graph: Graph, version: Version) -> Broken:
    """No tensor has more than eight dimensions."""
    del version
    for node in graph.nodes:
        for name in node.output:
            if len(graph.shape_of(name) or ()) > data.MAX_RANK:
                yield label(node), f"{name} has more than {data.MAX_RANK} dimensions"


def plugin_attribute(graph: Graph, version: Version) -> Broken:
    """Integer attributes of a plugin fit 32 bits: the importer hands them over as int32."""
    del version
    for node in graph.nodes:
        for name, value in attributes(node).items() if node.op_type in PLUGIN_OPS else ():
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                yield label(node), f"the attribute {name} = {value} does not fit 32 bits"


def text(version: Version) -> str:
    """10.3 for (10, 3)."""
    return ".".join(map(str, version))


def _standard(graph: Graph, name: str) -> Iterator[onnx.NodeProto]:
    """Nodes of one standard operator."""
    return (node for node in graph.nodes if node.op_type == name and node.domain in ("", "ai.onnx"))


def _longest(graph: Graph, node: onnx.NodeProto) -> int:
    """Upper bound of a computed K: the sorted axis, where its length is known."""
    shape = graph.shape_of(node.input[0])
    size = None if shape is None else shape[int(str(attributes(node).get("axis", -1)))]
    return size if isinstance(size, int) else graph.rows
