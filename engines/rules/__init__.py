"""Static rules: would this graph parse on a given TensorRT version? The answer names the node, the rule and its source.

TensorRT cannot run where most graphs are lowered, so this is what stands between a lowering and an hour on a Jetson. It
refuses what is documented to fail; what it passes may still fail for reasons that no document names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from reroute.engines.rules import checks
from reroute.engines.rules import operators as data
from reroute.engines.rules.graph import Graph
from reroute.engines.rules.operators import Version
from reroute.errors import UserError

Check = Callable[[Graph, Version], checks.Broken]

_KV_CACHE = f"{data.HEADER}, IKVCacheUpdateLayer; {data.DOC_10_15}"
# Each rule with the document that says so.
RULES: tuple[tuple[Check, str], ...] = (
    (checks.opset, f"{data.DOC_10_1}; {data.DOC_10_15}"),
    (checks.operator, f"{data.DOC_10_1}; {data.CHANGES}"),
    (checks.name_taken, "onnx-tensorrt, ModelImporter.cpp: importers are found by op_type"),
    (checks.function_left, "onnx-tensorrt, ModelImporter.cpp, 10.0 to 10.15; OnnxParserFlag kENABLE_PLUGIN_OVERRIDE"),
    (checks.first_type, f"{data.DOC_10_1}; {data.DOC_10_15}"),
    (checks.foreign_type, f"{data.DOC_10_1}, supported data types"),
    (checks.constant_input, f"{data.DOC_10_1}; {data.DOC_10_15}"),
    (checks.top_k, f"{data.DOC_10_1}; {data.HEADER}, ITopKLayer::setInput: a positive value"),
    (checks.data_dependent, "TensorRT developer guide, dynamically shaped output"),
    (checks.subgraph, "not a limit of TensorRT, but of these rules"),
    (checks.scatter_reduction, f"{data.IMPORTER}, ScatterND"),
    (checks.attention, f"{data.DOC_10_15}, Attention; {data.HEADER}, IAttention::setCausal"),
    (checks.tensor_scatter, _KV_CACHE),
    (checks.rotary, f"{data.DOC_10_15}, RotaryEmbedding"),
    (checks.rank, f"{data.HEADER}, Dims::MAX_DIMS"),
    (checks.plugin_attribute, f"{data.IMPORTER}, loadFields"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: its name.
        node: name of the node, or of its first output.
        message: what is wrong there.
        source: the document that says so.
    """

    rule: str
    node: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message} (rule {self.rule}; {self.source})"


def findings(
    model: onnx.ModelProto, version: Version, *, rows: int, functions: Sequence[onnx.FunctionProto] = ()
) -> list[Finding]:
    """All rules that a graph breaks on a TensorRT version.

    Args:
        model: a lowered graph, weights may be external.
        version: (major, minor) of TensorRT.
        rows: most rows, text and visual, of one step.
        functions: of plugin nodes, for the shape inference.
    """
    graph = Graph(model, functions=functions, rows=rows)
    return [
        Finding(rule=check.__name__, node=node, message=message, source=source)
        for check, source in RULES
        for node, message in check(graph, version)
    ]


def require(name: str, found: Sequence[Finding], version: Version) -> None:
    """Raise UserError if a graph called `name` breaks a rule."""
    if found:
        more = f"; {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f"TensorRT {checks.text(version)} would not parse the {name}: {found[0]}{more}",
            hint="choose a target with a later TensorRT, or report it if the target's own dialect was used",
        )
