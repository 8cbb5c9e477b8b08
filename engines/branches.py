"""What only one branch of an If reads is computed in that branch.

A decision runs only in steps with visual rows (see `reroute.engines.lower`). Its body is an op's, so what goes into the
op is outside: the norm's last row, its query, shapes. None of that is needed where the decision does not run, so it
moves inside, and a decoded token does not pay for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import onnx

from reroute.engines.widen import set_nodes


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads of the graph around it, its branches included; inner names of branches are among them."""
    yield from node.input
    yield from names_inside(node)


def names_inside(node: onnx.NodeProto) -> Iterator[str]:
    """What the branches of a node read, and what they return."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _names(attribute.g)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read a value, themselves or in a branch; one that reads it twice stands there twice."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in names_read(node):
            readers[name].append(node)
    return readers


def sink(graph: onnx.GraphProto) -> None:
    """Move nodes into the then-branch of an If that alone reads their outputs, in place."""
    nodes = list(graph.node)
    for choice in [node for node in nodes if node.op_type == "If"]:
        nodes = _sink(nodes, choice, {value.name for value in graph.output})
    if len(nodes) != len(graph.node):
        set_nodes(graph, nodes)


def _sink(nodes: list[onnx.NodeProto], choice: onnx.NodeProto, outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes without those that go into a branch of `choice`, one of them."""
    branch = next(attribute.g for attribute in choice.attribute if attribute.name == "then_branch")
    inside = set(_names(branch))
    elsewhere = outputs | set(choice.input)
    for attribute in choice.attribute:
        if attribute.name == "else_branch":
            elsewhere.update(_names(attribute.g))
    kept: list[onnx.NodeProto] = []
    moved: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if node is choice:
            kept.append(node)
        elif inside.intersection(node.output) and not elsewhere.intersection(node.output):
            moved.append(node)
            inside.update(names_read(node))
        else:
            kept.append(node)
            elsewhere.update(names_read(node))
    if moved:
        set_nodes(branch, [*reversed(moved), *branch.node])
    return kept[::-1]


def _names(branch: onnx.GraphProto) -> Iterator[str]:
    for node in branch.node:
        yield from names_read(node)
    yield from (value.name for value in branch.output)
