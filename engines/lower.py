"""Lowering: give every `reroute` op of a neutral graph a dialect's body and inline it."""

from __future__ import annotations

import onnx
from onnx import inliner

from reroute.engines.dialects import DIALECTS, DOMAIN
from reroute.errors import RerouteError


def lower(model: onnx.ModelProto, dialect_name: str) -> onnx.ModelProto:
    """A copy of `model` (weights may stay external) in which only the dialect's operators are left.

    Raises:
        RerouteError: an op without a body, which would mean that export and dialect are of different versions.
    """
    dialect = DIALECTS[dialect_name]
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
    bodies |= {name: onnx.parser.parse_function(text) for name, text in dialect.bodies.items()}
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    if missing := sorted(used - bodies.keys()):
        raise RerouteError(f"the dialect {dialect_name} has no body for {', '.join(missing)}", hint="export again")
    del lowered.functions[:]
    lowered.functions.extend(bodies[name] for name in sorted(used))
    _import(lowered, dialect.opsets)
    lowered = inliner.inline_local_functions(lowered)
    kept = [entry for entry in lowered.opset_import if entry.domain != DOMAIN]
    del lowered.opset_import[:]
    lowered.opset_import.extend(kept)
    for entry in lowered.opset_import:
        if entry.domain == "" and dialect.opset is not None:
            entry.version = dialect.opset
    if left := sorted({node.op_type for node in lowered.graph.node if node.domain == DOMAIN}):
        raise RerouteError(f"not lowered: {', '.join(left)}", hint="this is a defect of the dialect: report it")
    return lowered


def _import(model: onnx.ModelProto, opsets: dict[str, int]) -> None:
    known = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items() if domain not in known
    )
