"""The ops of `reroute.export.ops` in ONNX: schemas, local functions of standard ops, and the torch translation.

A neutral graph calls the ops by name in the domain `reroute` and carries a body of standard ops (opset 24) for each, so
the exported file runs anywhere that knows opset 24, and a backend's dialect is no more than other bodies for the same
names (see `reroute.engines.dialects`). Shapes and dtypes are those of the table in `reroute.export.ops`.

The op names are unique on purpose: TensorRT's parser dispatches on the op type alone, so a custom op called `Attention`
would be taken by its built-in importer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema, SchemaError, get_schema, register_schema
from onnxscript.values import Opset

DOMAIN = "reroute"
OPSET = 24
DOMAIN_VERSION = 1

_HEADER = f'<opset_import: ["": {OPSET}], domain: "{DOMAIN}">'

# Sizes that queries are grouped by key/value head with.
_HEADS = """\
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_value = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_value, rest)
    groups_value = Constant <value_int: int = @num_kv_heads> ()
    groups = Reshape (groups_value, rest)
    share = Div (heads, groups)
"""

# Scores of the last row: queries grouped by key/value head, fp32 softmax over all rows, mean over heads. TopK breaks
# ties toward the lower index, and the candidates ascend, so the lower slot wins.
_SCORES = f"""\
{_HEADS}    q_shape = Concat <axis = 0> (zero, groups, share, rest)
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
    scores = GatherElements <axis = 1> (by_row, candidates)
