"""ONNX Runtime: the older rotary op, which takes rows in packed layout, and the older name of RMSNormalization.
Attention is not a body but a rewrite, see `reroute.engines.attention`.

ONNX Runtime had SimplifiedLayerNormalization, of the default domain, before ONNX had RMSNormalization. Its kernel is
the same, and it leaves the graph free to be of an opset before 23 (see `reroute.engines.quantize`).
"""

from __future__ import annotations

from onnx.defs import OpSchema, SchemaError, get_schema, register_schema

KERNELS = "reroute.cpu"  # the domain of plugins_cpp/onnxruntime

_HEADER = '<opset_import: ["": 24, "com.microsoft": 1], domain: "reroute">'

RMS_NORM = f"""{_HEADER}
RerouteRMSNorm <eps>(x, weight) => (y)
{{
    y = SimplifiedLayerNormalization <axis = -1, epsilon: float = @eps, stash_type = 1> (x, weight)
}}"""

ROTARY = f"""{_HEADER}
RerouteRotary <num_heads>(x, cos, sin, slots) => (y)
{{
    y = com.microsoft.RotaryEmbedding <num_heads: int = @num_heads> (x, slots, cos, sin)
}}"""

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_NORM = "SimplifiedLayerNormalization"


def register_schemas() -> None:
    """Make the norm known to onnx's checker, which has no schemas of ONNX Runtime's; safe to call more than once."""
    attribute, parameter = OpSchema.Attribute, OpSchema.FormalParameter
    try:
        get_schema(_NORM, 1, "")
    except SchemaError:
        kinds = OpSchema.AttrType
        register_schema(
            OpSchema(
                _NORM,
                "",
                1,
                "Root mean square norm of the last axis.",
                inputs=[parameter("x", "T"), parameter("weight", "T")],
                outputs=[parameter("y", "T")],
                type_constraints=[("T", _FLOATS, "")],
                attributes=[
                    attribute("axis", kinds.INT, ""),
                    attribute("epsilon", kinds.FLOAT, ""),
                    attribute("stash_type", kinds.INT, ""),
                ],
            )
        )


BODIES = {"RerouteRMSNorm": RMS_NORM, "RerouteRotary": ROTARY}

_KERNELS_HEADER = f'<opset_import: ["{KERNELS}": 1], domain: "reroute">'

SELECT = f"""{_KERNELS_HEADER}
RerouteSelect <keep, num_heads, num_kv_heads, scale>(q_last, keys, candidates, always) => (slots)
{{
    slots = {KERNELS}.RerouteSelect
        <keep: int = @keep, num_heads: int = @num_heads, num_kv_heads: int = @num_kv_heads, scale: float = @scale>
        (q_last, keys, candidates, always)
}}"""

GATHER = f"""{_KERNELS_HEADER}
RerouteGather (x, slots) => (rows)
{{
    rows = {KERNELS}.RerouteGather (x, slots)
}}"""

SCATTER = f"""{_KERNELS_HEADER}
RerouteScatter (full, slots, rows) => (updated)
{{
    updated = {KERNELS}.RerouteScatter (full, slots, rows)
}}"""

# With the kernels of plugins_cpp.
KERNEL_BODIES = BODIES | {"RerouteSelect": SELECT, "RerouteGather": GATHER, "RerouteScatter": SCATTER}
