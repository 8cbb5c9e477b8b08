"""ONNX Runtime: fused attention whose present cache is the past cache's own buffer, and the older rotary op,
which takes rows in packed layout. RMSNormalization is a kernel of its own there, so the standard body stays.

GroupQueryAttention writes the new rows at `seqlens_k + 1 - A` and attends lower-right causally, which is exactly the
contract of RerouteAttention. Its present output shares the past's memory when both are bound to one buffer.
"""

_HEADER = '<opset_import: ["": 24, "com.microsoft": 1], domain: "reroute">'

ROTARY = f"""{_HEADER}
RerouteRotary <num_heads>(x, cos, sin, slots) => (y)
{{
    y = com.microsoft.RotaryEmbedding <num_heads: int = @num_heads> (x, slots, cos, sin)
}}"""

ATTENTION = f"""{_HEADER}
RerouteAttention <num_heads, num_kv_heads, scale>(q, k, v, past_key, past_value, kv_len)
    => (out, present_key, present_value)
{{
    one = Constant <value = int32[1] {{1}}> ()
    last = Sub (kv_len, one)
    batch = Shape <start = 0, end = 1> (q)
    seqlens = Expand (last, batch)
    total = Squeeze (kv_len)
    out, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @num_kv_heads, scale: float = @scale>
        (q, k, v, past_key, past_value, seqlens, total)
}}"""

BODIES = {"RerouteRotary": ROTARY, "RerouteAttention": ATTENTION}