"""

SELECT = f"""{_HEADER}
RerouteSelect <keep, num_heads, num_kv_heads, scale>(q_last, keys, candidates, always) => (slots)
{{
{_SCORES}    budget_value = Constant <value_int: int = @keep> ()
    budget = Reshape (budget_value, rest)
    available = Shape <start = 1, end = 2> (candidates)
    count = Min (budget, available)
    best_scores, best = TopK <axis = 1, largest = 1, sorted = 1> (scores, count)
    winners = GatherElements <axis = 1> (candidates, best)
    unordered = Concat <axis = 1> (always, winners)
    total = Shape <start = 1, end = 2> (unordered)
    slots, places = TopK <axis = 1, largest = 0, sorted = 1> (unordered, total)
}}"""

# Candidates in the order of their scores, then, the order kept, by pool (TopK is stable): the place of a candidate in
# its pool is its index less the candidates of the pools before. Those within the budget of their pool stay; sorted by
# slot they come first, the others being given a number beyond every slot.
SELECT_POOLS = f"""{_HEADER}
RerouteSelectPools <keep, whole, num_heads, num_kv_heads, scale>(q_last, keys, candidates, always, pools, all_pools)
    => (slots)
{{
{_SCORES}    one = Constant <value_ints = [1]> ()
    available = Shape <start = 1, end = 2> (candidates)
    best_scores, order = TopK <axis = 1, largest = 1, sorted = 1> (scores, available)
    pools_by_score = GatherElements <axis = 1> (pools, order)
    by_pool, again = TopK <axis = 1, largest = 0, sorted = 1> (pools_by_score, available)
    row_shape = Shape (all_pools)
    none = ConstantOfShape <value = int64[1] {{0}}> (row_shape)
    candidate_shape = Shape (pools)
    ones = ConstantOfShape <value = int64[1] {{1}}> (candidate_shape)
    all_ones = ConstantOfShape <value = int64[1] {{1}}> (row_shape)
    left = ScatterElements <axis = 1, reduction = "add"> (none, pools, ones)
    sizes = ScatterElements <axis = 1, reduction = "add"> (none, all_pools, all_ones)
    axis = Constant <value_int = 1> ()
    starts = CumSum <exclusive = 1> (left, axis)
    first = GatherElements <axis = 1> (starts, by_pool)
    size = GatherElements <axis = 1> (sizes, by_pool)
    origin = Constant <value_int = 0> ()
    count = Squeeze (available)
    places = Range (origin, count, axis)
    rank = Sub (places, first)
    keep_value = Constant <value_int: int = @keep> ()
    whole_value = Constant <value_int: int = @whole> ()
    divisor = Max (whole_value, axis)
    product = Mul (size, keep_value)
    quotient = Div (product, divisor)
    portion = Max (quotient, axis)
    follows = Greater (whole_value, origin)
    budget = Where (follows, portion, keep_value)
    stays = Less (rank, budget)
    picked = GatherElements <axis = 1> (order, again)
    slot = GatherElements <axis = 1> (candidates, picked)
    beyond = Constant <value_int = 9223372036854775807> ()
    marked = Where (stays, slot, beyond)
    stays_number = Cast <to = 7> (stays)
    totals = ReduceSum <keepdims = 0> (stays_number, one)
    start = Constant <value_ints = [0]> ()
    total_first = Slice (totals, start, one)
    winners, winner_places = TopK <axis = 1, largest = 0, sorted = 1> (marked, total_first)
    unordered = Concat <axis = 1> (always, winners)
    total = Shape <start = 1, end = 2> (unordered)
    slots, slot_places = TopK <axis = 1, largest = 0, sorted = 1> (unordered, total)
}}"""

# Queries [B, G, heads of a group, R, d] against keys [B, G, 1, d, S]. Rows in front of the first count nothing.
VOTES = f"""{_HEADER}
RerouteVotes <num_heads, num_kv_heads, scale, largest>(q, keys) => (votes)
{{
{_HEADS}    q_shape = Concat <axis = 0> (zero, zero, groups, share, rest)
    q_heads = Reshape (q, q_shape)
    q_low = Transpose <perm = [0, 2, 3, 1, 4]> (q_heads)
    q_wide = Cast <to = 1> (q_low)
    k_shape = Concat <axis = 0> (zero, zero, groups, rest)
    k_heads = Reshape (keys, k_shape)
    k_low = Transpose <perm = [0, 2, 3, 1]> (k_heads)
    k_cast = Cast <to = 1> (k_low)
    group_axis = Constant <value_ints = [2]> ()
    k_wide = Unsqueeze (k_cast, group_axis)
    products = MatMul (q_wide, k_wide)
    factor = Constant <value_float: float = @scale> ()
    logits = Mul (products, factor)
    rows = Shape <start = 1, end = 2> (q)
    total = Shape <start = 1, end = 2> (keys)
    before = Sub (total, rows)
    origin = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rows_scalar = Squeeze (rows)
    steps = Range (origin, rows_scalar, one)
    own = Add (steps, before)
    own_inside = Max (own, zero)
    own_column = Unsqueeze (own_inside, rest)
    total_scalar = Squeeze (total)
    columns = Range (origin, total_scalar, one)
    seen = LessOrEqual (columns, own_column)
    never = Constant <value = float {{-inf}}> ()
    masked = Where (seen, logits, never)
    probabilities = Softmax <axis = -1> (masked)
    counts = GreaterOrEqual (own, zero)
    weight = Cast <to = 1> (counts)
    weight_column = Unsqueeze (weight, rest)
    weighted = Mul (probabilities, weight_column)
    row_axis = Constant <value_ints = [3]> ()
    summed = ReduceSum <keepdims = 0> (weighted, row_axis)
    number = ReduceSum <keepdims = 0> (weight)
    by_head = Div (summed, number)
    head_axes = Constant <value_ints = [1, 2]> ()
    largest_of = ReduceMax <keepdims = 0> (by_head, head_axes)
    mean_of = ReduceMean <keepdims = 0> (by_head, head_axes)
    largest_value = Constant <value_int: int = @largest> ()
    use_largest = Greater (largest_value, origin)
    scores = Where (use_largest, largest_of, mean_of)
    least = Constant <value_float = 1e-37> ()
    positive = Max (scores, least)
    logarithm = Log (positive)
    column = Unsqueeze (logarithm, rest)
    votes = CastLike (column, keys)
}}"""

GATHER = f"""{_HEADER}
RerouteGather (x, slots) => (rows)
{{
    last = Constant <value_ints = [-1]> ()
    index = Unsqueeze (slots, last)
    rows = GatherND <batch_dims = 1> (x, index)
}}"""

# ScatterND has no batch dimension: rows of all batch items are scattered into one flat table.
SCATTER = f"""{_HEADER}
RerouteScatter (full, slots, rows) => (updated)
{{
    shape = Shape (full)
    width = Shape <start = 2, end = 3> (full)
    rest = Constant <value_ints = [-1]> ()
    flat_shape = Concat <axis = 0> (rest, width)
    flat = Reshape (full, flat_shape)
    new = Reshape (rows, flat_shape)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    batch_axis = Constant <value_ints = [0]> ()
    batch_length = Shape <start = 0, end = 1> (full)
    batch = Squeeze (batch_length, batch_axis)
    items = Range (zero, batch, one)
    length = Shape <start = 1, end = 2> (full)
    starts = Mul (items, length)
    column = Constant <value_ints = [1]> ()
    offsets = Unsqueeze (starts, column)
    flat_slots = Add (slots, offsets)
    pair = Constant <value_ints = [-1, 1]> ()
    index = Reshape (flat_slots, pair)
    scattered = ScatterND (flat, index, new)
    updated = Reshape (scattered, shape)
}}"""

RMS_NORM = f"""{_HEADER}
RerouteRMSNorm <eps>(x, weight) => (y)
{{
    y = RMSNormalization <axis = -1, epsilon: float = @eps> (x, weight)
}}"""

ROTARY = f"""{_HEADER}
RerouteRotary <num_heads>(x, cos, sin, slots) => (y)
{{
    y = RotaryEmbedding <num_heads: int = @num_heads> (x, cos, sin, slots)
}}"""

# The new rows go to cache rows kv_len - A .. kv_len - 1; query row i sees the cache up to its own place. The mask is
# explicit: `is_causal` means upper-left in the operator, which is wrong as soon as the cache is longer than the step.
ATTENTION = f"""{_HEADER}
RerouteAttention <num_heads, num_kv_heads, scale>(q, k, v, past_key, past_value, kv_len)
    => (out, present_key, present_value)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
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
    rows_scalar = Squeeze (rows)
    steps = Range (origin, rows_scalar, step)
    places = Add (steps, start)
    places_column = Unsqueeze (places, rest)
    capacity = Shape <start = 2, end = 3> (past_key)
    capacity_scalar = Squeeze (capacity)
    columns = Range (origin, capacity_scalar, step)
    mask = LessOrEqual (columns, places_column)
    attended = Attention <scale: float = @scale> (q_heads, present_key, present_value, mask)
    by_row = Transpose <perm = [0, 2, 1, 3]> (attended)
    out_shape = Concat <axis = 0> (zero, zero, rest)
    out = Reshape (by_row, out_shape)
}}"""

BODIES = (SELECT, SELECT_POOLS, VOTES, GATHER, SCATTER, RMS_NORM, ROTARY, ATTENTION)


def functions() -> list[onnx.FunctionProto]:
    """The eight ops as local functions of standard ops."""
    return [onnx.parser.parse_function(body) for body in BODIES]


_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_ANY = [*_FLOATS, "tensor(int64)"]


def _schema(name: str, doc: str, inputs: str, outputs: str, attributes: dict[str, Any], types: list[str]) -> OpSchema:
    """Inputs and outputs are named in a string; a name ending in `:i64` or `:i32` is of that type."""

    def parameters(text: str) -> list[OpSchema.FormalParameter]:
        pairs = (word.partition(":")[::2] for word in text.split())
        kinds = {"": "T", "i64": "tensor(int64)", "i32": "tensor(int32)"}
        return [OpSchema.FormalParameter(word, kinds[suffix]) for word, suffix in pairs]

    return OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        doc,
        inputs=parameters(inputs),
        outputs=parameters(outputs),
        type_constraints=[("T", types, "")],
        attributes=[OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
    )


_INT, _FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
_HEADS = {"num_heads": _INT, "num_kv_heads": _INT, "scale": _FLOAT}

SCHEMAS = (
    _schema(
        "RerouteSelect",
        "Rows that run: `always` and the `keep` best of `candidates` by the last row's attention, ascending.",
        "q_last keys candidates:i64 always:i64",
        "slots:i64",
        {"keep": _INT, **_HEADS},
        _FLOATS,
    ),
    _schema(
        "RerouteSelectPools",
        "RerouteSelect within pools: `keep` of each, or where `whole` is not 0 a share keep / whole of its rows.",
        "q_last keys candidates:i64 always:i64 pools:i64 all_pools:i64",
        "slots:i64",
        {"keep": _INT, "whole": _INT, **_HEADS},
        _FLOATS,
    ),
    _schema(
        "RerouteVotes",
        "Logarithm of each row's score by the last R rows: mean over them, largest over heads or mean.",
        "q keys",
        "votes",
        {**_HEADS, "largest": _INT},
        _FLOATS,
    ),
    _schema("RerouteGather", "Rows of x at slots.", "x slots:i64", "rows", {}, _ANY),
    _schema("RerouteScatter", "full with rows written at slots.", "full slots:i64 rows", "updated", {}, _ANY),
    _schema("RerouteRMSNorm", "Root mean square norm of the last axis.", "x weight", "y", {"eps": _FLOAT}, _FLOATS),
    _schema(
        "RerouteRotary", "Rotary embedding with table rows at slots.", "x cos sin slots:i64", "y",
        {"num_heads": _INT}, _FLOATS,
    ),
    _schema(
        "RerouteAttention",
        "Lower-right causal grouped-query attention over a cache of fixed capacity.",
        "q k v past_key past_value kv_len:i32",
        "out present_key present_value",
        _HEADS,
        _FLOATS,
    ),
)  # fmt: skip


def register_schemas() -> None:
    """Make the ops known to onnx's checker and shape inference; safe to call more than once."""
    for schema in SCHEMAS:
        try:
            get_schema(schema.name, DOMAIN_VERSION, DOMAIN)
        except SchemaError:
            register_schema(schema)


