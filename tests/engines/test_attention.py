"""Attention of a long prompt in parts is the same attention; a step that is not long, or not alone, is not divided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from reroute.engines.attention import LONG, PARTS, expand_attention
from reroute.export.onnx_ops import DOMAIN, DOMAIN_VERSION, register_schemas
from reroute.manifest import Manifest
from reroute.runtime.backend import BackendOptions
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout
from reroute.runtime.ort import OrtBackend
from reroute.runtime.positions import Positions
from tests.runtime.test_no_copies import with_capacity

HEADS, GROUPS, SIZE, CAPACITY = 4, 2, 16, 1200


def session() -> ort.InferenceSession:
    """RerouteAttention over two stages, as ONNX Runtime gets it."""
    register_schemas()

    def value(name: str, shape: list[object], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)  # type: ignore[arg-type]

    past = [f"past.{kind}" for kind in ("key", "value")]
    present = [f"present.{kind}" for kind in ("key", "value")]
    cache = ["B", GROUPS, CAPACITY, SIZE]
    call = helper.make_node(
        "RerouteAttention",
        ["q", "k", "v", *past, "kv_len"],
        ["out", *present],
        domain=DOMAIN,
        num_heads=HEADS,
        num_kv_heads=GROUPS,
        scale=SIZE**-0.5,
    )
    graph = helper.make_graph(
        [call],
        "g",
        [
            value("input_ids", ["B", "T"], TensorProto.INT64),
            value("q", ["B", "S", HEADS * SIZE]),
            value("k", ["B", "S", GROUPS * SIZE]),
            value("v", ["B", "S", GROUPS * SIZE]),
            *(value(name, cache) for name in past),
            value("kv_len", [1], TensorProto.INT32),
        ],
        [value("out", ["B", "S", HEADS * SIZE]), *(value(name, cache) for name in present)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        graph, ir_version=10, opset_imports=[*opsets, helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    )
    expand_attention(model)
    del model.opset_import[2:]
    options = ort.SessionOptions()
    options.enable_profiling = True
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, before: int) -> np.ndarray:
    """Lower-right causal attention in float64: q [B, S, H*d], keys and values [B, before + S, G*d]."""
    batch, rows = q.shape[:2]
    heads = q.reshape(batch, rows, HEADS, SIZE).transpose(0, 2, 1, 3).astype(np.float64)
    k, v = (
        one.reshape(batch, -1, GROUPS, SIZE).transpose(0, 2, 1, 3).repeat(HEADS // GROUPS, axis=1).astype(np.float64)
        for one in (keys, values)
    )
    logits = heads @ k.transpose(0, 1, 3, 2) * SIZE**-0.5
    logits[..., np.arange(k.shape[2])[None] > np.arange(rows)[:, None] + before] = -np.inf
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out = odds / odds.sum(axis=-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, rows, HEADS * SIZE)


@pytest.mark.parametrize(
    ("rows", "before", "batch", "parts"),
    [
        (1, 0, 1, 1),
        (LONG, 0, 1, 1),
        (LONG + 1, 0, 1, PARTS),
        (523, 0, 1, PARTS),
        (600, 77, 1, PARTS),  # a later prompt: what is in the caches stays and is seen
        (LONG + 9, 0, 3, 1),  # a batch is not divided: its later parts would not run
    ],
)
def test_parts_are_the_same_attention(rows: int, before: int, batch: int, parts: int):
    rng = np.random.default_rng(rows)
    q, k, v = (rng.standard_normal((batch, rows, heads * SIZE)).astype(np.float32) for heads in (HEADS, GROUPS, GROUPS))
    old = rng.standard_normal((2, batch, before, GROUPS * SIZE)).astype(np.float32)
    past = np.full((2, batch, GROUPS, CAPACITY, SIZE), np.nan, np.float32)
    past[:, :, :, :before] = old.reshape(2, batch, before, GROUPS, SIZE).transpose(0, 1, 3, 2, 4)
    engine = session()
    inputs = {"input_ids": np.zeros((batch, 1), np.int64), "q": q, "k": k, "v": v}
    inputs |= {"past.key": past[0], "past.value": past[1], "kv_len": np.asarray([before + rows], np.int32)}
    out, *present = (np.asarray(one) for one in engine.run(None, inputs))
    keys, values = (np.concatenate([one, new], axis=1) for one, new in ((old[0], k), (old[1], v)))
    assert np.abs(out - attended(q, keys, values, before)).max() < 1e-5
    for cache, want in zip(present, (keys, values), strict=True):
        found = cache[:, :, : before + rows].transpose(0, 2, 1, 3).reshape(batch, before + rows, GROUPS * SIZE)
        assert np.array_equal(found, want)
    profile = Path(engine.end_profiling())
    ran = profile.read_text(encoding="utf-8").count('"op_name" : "GroupQueryAttention"')
    profile.unlink()
    assert ran == parts


def test_a_long_prompt_of_a_bundle_is_the_same_in_one_step_or_several(tiny_bundle: Path):
    bundle = with_capacity(Bundle.open(tiny_bundle), 2048)
    ids = np.random.default_rng(0).integers(5, 100, 3 * LONG).tolist()

    def run(*steps: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        backend = OrtBackend(bundle, BackendOptions(threads=1))
        positions, logits = Positions(bundle.manifest), np.zeros(0)
        for step in steps:
            logits = backend.step(positions.inputs(Layout.of_text(step), None, backend.lengths)).logits.copy()
        layers = range(Manifest.load(tiny_bundle).model.text.num_layers)
        return logits, [rows.copy() for layer in layers for rows in backend.cache(layer)]

    whole, whole_caches = run(ids)
    parted, parted_caches = run(*(ids[at : at + 200] for at in range(0, len(ids), 200)))
    later, later_caches = run(ids[:LONG], ids[LONG:])  # the second step is long and finds a filled cache
    for logits, caches in ((parted, parted_caches), (later, later_caches)):
        assert np.abs(logits - whole).max() < 1e-4
        assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(caches, whole_caches, strict=True))
