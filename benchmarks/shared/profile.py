"""Where a run of a bundle's decoder spends its time, from ONNX Runtime's own profiler.

The profiler writes an event for each node that ran, with the node's name. Names that begin with `RerouteSelect.` and so
on come from the ops' bodies (see `reroute.engines.lower`); a projection is told by its weight's name,
`layers.3.gate_proj...`, which quantised forms keep at the beginning. ONNX Runtime's fusions append to a name, or put a
node of a new name in its place: such a node is told by its op alone.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroute.runtime.backend import BackendOptions
from reroute.runtime.bundle import Bundle
from reroute.runtime.ort import OrtBackend

if TYPE_CHECKING:
    import onnx

ROUTING = ("select", "gather", "scatter")
FIXED = ("output matrix", "embedding", "shapes")  # what does not belong to a layer
BEHIND = ("MLP", "output projection", "rest of layers", "elementwise")  # what stands behind attention in a layer
# Group -> what is in it, for the table.
GROUPS = {
    "MLP": "gate, up and down projections",
    "attention projections": "q, k and v projections, but the next line; with kernels the norm before them",
    "output projection": "attention's",
    "scoring projection": "keys of all rows at a decision layer: the layer needs a part of them anyway",
    "rest of layers": "with kernels one node: attention's output projection, norm, MLP, residual sums",
    "attention": "attention over the cache",
    "norms": "root mean square norms",
    "rotary": "rotary embedding",
    "elementwise": "activation, products, residual sums",
    "quantisation": "of activations, where it is a node of its own",
    "other projections": "fused projections whose layer is not told by their name",
    "select": "scores of the last row, top K, order",
    "gather": "rows that run, of the rows, their norm and their keys",
    "scatter": "rows that ran, back among those that waited",
    "output matrix": "logits of the last row",
    "embedding": "text embedded, text and visual rows put in order",
    "shapes": "shapes, ranges and other small integers",
    "between nodes": "of the whole run, what no node took",
}
_OPS = {
    "RerouteSelect": "select",
    "RerouteSelectPools": "select",
    "RerouteGather": "gather",
    "RerouteScatter": "scatter",
    "RerouteRMSNorm": "norms",
    "RerouteRotary": "rotary",
    "RerouteAttention": "attention",
}
_BY_OP_TYPE = {
    "MatMulNBits": "other projections",
    "MatMulIntegerToFloat": "other projections",
    "MatMulInteger": "other projections",
    "DynamicQuantizeMatMul": "other projections",
    "MatMul": "other projections",
    "Gemm": "other projections",
    "FusedMatMul": "other projections",
    "DynamicQuantizeLinear": "quantisation",
    "GroupQueryAttention": "attention",
    "Attention": "attention",
    "RotaryEmbedding": "rotary",
    "RMSNormalization": "norms",
    "SimplifiedLayerNormalization": "norms",
    "SkipSimplifiedLayerNormalization": "norms",
    **dict.fromkeys(("Add", "Mul", "Sigmoid", "QuickGelu", "Silu", "Swish", "Cast"), "elementwise"),
}
_MLP = ("gate", "up", "down")
Node = tuple[str, str, Sequence[str]]  # name, op type, inputs


def groups_of(nodes: Iterable[Node], scoring_layers: Sequence[int]) -> dict[str, str]:
    """The group of each named node of a lowered decoder graph, in the graph's order."""
    found: dict[str, str] = {}
    merge: str | None = None
    for name, op_type, inputs in nodes:
        body = re.match(r"(Reroute\w+)\.\w+?__(\d+)$", name)
        if body and body[1] == "RerouteGather" and merge is None:
            merge = body[2]  # the first gather puts text and visual rows in order, in a dense graph too
        if body and body[1] == "RerouteGather" and body[2] == merge:
            found[name] = "embedding"
        elif body and body[1] in _OPS:
            found[name] = _OPS[body[1]]
        elif op_type == "RestOfLayer":
            found[name] = "rest of layers"
        elif by_weight := _group_by_weight(inputs, scoring_layers):
            found[name] = by_weight
        else:
            found[name] = "quantisation" if name.startswith("Quantized.") else _BY_OP_TYPE.get(op_type, "shapes")
    return found


