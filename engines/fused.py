"""What the kernels of plugins_cpp do in one node, in a lowered decoder; found by what nodes are and not by their names.

| | nodes that become one |
|---|---|
| gated MLP | down(silu(gate(x)) * up(x)) |
| rest of a layer | r + mlp(norm(r)) with r = h + output(a): all that follows attention |
| linears | q(norm(h)), k(norm(h)), v(norm(h)); in a layer that scores, without k |

A value between them that something else reads keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import helper

from reroute.engines.branches import readers_of

NORM = "SimplifiedLayerNormalization"
_GRAPH = onnx.NodeProto()  # stands for the graph, which reads its outputs


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A root mean square norm: the rows that it is of, its weights, by name, and what it adds below the root."""

    x: str
    weight: str
    epsilon: float

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Norm:
        """What a node says."""
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return cls(x=node.input[0], weight=node.input[1], epsilon=float(given["epsilon"]))


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """MatMul nodes `gate`, `up`, `down`, and what is made between them, by name."""

    gate: onnx.NodeProto
    up: onnx.NodeProto
    down: onnx.NodeProto
    inner: tuple[str, ...]

    @property
    def products(self) -> tuple[onnx.NodeProto, ...]:
        """In the order of the kernel's inputs."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True)
class RestOfLayer:
    """Rows `h`, the MatMul node of attention's output, the norm and the MLP, and what is made between them."""

    h: str
    output: onnx.NodeProto
    norm: Norm
    mlp: GatedMlp
    inner: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Linears:
    """A norm and the two or three MatMul nodes that alone read it."""

    norm: Norm
    products: tuple[onnx.NodeProto, ...]


Found = GatedMlp | RestOfLayer | Linears


class Fusions:
    """All that a graph has.

    Attributes:
        at: what to put in place of a node, by the node's output.
        gone: outputs of nodes that are part of one and not in its place.
    """

    def __init__(self, graph: onnx.GraphProto, bits_of: Callable[[onnx.NodeProto], int]) -> None:
        """Find them.

        Args:
            graph: lowered; silu is x * Sigmoid(x).
            bits_of: bits of a product's weights; 0 for a node that is no part of one. The three products of a gated MLP
                have equal bits.
        """
        self._bits_of = bits_of
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers = readers_of(graph)
        for value in graph.output:
            self._readers[value.name].append(_GRAPH)
        self.at: dict[str, Found] = {}
        self.gone: set[str] = set()
        for node in graph.node:
            if bits_of(node) and (mlp := self._mlp(node)):
                layer = self._layer(mlp)
                self.at[layer[0] if layer else node.output[0]] = layer[1] if layer else mlp
                self.gone.update(layer[1].inner if layer else mlp.inner)
        for node in graph.node:
            if node.op_type == NORM and (linears := self._linears(node)):
                self.at[node.output[0]] = linears
                self.gone.update(name for product in linears.products for name in product.output)

    def _mlp(self, down: onnx.NodeProto) -> GatedMlp | None:
        for silu, up in self._factors(down.input[0]):
            for gate, sigmoid in self._factors(silu.output[0]):
                if sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != gate.output[0]:
                    continue
                bits = {self._bits_of(product) for product in (gate, up, down)}
                inner = (*(node.output[0] for node in (gate, sigmoid, silu, up)), down.input[0])
                # The gate's product is read twice, by the sigmoid and the product with it.
                alone = all(len(self._readers[name]) == (2 if name == gate.output[0] else 1) for name in inner)
                if len(bits) == 1 and gate.input[0] == up.input[0] and alone:
                    return GatedMlp(gate=gate, up=up, down=down, inner=inner)
        return None

    def _layer(self, mlp: GatedMlp) -> tuple[str, RestOfLayer] | None:
        """The rest of a layer that ends in this MLP, and the name of its result."""
        normed, made = mlp.gate.input[0], mlp.down.output[0]
        norm = self._makers.get(normed)
        if norm is None or norm.op_type != NORM or len(self._readers[normed]) != 2 or len(self._readers[made]) != 1:
            return None
        residual, (last,) = norm.input[0], self._readers[made]
        before = self._makers.get(residual)
        if before is None or before.op_type != "Add" or last.op_type != "Add":
            return None
        if sorted(last.input) != sorted([residual, made]) or len(self._readers[residual]) != 2:
            return None
        for h, attended in (before.input, reversed(before.input)):
            output = self._makers.get(attended)
            if output is not None and self._bits_of(output) and len(self._readers[attended]) == 1:
                inner = (*mlp.inner, made, normed, residual, attended)
                return last.output[0], RestOfLayer(h=h, output=output, norm=Norm.of(norm), mlp=mlp, inner=inner)
        return None

    def _linears(self, norm: onnx.NodeProto) -> Linears | None:
        readers = self._readers[norm.output[0]]
        if len(readers) not in (2, 3) or not all(self._bits_of(reader) for reader in readers):
            return None
        if any(name in self.gone for reader in readers for name in reader.output):  # gate and up of an MLP
            return None
        return Linears(norm=Norm.of(norm), products=tuple(readers))

    def _factors(self, name: str) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """The nodes that make the factors of a product of two, in either order."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "Mul" and all(factor in self._makers for factor in maker.input):
            left, right = (self._makers[factor] for factor in maker.input)
            yield left, right
            yield right, left
