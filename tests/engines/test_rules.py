"""Every rule of the TensorRT check is broken by a graph here, and says the node, the rule and the source."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest

from reroute.engines.rules import RULES, findings, require
from reroute.engines.rules.operators import CONSTANT_INPUTS, OPERATORS
from reroute.errors import UserError

HEADER = '<ir_version: 10, opset_import: ["": {opset}, "reroute": 1, "my": 1]>'
IO = "(float[1, N] x, float[1, 2, N, 4] q, float[1, 2, 64, 4] past, float[1, 2, C, 4] wide, int64[1, N] ids) => "


def graph(body: str, outputs: str = "float y", *, opset: int = 20) -> onnx.ModelProto:
    text = f"{HEADER.format(opset=opset)}\ng {IO} ({outputs}) {{\n{body}\n}}"
    return onnx.parser.parse_model(text)


def rules_of(model: onnx.ModelProto, version: tuple[int, int], *, rows: int = 600) -> list[tuple[str, str]]:
    return [(finding.rule, finding.node) for finding in findings(model, version, rows=rows)]


K = "k = Constant <value = int64[1] {5}> ()\n"
BREAKS: dict[str, tuple[str, str, int, tuple[int, int], tuple[str, str]]] = {
    # name: (body, outputs, opset, version, (rule, node))
    "opset too high": ("y = Relu (x)", "float y", 24, (10, 3), ("opset", "graph")),
    "opset too low": ("y = Relu (x)", "float y", 8, (10, 16), ("opset", "graph")),
    "unknown operator": ("y = my.Thing (x)", "float y", 20, (10, 16), ("operator", "y")),
    "operator of a later version": (
        "y = Attention <scale: float = 1.0> (q, q, q)", "float y", 23, (10, 13), ("operator", "y")
    ),
    "refused operator": ("y = Det (x)", "float y", 20, (10, 16), ("operator", "y")),
    "custom op with a standard name": ("y = my.TopK (x)", "float y", 20, (10, 16), ("name_taken", "y")),
    "boolean sum": (
        "b = Greater (x, x)\nc = Cast <to: int = 6> (b)\ny = CumSum (c, k)", "int32 y", 20, (10, 16),
        ("first_type", "y"),
    ),
    "double": (
        "d = Cast <to: int = 11> (x)\ny = Cast <to: int = 1> (d)", "float y", 20, (10, 16), ("foreign_type", "d")
    ),
    "axes that are computed": (
        "s = Shape <start: int = 0, end: int = 1> (x)\ny = ReduceMean (x, s)", "float y", 20, (10, 16),
        ("constant_input", "y"),
    ),
    "TopK unsorted": (
        "y, i = TopK <sorted: int = 0> (x, k)", "float y", 20, (10, 16), ("top_k", "y")
    ),
    "TopK of zero": (
        "none = Constant <value = int64[1] {0}> ()\ny, i = TopK (x, none)", "float y", 20, (10, 16), ("top_k", "y")
    ),
    "TopK of too many": (
        "many = Constant <value = int64[1] {3840}> ()\ny, i = TopK (x, many)", "float y", 20, (10, 16), ("top_k", "y")
    ),
    "NonZero": ("y = NonZero (x)", "int64 y", 20, (10, 16), ("data_dependent", "y")),
    "scatter with reduction": (
        'u = Unsqueeze (ids, k)\ny = ScatterND <reduction: string = "none"> (x, u, x)', "float y", 20, (10, 16),
        ("scatter_reduction", "y"),
    ),
    "flat attention": (
        "y = Attention <q_num_heads: int = 1, kv_num_heads: int = 1> (x, x, x)", "float y", 23, (10, 16),
        ("attention", "y"),
    ),
    "softcap": ("y = Attention <softcap: float = 0.0> (q, q, q)", "float y", 23, (10, 16), ("attention", "y")),
    "upper-left mask": ("y = Attention <is_causal: int = 1> (q, q, q)", "float y", 23, (10, 16), ("attention", "y")),
    "attention with a cache": (
        "y, pk, pv = Attention (q, q, q, , past, past)", "float y, float pk, float pv", 23, (10, 16), ("attention", "y")
    ),
    "cache of unknown capacity": (
        "y = TensorScatter (wide, q)", "float y", 24, (10, 16), ("tensor_scatter", "y")
    ),
    "cache along another axis": (
        "y = TensorScatter <axis: int = 1> (past, q)", "float y", 24, (10, 16), ("tensor_scatter", "y")
    ),
    "cache that is no output": (
        "p = TensorScatter (past, q)\ny = Relu (p)", "float y", 24, (10, 16), ("tensor_scatter", "p")
    ),
    "positions of the wrong type": (
        "p = Cast <to: int = 6> (ids)\ny = RotaryEmbedding (q, x, x, p)", "float y", 23, (10, 16), ("rotary", "y")
    ),
    "nine dimensions": (
        "many = Constant <value_ints = [1, 1, 1, 1, 1, 1, 1, 1, -1]> ()\ny = Reshape (x, many)",
        "float[1, 1, 1, 1, 1, 1, 1, 1, N] y", 20, (10, 16), ("rank", "y"),
    ),
    "budget beyond 32 bits": (
        "y = reroute.RerouteSelect <keep: int = 4294967296> (x, q, ids, ids)", "int64 y", 20, (10, 16),
        ("plugin_attribute", "y"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_names_the_node(name: str) -> None:
    body, outputs, opset, version, expected = BREAKS[name]
    assert expected in rules_of(graph(K + body, outputs, opset=opset), version)


def test_a_graph_with_a_subgraph_is_refused() -> None:
    model = graph("b = Relu (x)\ny = Relu (b)")
    branch = onnx.helper.make_graph([], "branch", [], [onnx.helper.make_tensor_value_info("x", 1, [1])])
    model.graph.node.append(onnx.helper.make_node("If", ["b"], ["z"], then_branch=branch, else_branch=branch))
    assert ("subgraph", "z") in rules_of(model, (10, 16))


@pytest.mark.parametrize(("version", "taken"), [((10, 3), "function"), ((10, 10), "plugin"), ((10, 15), "function")])
def test_a_function_beside_a_plugin_is_refused(version: tuple[int, int], taken: str) -> None:
    model = graph("y = reroute.RerouteGather (x, ids)")
    text = '<opset_import: ["": 20], domain: "reroute"> RerouteGather (x, slots) => (y) { y = Identity (x) }'
    model.functions.append(onnx.parser.parse_function(text))
    (found,) = [found for found in findings(model, version, rows=600) if found.rule == "function_left"]
    assert found.message.endswith(f"takes the {taken}")


def test_every_rule_is_broken_by_some_graph() -> None:
    covered = {rule for _, _, _, _, (rule, _) in BREAKS.values()} | {"subgraph", "function_left"}
    assert covered == {check.__name__ for check, _ in RULES}


@pytest.mark.parametrize(("rows", "refused"), [(3839, False), (3840, True)])
def test_a_computed_k_is_bounded_by_the_longest_step(rows: int, refused: bool) -> None:
    model = graph("s = Shape <start: int = 1, end: int = 2> (ids)\ny, i = TopK (x, s)")
    assert (("top_k", "y") in rules_of(model, (10, 16), rows=rows)) == refused


@pytest.mark.parametrize("version", [(10, 3), (10, 16), (11, 4)])
def test_an_ordinary_graph_breaks_nothing(version: tuple[int, int]) -> None:
    body = f"{K}y1, i = TopK (x, k)\nu = Unsqueeze (y1, k)\nr = ReduceMean (u, k)\ny = Relu (r)"
    assert rules_of(graph(body), version) == []


def test_the_message_says_everything() -> None:
    found = findings(graph(f"{K}y, i = TopK <sorted: int = 0> (x, k)"), (10, 3), rows=9)
    with pytest.raises(UserError) as caught:
        require("decoder", found, (10, 3))
    for part in ("TensorRT 10.3", "the decoder", "y: TopK with sorted = 0", "rule top_k", "operators.md"):
        assert part in str(caught.value)


def test_every_rule_has_a_source() -> None:
    assert all(len(source) > 20 for _, source in RULES)
    assert all(check.__doc__ for check, _ in RULES)


@pytest.mark.parametrize("names", [("Attention", "TensorScatter", "TopK", "RotaryEmbedding", "RMSNormalization")])
def test_the_table_knows_the_operators_of_the_dialects(names: Sequence[str]) -> None:
    assert set(names) <= OPERATORS.keys()
    assert set(CONSTANT_INPUTS) <= OPERATORS.keys()
