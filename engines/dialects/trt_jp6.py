"""TensorRT 10.3 (JetPack 6): primitive operators of opset 20 only, for a parser without Attention, RotaryEmbedding,
RMSNormalization and TensorScatter.

Norm statistics and softmax are fp32 whatever the graph's type. Of the cache, each row is either the old one or a new
one, chosen by place: every output element depends on past at the same element only, so present may be written over past
at one address. A scatter would need the whole of past to be copied first.
"""

from reroute.engines.dialects import trt

_HEADER = '<opset_import: ["": 24], domain: "reroute">'

RMS_NORM = f"""{_HEADER}
RerouteRMSNorm <eps>(x, weight) => (y)
{{
    wide = Cast <to = 1> (x)
    square = Mul (wide, wide)
    last = Constant <value_ints = [-1]> ()
    mean = ReduceMean <keepdims = 1> (square, last)
    small = Constant <value_float: float = @eps> ()
    positive = Add (mean, small)
    root = Sqrt (positive)
    unit = Div (wide, root)
    low = CastLike (unit, x)
    y = Mul (low, weight)
}}"""

ROTARY = f"""{_HEADER}
RerouteRotary <num_heads>(x, cos, sin, slots) => (y)
{{
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    heads_value = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_value, rest)
    by_head = Concat <axis = 0> (zero, zero, heads, rest)
    x_heads = Reshape (x, by_head)
    left, right = Split <axis = -1, num_outputs = 2> (x_heads)
    cos_rows = Gather <axis = 0> (cos, slots)
    sin_rows = Gather <axis = 0> (sin, slots)
    c = Unsqueeze (cos_rows, two)
    s = Unsqueeze (sin_rows, two)
    left_c = Mul (left, c)
    right_s = Mul (right, s)
    right_c = Mul (right, c)
    left_s = Mul (left, s)
    new_left = Sub (left_c, right_s)
    new_right = Add (right_c, left_s)
    turned = Concat <axis = -1> (new_left, new_right)
    packed = Concat <axis = 0> (zero, zero, rest)
    y = Reshape (turned, packed)
}}"""

# G key/value heads each serve H / G query heads: scores [B, G, H / G, A, C], so keys are not repeated.
ATTENTION = f"""{_HEADER}
RerouteAttention <num_heads, num_kv_heads, scale>(q, k, v, past_key, past_value, kv_len)
    => (out, present_key, present_value)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    rest = Constant <value_ints = [-1]> ()
    origin = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    heads_value = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_value, rest)
    groups_value = Constant <value_int: int = @num_kv_heads> ()
    groups = Reshape (groups_value, rest)
    share = Div (heads, groups)
    kv_shape = Concat <axis = 0> (zero, zero, groups, rest)
    k_rows = Reshape (k, kv_shape)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_rows = Reshape (v, kv_shape)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    rows = Shape <start = 1, end = 2> (q)
    length = Cast <to = 7> (kv_len)
    start = Sub (length, rows)
    capacity = Shape <start = 2, end = 3> (past_key)
    capacity_scalar = Squeeze (capacity, zero)
    columns = Range (origin, capacity_scalar, step)
    offsets = Sub (columns, start)
    last_row = Sub (rows, one)
    not_below = Max (offsets, zero)
    sources = Min (not_below, last_row)
    from_start = GreaterOrEqual (offsets, zero)
    before_end = Less (offsets, rows)
    is_new = And (from_start, before_end)
    is_new_column = Unsqueeze (is_new, rest)
    k_moved = Gather <axis = 2> (k_heads, sources)
    present_key = Where (is_new_column, k_moved, past_key)
    v_moved = Gather <axis = 2> (v_heads, sources)
    present_value = Where (is_new_column, v_moved, past_value)
    rows_scalar = Squeeze (rows, zero)
    steps = Range (origin, rows_scalar, step)
    places = Add (steps, start)
    places_column = Unsqueeze (places, rest)
    causal = LessOrEqual (columns, places_column)
    q_shape = Concat <axis = 0> (zero, zero, groups, share, rest)
    q_rows = Reshape (q, q_shape)
    q_heads = Transpose <perm = [0, 2, 3, 1, 4]> (q_rows)
    factor_wide = Constant <value_float: float = @scale> ()
    factor = CastLike (factor_wide, q)
    q_scaled = Mul (q_heads, factor)
    k_columns = Transpose <perm = [0, 1, 3, 2]> (present_key)
    k_shared = Unsqueeze (k_columns, two)
    products = MatMul (q_scaled, k_shared)
    wide = Cast <to = 1> (products)
    lowest = Constant <value_float = -3.4028234e38> ()
    logits = Where (causal, wide, lowest)
    weights_wide = Softmax <axis = -1> (logits)
    weights = CastLike (weights_wide, q)
    v_shared = Unsqueeze (present_value, two)
    attended = MatMul (weights, v_shared)
    by_row = Transpose <perm = [0, 3, 1, 2, 4]> (attended)
    out_shape = Concat <axis = 0> (zero, zero, rest)
    out = Reshape (by_row, out_shape)
}}"""

FULL_ATTENTION = f"""{_HEADER}
RerouteFullAttention <scale>(q, k, v) => (out)
{{
    factor_wide = Constant <value_float: float = @scale> ()
    factor = CastLike (factor_wide, q)
    q_scaled = Mul (q, factor)
    k_columns = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (q_scaled, k_columns)
    wide = Cast <to = 1> (products)
    weights_wide = Softmax <axis = -1> (wide)
    weights = CastLike (weights_wide, q)
    out = MatMul (weights, v)
}}"""

BODIES = {
    "RerouteSelect": trt.SELECT,
    "RerouteRMSNorm": RMS_NORM,
    "RerouteRotary": ROTARY,
    "RerouteAttention": ATTENTION,
    "RerouteFullAttention": FULL_ATTENTION,
}
