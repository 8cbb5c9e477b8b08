"""Gated MLPs in a lowered decoder: down(silu(gate(x)) * up(x)), found by what the nodes are and not by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx

from reroute.engines.branches import names_read


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """The products of a gated MLP.

    Attributes:
        gate, up, down: MatMul nodes.
        inner: what is made between them, by name; nothing else reads it.
    """

    gate: onnx.NodeProto
    up: onnx.NodeProto
    down: onnx.NodeProto
    inner: tuple[str, ...]


def gated_mlps(graph: onnx.GraphProto, bits_of: Callable[[onnx.NodeProto], int]) -> dict[str, GatedMlp]:
    """All of a graph, by the name of their output.

    Args:
        graph: lowered; silu is x * Sigmoid(x).
        bits_of: bits of a product's weights; 0 for a node that is no part of one. Its three products have equal bits.
    """
    makers = {name: node for node in graph.node for name in node.output}
    reads = Counter(name for node in graph.node for name in names_read(node))
    reads.update(value.name for value in graph.output)
    found = {}
    for node in graph.node:
        if bits_of(node):
            for mlp in _ending_in(node, makers, bits_of):
                # The gate's product is read twice, by the sigmoid and the product with it.
                if all(reads[name] == (2 if name == mlp.gate.output[0] else 1) for name in mlp.inner):
                    found[node.output[0]] = mlp
    return found


def _ending_in(
    down: onnx.NodeProto, makers: dict[str, onnx.NodeProto], bits_of: Callable[[onnx.NodeProto], int]
) -> Iterator[GatedMlp]:
    for silu, up in _factors(down.input[0], makers):
        for gate, sigmoid in _factors(silu.output[0], makers):
            if sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != gate.output[0]:
                continue
            if bits_of(gate) == bits_of(up) == bits_of(down) and gate.input[0] == up.input[0]:
                inner = (gate, sigmoid, silu, up)
                names = (*(node.output[0] for node in inner), down.input[0])
                yield GatedMlp(gate=gate, up=up, down=down, inner=names)


def _factors(name: str, makers: dict[str, onnx.NodeProto]) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """The nodes that make the factors of a product of two, in either order."""
    maker = makers.get(name)
    if maker is not None and maker.op_type == "Mul" and all(factor in makers for factor in maker.input):
        left, right = (makers[factor] for factor in maker.input)
        yield left, right
        yield right, left
