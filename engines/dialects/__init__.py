"""A dialect is a table of bodies for the ops of the neutral graph, in terms of what one backend is good at.

The neutral graph calls `reroute` ops by name. Lowering gives every op the dialect's body, or the neutral one where the
dialect has none, and inlines them: the result holds only operators that the backend knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reroute.engines.dialects import ort

DOMAIN = "reroute"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Bodies by op name, as ONNX text (see `onnx.parser`), and the operator sets that they use.

    Attributes:
        bodies: op name to function text; ops that are absent keep their standard body.
        opsets: domains besides the default one, with versions.
        opset: version of the default domain to stamp the lowered graph with; None keeps the neutral graph's. The
            checker then holds every node to that version.
    """

    bodies: dict[str, str] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    opset: int | None = None


DIALECTS: dict[str, Dialect] = {
    "standard": Dialect(),
    # ONNX Runtime 1.23, the last for Python 3.10 (JetPack 6), knows opset 23; only TensorScatter needs 24.
    "ort": Dialect(bodies=ort.BODIES, opsets={"com.microsoft": 1}, opset=23),
}
