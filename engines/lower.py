"""Lowering: give every `reroute` op of a neutral graph a dialect's body and inline it.

TensorRT gets one of two forms of the same graph. *Native*: every op is inlined. *Plugin*: the ops of the C++ plugin
stay nodes and their functions are dropped; `with_functions` puts the functions back, for engines without the plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx
from onnx import inliner

from reroute.engines.attention import call_kernels, expand_attention
from reroute.engines.dialects import DIALECTS, DOMAIN, PLUGIN_OPS, Dialect
from reroute.engines.targets import Form
from reroute.errors import RerouteError

_DECISIONS = "RerouteSelect"  # what the names of all ops that decide begin with
_CANDIDATES, _ALWAYS = "candidates", "always"  # inputs of theirs


def lower(model: onnx.ModelProto, dialect_name: str, *, form: Form = "native") -> onnx.ModelProto:
    """A copy of `model` (weights may stay external) in which only the dialect's operators are left.

    Args:
        model: a neutral graph.
        dialect_name: see `DIALECTS`.
        form: "plugin" keeps the ops of `PLUGIN_OPS` as nodes without a body.

    Raises:
        RerouteError: an op without a body, which would mean that export and dialect are of different versions.
    """
    dialect = DIALECTS[dialect_name]
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    kept = set(PLUGIN_OPS if form == "plugin" else ())
    if dialect.full_attention:
        _call_full_attention(lowered)
    if dialect.attention == "grouped":
        expand_attention(lowered)
    elif dialect.attention == "kernels":
        call_kernels(lowered)
    bodies = _bodies(model, dialect)
    used = {node.op_type for node in lowered.graph.node if node.domain == DOMAIN}
    if missing := sorted(used - bodies.keys()):
        raise RerouteError(f"the dialect {dialect_name} has no body for {', '.join(missing)}", hint="export again")
    del lowered.functions[:]
    lowered.functions.extend(bodies[name] for name in sorted(used - kept))
    _name_nodes(lowered.functions)
    if dialect.guarded_decisions:
        for function in lowered.functions:
            if function.name.startswith(_DECISIONS):
                _guard(function)
    _import(lowered, dialect.opsets)
    lowered = inliner.inline_local_functions(lowered)
    left = {node.op_type for node in lowered.graph.node if node.domain == DOMAIN}
    if stray := sorted(left - kept):
        raise RerouteError(f"not lowered: {', '.join(stray)}", hint="this is a defect of the dialect: report it")
    entries = [entry for entry in lowered.opset_import if entry.domain != DOMAIN or left]
    del lowered.opset_import[:]
    lowered.opset_import.extend(entries)
    for entry in lowered.opset_import:
        if entry.domain == "" and dialect.opset is not None:
            entry.version = dialect.opset
    return lowered


def with_functions(model: onnx.ModelProto, neutral: onnx.ModelProto, dialect_name: str) -> onnx.ModelProto:
    """A copy of a graph in plugin form with the dialect's functions for its plugin nodes attached: runs anywhere.

    Args:
        model: what `lower(neutral, dialect_name, form="plugin")` gave, possibly changed since.
        neutral: the graph that it came from.
        dialect_name: see `DIALECTS`.
    """
    bodies = _bodies(neutral, DIALECTS[dialect_name])
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for name in sorted(plugin_nodes(model)):
        function = whole.functions.add()
        function.CopyFrom(bodies[name])
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    return whole


def plugin_nodes(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each plugin op a graph holds, by op type: what the built engine must have as plugin layers."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node if node.op_type in PLUGIN_OPS).items()))


def _bodies(model: onnx.ModelProto, dialect: Dialect) -> dict[str, onnx.FunctionProto]:
    bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
    return bodies | {name: onnx.parser.parse_function(text) for name, text in dialect.bodies.items()}


def _name_nodes(functions: Iterable[onnx.FunctionProto]) -> None:
    """Name every node after its op, `RerouteSelect.scores`: inlined, it still says so, and so does a profile."""
    for function in functions:
        for node in function.node:
            node.name = f"{function.name}.{node.output[0]}"


def _guard(function: onnx.FunctionProto) -> None:
    """Run a decision's body only where there are candidates, in place.

    A step of text alone keeps its text rows, which is what the decision's input `always` is: one small branch instead
    of some thirty small nodes, at every decision of every decoded token.
    """
    body = list(function.node)
    (slots,) = function.output
    kind = onnx.TensorProto.INT64
    ranked, kept, count, some = (f"{slots}_{word}" for word in ("ranked", "kept", "count", "some"))
    ranking = onnx.helper.make_graph(body, "ranking", [], [onnx.helper.make_tensor_value_info(ranked, kind, None)])
    for node in ranking.node:
        for names in (node.input, node.output):
            names[:] = [ranked if name == slots else name for name in names]
    keeping = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [_ALWAYS], [kept], name=f"{function.name}.{kept}")],
        "keeping",
        [],
        [onnx.helper.make_tensor_value_info(kept, kind, None)],
    )
    nodes = [
        onnx.helper.make_node("Shape", [_CANDIDATES], [count], start=1, end=2),
        onnx.helper.make_node("Cast", [count], [some], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", [some], [slots], then_branch=ranking, else_branch=keeping),
    ]
    for node in nodes:
        node.name = f"{function.name}.guard_{node.output[0]}"
    del function.node[:]
    function.node.extend(nodes)


def _call_full_attention(model: onnx.ModelProto) -> None:
    """Turn standard Attention nodes of three inputs into calls of RerouteFullAttention. Raises RerouteError."""
    for node in model.graph.node:
        if node.domain or node.op_type != "Attention":
            continue
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        scale = values.pop("scale", None)
        if len(node.input) != 3 or len(node.output) != 1 or scale is None or any(values.values()):
            raise RerouteError(
                f"the Attention node {node.name or node.output[0]} is not plain: {len(node.input)} inputs, {values}",
                hint="export again; if it stays, report it",
            )
        node.domain, node.op_type = DOMAIN, "RerouteFullAttention"
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("scale", scale))
        _import(model, {DOMAIN: 1})


def _import(model: onnx.ModelProto, opsets: dict[str, int]) -> None:
    known = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items() if domain not in known
    )
