"""TensorRT 10.15 and later: the standard bodies of opset 24, with what its parser and layers ask for beyond the
standard.

The bodies are ordinary ONNX, so the file that TensorRT gets also runs in ONNX Runtime. Limits and their sources are
data in `reroute.engines.rules`; what they mean here:

* Attention wants 4-D inputs, mask included, and no cache inputs. The mask is explicit: `is_causal` is upper-left.
* TensorScatter (KVCacheUpdate) updates in place: past is a network input of static capacity, present an output, both at
  one address.
* TopK wants K >= 1, also in decode, where no candidate is left. So all rows are ranked at once, with the text rows
  above every probability, instead of the candidates alone: the same rows win, and no tensor is empty.
* Squeeze wants its axes.
"""

_HEADER = '<opset_import: ["": 24], domain: "reroute">'

# Scores as in the neutral body (fp32, mean over heads). A probability is at most 1, so a text row's 2 always wins; of
# equal scores the lower row comes first, and rows ascend by slot.
SELECT = f"""{_HEADER}
RerouteSelect <keep, num_heads, num_kv_heads, scale>(q_last, keys, candidates, always) => (slots)
{{
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_value = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_value, rest)
    groups_value = Constant <value_int: int = @num_kv_heads> ()
    groups = Reshape (groups_value, rest)
    share = Div (heads, groups)
    q_shape = Concat <axis = 0> (zero, groups, share, rest)
    q_low = Reshape (q_last, q_shape)
    q = Cast <to = 1> (q_low)
    k_shape = Concat <axis = 0> (zero, zero, groups, rest)
    k_heads = Reshape (keys, k_shape)
    k_low = Transpose <perm = [0, 2, 3, 1]> (k_heads)
    k = Cast <to = 1> (k_low)
    products = MatMul (q, k)
    factor = Constant <value_float: float = @scale> ()
    logits = Mul (products, factor)
    probabilities = Softmax <axis = -1> (logits)
    head_axes = Constant <value_ints = [1, 2]> ()
    by_row = ReduceMean <keepdims = 0> (probabilities, head_axes)
    above = Constant <value_float = 2.0> ()
    text_shape = Shape (always)
    text_scores = Expand (above, text_shape)
    ranked = ScatterElements <axis = 1> (by_row, always, text_scores)
    text = Shape <start = 1, end = 2> (always)
    budget_value = Constant <value_int: int = @keep> ()
    budget = Reshape (budget_value, rest)
    wanted = Add (text, budget)
    rows = Shape <start = 1, end = 2> (keys)
    count = Min (wanted, rows)
    best_scores, best = TopK <axis = 1, largest = 1, sorted = 1> (ranked, count)
    slots, places = TopK <axis = 1, largest = 0, sorted = 1> (best, count)
}}"""

ATTENTION = f"""{_HEADER}
RerouteAttention <num_heads, num_kv_heads, scale>(q, k, v, past_key, past_value, kv_len)
    => (out, present_key, present_value)
{{
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_value = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_value, rest)
    groups_value = Constant <value_int: int = @num_kv_heads> ()
    groups = Reshape (groups_value, rest)
    q_shape = Concat <axis = 0> (zero, zero, heads, rest)
    kv_shape = Concat <axis = 0> (zero, zero, groups, rest)
    q_rows = Reshape (q, q_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    k_rows = Reshape (k, kv_shape)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_rows = Reshape (v, kv_shape)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    rows = Shape <start = 1, end = 2> (q)
    length = Cast <to = 7> (kv_len)
    start = Sub (length, rows)
    batch = Shape <start = 0, end = 1> (q)
    starts = Expand (start, batch)
    present_key = TensorScatter <axis = -2> (past_key, k_heads, starts)
    present_value = TensorScatter <axis = -2> (past_value, v_heads, starts)
    origin = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    rows_scalar = Squeeze (rows, zero)
    steps = Range (origin, rows_scalar, step)
    places = Add (steps, start)
    places_column = Unsqueeze (places, rest)
    capacity = Shape <start = 2, end = 3> (past_key)
    capacity_scalar = Squeeze (capacity, zero)
    columns = Range (origin, capacity_scalar, step)
    causal = LessOrEqual (columns, places_column)
    front = Constant <value_ints = [0, 1]> ()
    mask = Unsqueeze (causal, front)
    attended = Attention <scale: float = @scale> (q_heads, present_key, present_value, mask)
    by_row = Transpose <perm = [0, 2, 1, 3]> (attended)
    out_shape = Concat <axis = 0> (zero, zero, rest)
    out = Reshape (by_row, out_shape)
}}"""

# The vision tower's: every row sees every row. The exporter writes softcap and output mode, which the parser refuses.
FULL_ATTENTION = f"""{_HEADER}
RerouteFullAttention <scale>(q, k, v) => (out)
{{
    out = Attention <scale: float = @scale> (q, k, v)
}}"""

BODIES = {"RerouteSelect": SELECT, "RerouteAttention": ATTENTION, "RerouteFullAttention": FULL_ATTENTION}
