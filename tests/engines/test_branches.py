"""What only a branch reads is computed in it, and nothing else moves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from reroute.engines.branches import names_inside, names_read, sink

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL


def graph_of(else_reads: str = "x") -> onnx.GraphProto:
    """`far` and `near` feed the then-branch alone; `shared` is an output too; `both` may feed the other branch."""

    def value(name: str, kind: int = FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, None if kind == FLOAT else [])

    then = helper.make_graph([helper.make_node("Sum", ["near", "shared", "both"], ["yes"])], "then", [], [value("yes")])
    other = helper.make_graph([helper.make_node("Neg", [else_reads], ["no"])], "other", [], [value("no")])
    nodes = [
        helper.make_node("Neg", ["x"], ["far"]),
        helper.make_node("Abs", ["far"], ["near"]),
        helper.make_node("Exp", ["x"], ["shared"]),
        helper.make_node("Sqrt", ["shared"], ["both"]),
        helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, [3]), value("condition", BOOL)]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("y", "shared")]
    return helper.make_graph(nodes, "g", inputs, outputs)


def results(graph: onnx.GraphProto, condition: bool) -> list[np.ndarray]:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    engine = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = engine.run(None, {"x": np.asarray([0.5, 1, 2], np.float32), "condition": np.asarray(condition)})
    return [np.asarray(one) for one in found]


@pytest.mark.parametrize(("else_reads", "left"), [("x", ["Exp", "If"]), ("both", ["Exp", "Sqrt", "If"])])
def test_what_one_branch_reads_moves_into_it(else_reads: str, left: list[str]):
    graph, before = graph_of(else_reads), graph_of(else_reads)
    sink(graph)
    assert [node.op_type for node in graph.node] == left
    for condition in (True, False):
        assert all(
            np.array_equal(a, b) for a, b in zip(results(graph, condition), results(before, condition), strict=True)
        )


def test_names_of_branches_are_among_what_a_node_reads():
    choice = graph_of().node[-1]
    assert set(names_read(choice)) == {"condition"} | set(names_inside(choice))
    assert {"near", "shared", "both", "x"} <= set(names_inside(choice))


def test_a_graph_without_branches_stays_as_it_is():
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [], [])
    before = graph.SerializeToString()
    sink(graph)
    assert graph.SerializeToString() == before
