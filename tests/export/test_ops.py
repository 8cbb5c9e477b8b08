"""The eight ops in their three forms: torch reference, ONNX local function of standard ops, schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from reroute.export import onnx_ops, ops

CASES = ["plain", "grouped", "batch", "all-tied", "keep-all", "no-candidates", "one-row"]


def select_inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, float]:
    """Arguments of `ops.select` for a named case."""
    batch, heads, groups, size, rows = 1, 4, 4, 8, 40
    keep = 7
    if case == "grouped":
        groups = 2
    if case == "batch":
        batch, groups = 3, 1
    text = torch.tensor([0, 1, 36, 37, 38, 39])
    visual = torch.arange(2, 36)
    if case == "no-candidates":
        text, visual = torch.arange(40), torch.arange(0)
    if case == "one-row":
        rows, text, visual = 1, torch.arange(1), torch.arange(0)
    if case == "keep-all":
        keep = 100
    generator = torch.Generator().manual_seed(CASES.index(case))
    q = torch.randn(batch, heads * size, generator=generator)
    k = torch.randn(batch, rows, groups * size, generator=generator)
    if case == "all-tied":
        k = k[:, :1].expand(-1, rows, -1).contiguous()
    return q, k, visual.expand(batch, -1), text.expand(batch, -1), keep, heads, groups, size**-0.5


@pytest.mark.parametrize("case", CASES)
def test_select_is_the_same_in_torch_and_onnx(case: str) -> None:
    *tensors, keep, heads, groups, scale = select_inputs(case)
    expected = ops.select(*tensors, keep, heads, groups, scale)
    attributes: dict[str, Any] = {"keep": keep, "num_heads": heads, "num_kv_heads": groups, "scale": scale}
    (slots,) = run("RerouteSelect", tensors, attributes, [TensorProto.INT64])
    np.testing.assert_array_equal(slots, expected.numpy())
    if case == "all-tied":
        assert expected[0].tolist() == [0, 1, *range(2, 9), 36, 37, 38, 39]


# Candidates left of each of the images' visual rows, budget, and denominator of a share or 0.
POOLS: dict[str, tuple[list[int], list[int], int, int]] = {
    "one-pool": ([34], [34], 3, 10),
    "fixed": ([20, 14], [20, 14], 5, 0),
    "share": ([20, 10, 4], [20, 10, 4], 1, 3),
    "least-one": ([31, 3], [31, 3], 1, 10),
    "more-than-there-are": ([20, 14], [20, 14], 18, 0),
    "some-removed": ([7, 2, 1], [20, 10, 4], 1, 4),
    "an-image-gone": ([7, 3], [7, 3], 2, 0),
    "tied": ([20, 14], [20, 14], 5, 0),
    "none": ([], [], 1, 3),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", POOLS)
def test_select_pools_is_the_same_in_torch_onnx_and_a_loop(case: str, batch: int) -> None:
    left, sizes, keep, whole = POOLS[case]
    count = sum(left)
    text = torch.tensor([0, 1, *range(2 + count, 6 + count)])
    visual = torch.arange(2, 2 + count)
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(batch, 4 * 8, generator=generator)
    k = torch.randn(batch, 6 + count, 2 * 8, generator=generator)
    if case == "tied":
        k = k[:, :1].expand(-1, 6 + count, -1).contiguous()
    ids = torch.arange(len(left))
    pools, rows = ids.repeat_interleave(torch.tensor(left, dtype=torch.int64)), torch.tensor(sizes, dtype=torch.int64)
    tensors = [q, k, visual.expand(batch, -1), text.expand(batch, -1), pools.expand(batch, -1)]
    tensors.append(ids.repeat_interleave(rows).expand(batch, -1))
    expected = ops.select_pools(*tensors, keep, whole, 4, 2, 0.3)  # type: ignore[arg-type]
    scores = ops.last_row_scores(q, k, 4, 2, 0.3)
    for item in range(batch):
        kept: list[int] = []
        for pool, size in enumerate(sizes):
            slots = [int(slot) for slot, own in zip(visual, pools, strict=True) if own == pool]
            budget = max(1, size * keep // whole) if whole else keep
            kept += sorted(slots, key=lambda slot, item=item: (-float(scores[item, slot]), slot))[:budget]
        assert expected[item].tolist() == sorted([*text.tolist(), *kept])
    attributes: dict[str, Any] = {"keep": keep, "whole": whole, "num_heads": 4, "num_kv_heads": 2, "scale": 0.3}
    (slots,) = run("RerouteSelectPools", tensors, attributes, [TensorProto.INT64])
    np.testing.assert_array_equal(slots, expected.numpy())


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("batch", "rows", "total"), [(1, 3, 40), (3, 1, 9), (2, 3, 3), (1, 3, 2), (1, 4, 1)])
def test_votes_are_the_same_in_torch_onnx_and_a_loop(batch: int, rows: int, total: int, largest: int) -> None:
    """Mean over the last rows, each of which sees what is before it; then the largest of all heads, or their mean."""
    heads, groups, size, scale = 6, 2, 8, 0.3
    generator = torch.Generator().manual_seed(total)
    q = torch.randn(batch, rows, heads * size, generator=generator)
    k = torch.randn(batch, total, groups * size, generator=generator)
    expected = np.zeros((batch, total))
    for item in range(batch):
        by_head = np.zeros((heads, total))
        present = [row for row in range(rows) if total - rows + row >= 0]
        for head in range(heads):
            keys = k[item].double().numpy().reshape(total, groups, size)[:, head // (heads // groups)]
            for row in present:
                own = total - rows + row
                query = q[item, row].double().numpy().reshape(heads, size)[head]
                weights = np.exp(keys[: own + 1] @ query * scale)
                by_head[head, : own + 1] += weights / weights.sum() / len(present)
        expected[item] = by_head.max(axis=0) if largest else by_head.mean(axis=0)
    votes = ops.votes(q, k, heads, groups, scale, largest)
    np.testing.assert_allclose(votes[:, :, 0].exp().numpy(), expected, rtol=1e-5, atol=1e-7)
    attributes = {"num_heads": heads, "num_kv_heads": groups, "scale": scale, "largest": largest}
    (made,) = run("RerouteVotes", [q, k], attributes, [TensorProto.FLOAT])
    np.testing.assert_allclose(np.exp(made[:, :, 0]), expected, rtol=1e-5, atol=1e-7)
    # With one head and a query of 1, a decision ranks by the scores themselves.
    scores = ops.last_row_scores(torch.ones(batch, 1), votes, 1, 1, 1.0)
    np.testing.assert_allclose(scores.numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_select_equals_a_loop_over_rows_and_heads() -> None:
    """Grouped heads read the right keys: one head and one row at a time, in float64."""
    q, k, candidates, always, keep, heads, groups, scale = select_inputs("grouped")
    queries = q[0].double().numpy().reshape(heads, -1)
    keys = k[0].double().numpy().reshape(k.shape[1], groups, -1)
    score = np.zeros(k.shape[1])
    for head in range(heads):
        products = np.asarray([queries[head] @ row[head // (heads // groups)] * scale for row in keys])
        score += np.exp(products - products.max()) / np.exp(products - products.max()).sum() / heads
    best = sorted(candidates[0].tolist(), key=lambda slot: -score[slot])[:keep]
    expected = sorted([*always[0].tolist(), *best])
    assert ops.select(q, k, candidates, always, keep, heads, groups, scale)[0].tolist() == expected


@pytest.mark.parametrize("batch", [1, 3])
def test_gather_and_scatter_are_the_same_in_torch_and_onnx(batch: int) -> None:
    full, rows = torch.randn(batch, 9, 6), torch.randn(batch, 4, 6)
    slots = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(batch)])
    (gathered,) = run("RerouteGather", [full, slots], {}, [TensorProto.FLOAT])
    np.testing.assert_array_equal(gathered, ops.gather(full, slots).numpy())
    (scattered,) = run("RerouteScatter", [full, slots, rows], {}, [TensorProto.FLOAT])
    expected = ops.scatter(full, slots, rows)
    np.testing.assert_array_equal(scattered, expected.numpy())
    for item in range(batch):
        assert torch.equal(expected[item, slots[item]], rows[item])
        others = [slot for slot in range(9) if slot not in slots[item].tolist()]
        assert torch.equal(expected[item, others], full[item, others])


def test_norm_and_rotary_are_the_same_in_torch_and_onnx() -> None:
    x, weight = torch.randn(2, 5, 12), torch.randn(12)
    (normed,) = run("RerouteRMSNorm", [x, weight], {"eps": 1e-5}, [TensorProto.FLOAT])
    np.testing.assert_allclose(normed, ops.rms_norm(x, weight, 1e-5).numpy(), atol=1e-6)
    angles = torch.randn(20, 3)
    slots = torch.tensor([[0, 3, 7, 9, 19], [1, 2, 3, 4, 5]])
    (turned,) = run("RerouteRotary", [x, angles.cos(), angles.sin(), slots], {"num_heads": 2}, [TensorProto.FLOAT])
    np.testing.assert_allclose(turned, ops.rotary(x, angles.cos(), angles.sin(), slots, 2).numpy(), atol=1e-6)


@pytest.mark.parametrize(("rows", "length"), [(5, 5), (1, 8), (4, 9), (3, 12)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_the_same_in_torch_and_onnx(rows: int, length: int, groups: int) -> None:
    """An empty cache, one token, a later chunk, a full cache."""
    q, past = torch.randn(1, rows, 4 * 8), [torch.randn(1, groups, 12, 8) for _ in range(2)]
    k, v = torch.randn(1, rows, groups * 8), torch.randn(1, rows, groups * 8)
    kv_len = torch.tensor([length], dtype=torch.int32)
    expected = ops.attention(q, k, v, *past, kv_len, 4, groups, 8**-0.5)
    attributes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": groups, "scale": 8**-0.5}
    measured = run("RerouteAttention", [q, k, v, *past, kv_len], attributes, [TensorProto.FLOAT] * 3)
    for want, have in zip(expected, measured, strict=True):
        np.testing.assert_allclose(have, want.numpy(), atol=1e-5)


def test_torch_ops_pass_torchs_own_checks() -> None:
    """Schema, fake tensors and autograd registration agree with what the ops do."""
    checks = ("test_schema", "test_autograd_registration")
    full, slots = torch.randn(2, 9, 6), torch.tensor([[0, 4], [1, 2]])
    torch.library.opcheck(ops.gather, (full, slots))
    torch.library.opcheck(ops.scatter, (full, slots, torch.randn(2, 2, 6)))
    torch.library.opcheck(ops.rms_norm, (full, torch.randn(6), 1e-5))
    torch.library.opcheck(ops.rotary, (full, torch.randn(9, 3), torch.randn(9, 3), torch.arange(9).expand(2, -1), 1))
    # Its output has a length that depends on values, which the fake-tensor check cannot compare.
    torch.library.opcheck(ops.select, select_inputs("batch"), test_utils=checks)
    *tensors, keep, heads, groups, scale = select_inputs("batch")
    pools = torch.zeros_like(tensors[2])
    arguments = (*tensors, pools, pools, keep, 0, heads, groups, scale)
    torch.library.opcheck(ops.select_pools, arguments, test_utils=checks)


@pytest.mark.parametrize("function", onnx_ops.functions(), ids=lambda function: function.name)
def test_schema_and_function_have_one_signature(function: onnx.FunctionProto) -> None:
    onnx_ops.register_schemas()
    schema = onnx.defs.get_schema(function.name, onnx_ops.DOMAIN_VERSION, onnx_ops.DOMAIN)
    assert [value.name for value in schema.inputs] == list(function.input)
    assert [value.name for value in schema.outputs] == list(function.output)
    assert set(schema.attributes) == set(function.attribute)


def run(name: str, tensors: list[torch.Tensor], attributes: dict[str, Any], outputs: list[int]) -> list[np.ndarray]:
    """Run one op's ONNX function in ONNX Runtime, the body that travels with every export."""
    function = next(function for function in onnx_ops.functions() if function.name == name)
    values = [tensor.contiguous().numpy() for tensor in tensors]
    kinds = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in values]
    node = helper.make_node(name, list(function.input), list(function.output), domain=onnx_ops.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "op",
        [
            helper.make_tensor_value_info(key, kind, [None] * value.ndim)
            for key, kind, value in zip(function.input, kinds, values, strict=True)
        ],
        [helper.make_tensor_value_info(key, kind, None) for key, kind in zip(function.output, outputs, strict=True)],
    )
    opsets = [helper.make_opsetid("", onnx_ops.OPSET), helper.make_opsetid(onnx_ops.DOMAIN, onnx_ops.DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(value) for value in session.run(None, dict(zip(function.input, values, strict=True)))]
