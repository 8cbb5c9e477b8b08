"""Budgets as an input: one decoder graph, and so one set of weights, for every tier of an export.

A neutral graph has a schedule's budgets as attributes of its decisions. For an export with tiers they become rows of
one more input:

| input | dtype | shape | meaning |
|---|---|---|---|
| budgets | int64 [decisions, 2] | of each decision (keep, whole): `keep` rows, or a share keep / whole of a pool |

Only the source of the numbers changes: each op of the domain `reroute` that has these attributes gets a twin whose body
is its own, with the constants that read an attribute replaced by an element of the new input. So what is ranked, and
how ties are broken, is what it was. `RerouteSelect`, which knows no shares, reads `keep` alone: where a tier has a
share, the graph was traced with `RerouteSelectPools`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import helper

from reroute.engines.dialects import DOMAIN
from reroute.errors import RerouteError
from reroute.manifest import Manifest, Part, Tensor
from reroute.schedule import Schedule

BUDGETS = "budgets"
_COLUMNS = ("keep", "whole")  # attributes of a decision, in the order of the input's columns
_TWIN = "WithBudget"
_ROW = "budget_row"  # input of the twins; no body has a value of this name


def take_budgets(model: onnx.ModelProto, manifest: Manifest) -> tuple[onnx.ModelProto, Part]:
    """A copy of a neutral decoder graph (weights may stay external) with the input `budgets`, and its I/O table.

    Args:
        model: the decoder of an export.
        manifest: of an export with tiers.

    Raises:
        RerouteError: the graph's decisions are not those of the manifest.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    graph = whole.graph
    # Every decision needs what the one before it chose, so the order of the nodes is theirs.
    decisions = [node for node in graph.node if node.domain == DOMAIN and "keep" in _attributes(node)]
    _require_traced(decisions, [tier.schedule for tier in manifest.tiers.values()])
    functions = {function.name: function for function in model.functions if function.domain == DOMAIN}
    for name in sorted({node.op_type for node in decisions}):
        if name not in functions:
            raise RerouteError(f"the graph has no function for {name}", hint="export again")
        whole.functions.append(_twin(functions[name]))
    rows: list[onnx.NodeProto] = []
    for number, node in enumerate(decisions):
        index, row = f"{BUDGETS}.{number}.index", f"{BUDGETS}.{number}"
        rows.append(helper.make_node("Constant", [], [index], value_int=number))
        rows.append(helper.make_node("Gather", [BUDGETS, index], [row], name=row, axis=0))
        node.op_type += _TWIN
        node.input.append(row)
        kept = [attribute for attribute in node.attribute if attribute.name not in _COLUMNS]
        del node.attribute[:]
        node.attribute.extend(kept)
    nodes = [*rows, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    shape = (len(decisions), len(_COLUMNS))
    graph.input.append(helper.make_tensor_value_info(BUDGETS, onnx.TensorProto.INT64, shape))
    part = manifest.parts["decoder"]
    return whole, replace(part, inputs=(*part.inputs, Tensor(name=BUDGETS, dtype="int64", shape=shape)))


def _twin(function: onnx.FunctionProto) -> onnx.FunctionProto:
    """The function with one more input, `_ROW` int64 [2], in place of the attributes of `_COLUMNS`."""
    twin = onnx.FunctionProto()
    twin.CopyFrom(function)
    twin.name += _TWIN
    twin.input.append(_ROW)
    kept = [name for name in function.attribute if name not in _COLUMNS]
    del twin.attribute[:]
    twin.attribute.extend(kept)
    nodes: list[onnx.NodeProto] = []
    for node in function.node:
        read = [attribute.ref_attr_name for attribute in node.attribute if attribute.ref_attr_name in _COLUMNS]
        if not read:
            nodes.append(node)
            continue
        # A Constant that reads an attribute: a scalar, as is an element of the input.
        index = f"{node.output[0]}_index"
        nodes.append(helper.make_node("Constant", [], [index], value_int=_COLUMNS.index(read[0])))
        nodes.append(helper.make_node("Gather", [_ROW, index], list(node.output), axis=0))
    del twin.node[:]
    twin.node.extend(nodes)
    return twin


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _require_traced(decisions: Sequence[onnx.NodeProto], schedules: Sequence[Schedule]) -> None:
    """The graph was traced with the budgets of one of the tiers. Raises RerouteError."""
    values = [_attributes(node) for node in decisions]
    found = tuple((one["keep"], one.get("whole", 0)) for one in values)
    if found not in [schedule.portions for schedule in schedules]:
        raise RerouteError(
            f"the decoder's graph decides {list(found)}, which is none of the manifest's tiers", hint="export again"
        )
