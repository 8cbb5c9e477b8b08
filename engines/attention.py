"""Attention over a cache in ONNX Runtime: a kernel of plugins_cpp, or GroupQueryAttention, for a long prompt several.

    rows <= LONG   out = GroupQueryAttention(q, k, v, past)
    rows >  LONG   q, k, v in PARTS parts, one after the other, each with the cache that the one before left

A part sees only the rows up to its own last one, so that four parts compute five eighths of the square of a prompt,
whatever the operator makes of what the causal mask hides; the result is the same. In a step of few rows present is
past's own memory, also inside the branch; in a long prompt it is written by the last part.

GroupQueryAttention writes the new rows at `seqlens_k + 1 - A` and attends lower-right causally, which is exactly the
contract of RerouteAttention. Its present output shares the past's memory when both are bound to one buffer.

This is a rewrite of the calls and not a body of the dialect, because what depends on a stage only (the length of its
caches) is computed once for all its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reroute.engines.dialects.ort import KERNELS
from reroute.engines.widen import set_nodes

LONG, PARTS = 400, 4
_OP = "RerouteAttention"
_STEP = 0
_ENDLESS = 1 << 40  # a prompt of several dialogues is not divided: its later parts would not run
_ATTRIBUTES = (("num_heads", "num_heads"), ("kv_num_heads", "num_kv_heads"), ("scale", "scale"))
_FLOAT, _INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32


def call_kernels(model: onnx.ModelProto) -> None:
    """Make the calls of RerouteAttention nodes of `KERNELS`, in place; inputs and attributes are the same."""
    for node in model.graph.node:
        if node.op_type == _OP:
            node.domain, node.op_type = KERNELS, "Attention"


def expand_attention(model: onnx.ModelProto) -> None:
    """Replace the calls of RerouteAttention in a neutral decoder by GroupQueryAttention, in place."""
    if not any(node.op_type == _OP for node in model.graph.node):
        return
    nodes: list[onnx.NodeProto] = _step()
    stages: dict[str, _Stage] = {}
    for node in model.graph.node:
        if node.op_type != _OP:
            nodes.append(node)
            continue
        kv_len = node.input[5]
        if kv_len not in stages:
            stages[kv_len] = _Stage(kv_len, len(stages))
            nodes += stages[kv_len].nodes
        nodes += _layer(node, len(nodes), stages[kv_len])
    constants = {"one": np.asarray([1], np.int32), "long": np.asarray([LONG], np.int64), "end": np.asarray([_ENDLESS])}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, _name(_STEP, key)) for key, value in constants.items()
    )
    set_nodes(model.graph, nodes)


def _name(place: int, *words: object) -> str:
    """A value's name; `place` tells the stages, or the calls, apart. Ends as the inliner's names do."""
    return f"attention_{'_'.join(map(str, words))}__{place}"


def _node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=f"{_OP}.{outputs[0]}", **attributes)


def _step() -> list[onnx.NodeProto]:
    """What depends on the step: its batch [1], and the rows above which a layer divides them, LONG or endless."""
    return [
        _node("Shape", ["input_ids"], [_name(_STEP, "batch")], start=0, end=1),
        _node("Cast", [_name(_STEP, "batch")], [_name(_STEP, "batch32")], to=_INT32),
        _node("Greater", [_name(_STEP, "batch32"), _name(_STEP, "one")], [_name(_STEP, "several")]),
        _node("Where", [_name(_STEP, "several"), _name(_STEP, "end"), _name(_STEP, "long")], [_name(_STEP, "limit")]),
    ]


class _Stage:
    """What depends on a stage: where its caches end, as the operator wants it.

    Attributes:
        last: int32 [B], valid rows less 1.
        total: int32, valid rows.
        length: the input that says so, int32 [1].
    """

    def __init__(self, kv_len: str, number: int) -> None:
        self.length, self.last, self.total = kv_len, _name(number, "last"), _name(number, "total")
        one = _name(number, "below")
        self.nodes = [
            _node("Sub", [kv_len, _name(_STEP, "one")], [one]),
            _node("Expand", [one, _name(_STEP, "batch")], [self.last]),
            _node("Squeeze", [kv_len], [self.total]),
        ]


def _layer(call: onnx.NodeProto, place: int, stage: _Stage) -> list[onnx.NodeProto]:
    """The nodes of one call; `place` makes their names unique."""
    rows, divide = _name(place, "rows"), _name(place, "divide")
    whole, parts = ([_name(place, kind, word) for word in ("out", "key", "value")] for kind in ("whole", "parts"))
    at_once = _attention(call, call.input[:3], call.input[3:5], [stage.last, stage.total], whole)
    return [
        _node("Shape", [call.input[0]], [rows], start=1, end=2),
        _node("Greater", [rows, _name(_STEP, "limit")], [divide]),
        _node(
            "If",
            [divide],
            call.output,
            then_branch=_branch(_in_parts(call, place, rows, stage, parts), parts),
            else_branch=_branch([at_once], whole),
        ),
    ]


def _attention(
    call: onnx.NodeProto, rows: Sequence[str], past: Sequence[str], ends: Sequence[str], outputs: Sequence[str]
) -> onnx.NodeProto:
    """GroupQueryAttention with the attributes of a call, of other rows."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in call.attribute}
    settings = {name: given[source] for name, source in _ATTRIBUTES}
    return _node("GroupQueryAttention", [*rows, *past, *ends], outputs, domain="com.microsoft", **settings)


def _in_parts(
    call: onnx.NodeProto, place: int, rows: str, stage: _Stage, outputs: Sequence[str]
) -> list[onnx.NodeProto]:
    """Divide the rows of a call, attend part by part, and put the results together."""

    def part(number: int, word: str) -> str:
        return _name(place, "part", number, word)

    names = ("q", "k", "v")
    nodes = [
        _node("Split", [name], [part(i, word) for i in range(PARTS)], axis=1, num_outputs=PARTS)
        for name, word in zip(call.input[:3], names, strict=True)
    ]
    before, past = _name(place, "before"), call.input[3:5]
    nodes.append(_node("Cast", [rows], [_name(place, "rows32")], to=_INT32))
    nodes.append(_node("Sub", [stage.length, _name(place, "rows32")], [before]))
    for i in range(PARTS):
        own = {word: part(i, word) for word in (*names, "out", "key", "value", "count", "rows", "end", "last", "total")}
        present = list(outputs[1:]) if i == PARTS - 1 else [own["key"], own["value"]]
        nodes += [
            _node("Shape", [own["q"]], [own["count"]], start=1, end=2),
            _node("Cast", [own["count"]], [own["rows"]], to=_INT32),
            _node("Add", [before, own["rows"]], [own["end"]]),
            _node("Sub", [own["end"], _name(_STEP, "one")], [own["last"]]),
            _node("Squeeze", [own["end"]], [own["total"]]),
            _attention(call, [own[w] for w in names], past, [own["last"], own["total"]], [own["out"], *present]),
        ]
        before, past = own["end"], present
    nodes.append(_node("Concat", [part(i, "out") for i in range(PARTS)], [outputs[0]], axis=1))
    return nodes


def _branch(nodes: list[onnx.NodeProto], outputs: Sequence[str]) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, _FLOAT, None) for name in outputs]
    return helper.make_graph(nodes, outputs[0], [], values)