def _group_by_weight(inputs: Sequence[str], scoring_layers: Sequence[int]) -> str | None:
    for word in inputs:
        if match := re.match(r"layers\.(\d+)\.(\w+?)_proj\b", word):
            layer, kind = int(match[1]), match[2]
            if kind in _MLP:
                return "MLP"
            if kind == "o":
                return "output projection"
            return "scoring projection" if kind == "k" and layer in scoring_layers else "attention projections"
        if re.match(r"lm_head\b", word):
            return "output matrix"
        if re.match(r"embed\b|embedding\b|visual_embeds\b", word):
            return "embedding"
    return None


def group_of_event(name: str, op_type: str, groups: Mapping[str, str]) -> str:
    """The group of what ran: by its name, without what fusions appended; else by its op."""
    base = name.split("/")[0]
    while base not in groups and (cut := re.match(r"(.+)_[A-Za-z]\w*?$", base)):
        base = cut[1]
    return groups[base] if base in groups else _BY_OP_TYPE.get(op_type, "shapes")


def split_runs(events: Iterable[Mapping[str, Any]], group: Callable[[str, str], str]) -> list[dict[str, float]]:
    """For each run of a session milliseconds by group, and in `total` those of the whole run.

    An event is a node's when its category is Node and its name ends in `_kernel_time`; a run's is `model_run`. Times
    (`ts`, `dur`) are in microseconds.
    """
    events = sorted(events, key=lambda event: event["ts"])
    runs = [event for event in events if event["name"] == "model_run"]
    nodes = [
        event
        for event in events
        # What ran in a branch has events of its own.
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["args"].get("op_name") != "If"
    ]
    found = []
    for run in runs:
        times: defaultdict[str, float] = defaultdict(float)
        for node in nodes:
            if run["ts"] <= node["ts"] < run["ts"] + run["dur"]:
                name = node["name"].removesuffix("_kernel_time")
                times[group(name, node["args"].get("op_name", ""))] += node["dur"] / 1e3
        total = run["dur"] / 1e3
        found.append({**times, "between nodes": total - sum(times.values()), "total": total})
    return found


class ProfiledBackend(OrtBackend):
    """The backend with ONNX Runtime's profiler on; slower by what the events cost."""

    def __init__(self, bundle: Bundle, options: BackendOptions, folder: Path) -> None:
        self._folder = folder
        super().__init__(bundle, options)

    def _load(self, path: Path, kernels: Path | None = None) -> Any:
        own = self._ort
        self._ort = _Profiling(own, self._folder / path.stem)
        try:
            return super()._load(path, kernels)
        finally:
            self._ort = own

    def events(self) -> list[dict[str, Any]]:
        """End the profile and read it."""
        return json.loads(Path(self._decoder.end_profiling()).read_text(encoding="utf-8"))


class _Profiling:
    """The module onnxruntime, but its session options have the profiler on."""

    def __init__(self, module: Any, prefix: Path) -> None:
        self._module, self._prefix = module, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def SessionOptions(self) -> Any:  # noqa: N802 - the module's name for it
        options = self._module.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(self._prefix)
        return options


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and, behind the node that has them, of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def profile(path: Path, run: Callable[[OrtBackend], None], options: BackendOptions) -> list[dict[str, float]]:
    """`split_runs` of a bundle's decoder while `run` uses it."""
    import onnx

    bundle = Bundle.open(path, verify=False)
    graph = onnx.load(str(bundle.part("decoder")), load_external_data=False).graph
    schedule = bundle.manifest.schedule
    nodes = ((node.name, node.op_type, node.input) for node in nodes_of(graph))
    groups = groups_of(nodes, schedule.scoring_layers)
    with tempfile.TemporaryDirectory() as folder:
        backend = ProfiledBackend(bundle, options, Path(folder))
        run(backend)
        return split_runs(backend.events(), lambda name, op: group_of_event(name, op, groups))