# Torch op -> ONNX op: the tensors first, then the attributes in the order of the torch signature.
_ONNX_NAMES = {
    "select": ("RerouteSelect", 4, ("keep", "num_heads", "num_kv_heads", "scale")),
    "select_pools": ("RerouteSelectPools", 6, ("keep", "whole", "num_heads", "num_kv_heads", "scale")),
    "votes": ("RerouteVotes", 2, ("num_heads", "num_kv_heads", "scale", "largest")),
    "gather": ("RerouteGather", 2, ()),
    "scatter": ("RerouteScatter", 3, ()),
    "rms_norm": ("RerouteRMSNorm", 2, ("eps",)),
    "rotary": ("RerouteRotary", 4, ("num_heads",)),
    "attention": ("RerouteAttention", 6, ("num_heads", "num_kv_heads", "scale")),
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`: each custom op becomes one node of our domain."""
    register_schemas()  # onnxscript takes outputs and attributes from them
    opset = Opset(DOMAIN, DOMAIN_VERSION)

    def translate(name: str, tensors: int, attributes: Sequence[str]) -> Callable[..., Any]:
        def emit(*args: Any) -> Any:
            values = dict(zip(attributes, args[tensors:], strict=True))
            return getattr(opset, name)(*args[:tensors], **values)

        return emit

    table = {getattr(torch.ops.reroute, key).default: translate(*entry) for key, entry in _ONNX_NAMES.items()}
    return table | {torch.ops.aten.sort.stable: _stable_sort}


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """The exporter knows the unstable sort only. TopK is stable in ONNX: of equals the lower index comes first."""
    standard = Opset("", OPSET)
    end = {} if dim == -1 else {"end": dim + 1}
    length = standard.Shape(x, start=dim, **end)
    return standard.TopK(x, length, axis=dim, largest=int(descending), sorted=1)
