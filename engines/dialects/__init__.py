"""A dialect is a table of bodies for the ops of the neutral graph, in terms of what one backend is good at.

The neutral graph calls `reroute` ops by name. Lowering gives every op the dialect's body, or the neutral one where the
dialect has none, and inlines them: the result holds only operators that the backend knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from reroute.engines.dialects import ort, trt, trt_jp6

DOMAIN = "reroute"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Bodies by op name, as ONNX text (see `onnx.parser`), and the operator sets that they use.

    Attributes:
        bodies: op name to function text; ops that are absent keep their standard body.
        opsets: domains besides the default one, with versions.
        opset: version of the default domain to stamp the lowered graph with; None keeps the neutral graph's. The
            checker then holds every node to that version.
        full_attention: standard Attention nodes without mask and cache (a vision tower's) are calls of
            `RerouteFullAttention`, whose body the dialect has.
        attention: what RerouteAttention becomes: "body", like other ops, "grouped", ONNX Runtime's GroupQueryAttention,
            or "kernels", a node of plugins_cpp/onnxruntime; see `reroute.engines.attention`.
        guarded_decisions: a decision's body runs only in steps with visual rows; needs the operator If.
    """

    bodies: dict[str, str] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    opset: int | None = None
    full_attention: bool = False
    attention: Literal["body", "grouped", "kernels"] = "body"
    guarded_decisions: bool = False


# ONNX Runtime 1.23, the last for Python 3.10 (JetPack 6), knows opset 23; only TensorScatter needs 24.
_ORT = Dialect(bodies=ort.BODIES, opsets={"com.microsoft": 1}, opset=23, attention="grouped", guarded_decisions=True)

DIALECTS: dict[str, Dialect] = {
    "standard": Dialect(),
    "ort": _ORT,
    "ort-kernels": replace(_ORT, bodies=ort.KERNEL_BODIES, opsets=_ORT.opsets | {ort.KERNELS: 1}, attention="kernels"),
    "trt": Dialect(bodies=trt.BODIES, full_attention=True),
    # TensorRT 10.0 to 10.3 document opsets 9 to 20.
    "trt-jp6": Dialect(bodies=trt_jp6.BODIES, opset=20, full_attention=True),
}

# What the C++ plugin implements. In plugin form these stay nodes, without a function: a parser that finds both may take
# the function and ignore the plugin in silence (TensorRT 10.0 to 10.6, and again from 10.15).
PLUGIN_OPS = ("RerouteGather", "RerouteScatter", "RerouteSelect")
