"""What becomes one node of the kernels, and what keeps nodes apart."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from reroute.engines.fused import NORM, Fusions, GatedMlp, Linears, RestOfLayer

BITS = {"q": 8, "k": 8, "v": 4, "o": 8, "gate": 4, "up": 4, "down": 4}


def layer() -> list[onnx.NodeProto]:
    """A layer whose values are named after what they are: in `h` and `a`, out `y`."""

    def product(weight: str, x: str) -> onnx.NodeProto:
        return helper.make_node("MatMul", [x, f"{weight}.weight"], [f"{weight}.out"], name=weight)

    def norm(x: str, y: str) -> onnx.NodeProto:
        return helper.make_node(NORM, [x, f"{y}.weight"], [y], axis=-1, epsilon=0.25, stash_type=1)

    return [
        norm("h", "in"),
        *(product(weight, "in") for weight in ("q", "k", "v")),
        helper.make_node("Concat", ["q.out", "k.out", "v.out"], ["a"], axis=-1),
        product("o", "a"),
        helper.make_node("Add", ["h", "o.out"], ["r"]),
        norm("r", "x"),
        product("gate", "x"),
        helper.make_node("Sigmoid", ["gate.out"], ["sigmoid"]),
        helper.make_node("Mul", ["gate.out", "sigmoid"], ["silu"]),
        product("up", "x"),
        helper.make_node("Mul", ["silu", "up.out"], ["hidden"]),
        product("down", "hidden"),
        helper.make_node("Add", ["r", "down.out"], ["y"]),
    ]


def found(
    nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",), bits: dict[str, int] | None = None
) -> Fusions:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    return Fusions(helper.make_graph(nodes, "g", [], values), lambda node: (BITS | (bits or {})).get(node.name, 0))


def swapped(name: str) -> Callable[[list[onnx.NodeProto]], None]:
    def change(nodes: list[onnx.NodeProto]) -> None:
        (node,) = (one for one in nodes if one.output[0] == name)
        node.input[:] = [*reversed(node.input)]

    return change


@pytest.mark.parametrize("change", [None, *map(swapped, ("r", "y", "silu", "hidden"))])
def test_a_layer_is_two_nodes_whatever_the_order_of_factors_and_summands(
    change: Callable[[list[onnx.NodeProto]], None] | None,
):
    nodes = layer()
    if change:
        change(nodes)
    fusions = found(nodes)
    first, rest = fusions.at["in"], fusions.at["y"]
    assert isinstance(first, Linears)
    assert isinstance(rest, RestOfLayer)
    assert len(fusions.at) == 2
    assert (first.norm.x, first.norm.weight, first.norm.epsilon) == ("h", "in.weight", 0.25)
    assert [product.name for product in first.products] == ["q", "k", "v"]
    assert (rest.h, rest.output.name, rest.norm.x, rest.norm.weight) == ("h", "o", "r", "x.weight")
    assert [product.name for product in rest.mlp.products] == ["gate", "up", "down"]
    assert fusions.gone | fusions.at.keys() == {name for node in nodes for name in node.output} - {"a"}


@pytest.mark.parametrize("value", ["x", "r", "o.out", "down.out"])
def test_a_value_of_the_rest_that_something_else_reads_leaves_the_mlp(value: str):
    for fusions in (
        found(layer(), ("y", value)),
        found([*layer(), helper.make_node("Identity", [value], ["other"])]),
    ):
        assert isinstance(fusions.at["down.out"], GatedMlp)
        assert "y" not in fusions.at
        assert not {"x", "r", "o.out", "y"} & fusions.gone


@pytest.mark.parametrize("value", ["gate.out", "sigmoid", "silu", "up.out", "hidden"])
def test_a_value_of_the_mlp_that_something_else_reads_leaves_all_apart(value: str):
    assert found(layer(), ("y", value)).at.keys() == {"in", "x"}


def test_a_layer_that_scores_has_a_norm_with_two_products():
    nodes = [node for node in layer() if node.name != "k"]
    next(node for node in nodes if node.output[0] == "a").input.remove("k.out")
    linears = found(nodes).at["in"]
    assert isinstance(linears, Linears)
    assert [product.name for product in linears.products] == ["q", "v"]


def test_a_norm_that_a_branch_reads_too_keeps_its_products_apart():
    branch = helper.make_graph([helper.make_node("Identity", ["in"], ["scored"])], "b", [], [])
    fusions = found([*layer(), helper.make_node("If", ["some"], ["z"], then_branch=branch, else_branch=branch)])
    assert fusions.at.keys() == {"y"}


@pytest.mark.parametrize(
    ("bits", "at"),
    [
        ({"k": 0}, {"y"}),
        ({"o": 0}, {"in", "down.out"}),
        ({"up": 8}, {"in", "x"}),  # of other bits, gate and up are two products of a norm
        ({"down": 8}, {"in", "x"}),
        ({"gate": 0}, {"in"}),
    ],
)
def test_products_of_other_bits_stay_nodes(bits: dict[str, int], at: set[str]):
    assert found(layer(), bits=bits).at.keys() == at


def test_a_bias_of_the_output_leaves_the_mlp():
    nodes = layer()
    bias = helper.make_node("Add", ["o.out", "o.bias"], ["o.sum"])
    place = next(i for i, node in enumerate(nodes) if node.output[0] == "r")
    nodes[place].input[1] = "o.sum"
    assert found([*nodes[:place], bias, *nodes[place:]]).at.keys() == {"in", "down.out"}
