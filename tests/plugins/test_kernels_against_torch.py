"""The C++ CPU kernels against the torch reference of the same ops, random and adversarial."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroute.export import ops

from .cpu_library import CpuLibrary, KernelError, Options

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOT_A_NUMBER, SLOT_OUT_OF_RANGE, SLOT_REPEATED, NOT_ASCENDING = 5, 6, 7, 8


def split_slots(rows: int, candidates: int, always: int, batch: int, *, shuffled: bool) -> tuple[Tensor, Tensor]:
    """Distinct slots for candidates and always, of every batch row its own."""
    orders = torch.stack([torch.randperm(rows) for _ in range(batch)])
    parts = [orders[:, :candidates], orders[:, candidates : candidates + always]]
    parts = [part if shuffled else part.sort(dim=1).values for part in parts]
    return parts[0].contiguous(), parts[1].contiguous()


def check_select(
    cpu: CpuLibrary, q: Tensor, keys: Tensor, candidates: Tensor, always: Tensor, options: Options
) -> None:
    """Scores agree; torch's scores give torch's slots; our scores give the same slots, but for near ties."""
    heads = (options.heads, options.kv_heads, options.scale)
    theirs = ops.last_row_scores(q, keys, *heads).gather(1, candidates)
    ours = cpu.scores(q, keys, candidates, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)

    expected = ops.select(q, keys, candidates, always, options.keep, *heads)
    assert torch.equal(cpu.choose(theirs, candidates, always, keys.shape[1], options.keep), expected)

    chosen = cpu.select(q, keys, candidates, always, options)
    for row in range(len(chosen)):
        different = set(chosen[row].tolist()) ^ set(expected[row].tolist())
        places = [candidates[row].tolist().index(slot) for slot in different]
        spread = theirs[row, places]
        assert not places or float(spread.max() - spread.min()) <= 1e-5 * float(spread.max())
        assert chosen[row].tolist() == sorted(chosen[row].tolist())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_random(cpu: CpuLibrary, data: st.DataObject):
    batch = data.draw(st.integers(1, 3), label="batch")
    rows = data.draw(st.integers(1, 80), label="rows")
    visual = data.draw(st.integers(0, rows), label="candidates")
    text = data.draw(st.integers(0, rows - visual), label="always")
    kv_heads, share = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4), (4, 2)]), label="heads")
    size = data.draw(st.sampled_from([1, 2, 7, 16]), label="head size")
    keep = data.draw(st.integers(0, visual + 2), label="keep")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    q = torch.randn(batch, kv_heads * share * size).to(dtype)
    keys = torch.randn(batch, rows, kv_heads * size).to(dtype)
    slots = split_slots(rows, visual, text, batch, shuffled=data.draw(st.booleans(), label="shuffled"))
    check_select(cpu, q, keys, *slots, Options(keep, kv_heads * share, kv_heads, size**-0.5))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_choice_with_ties(cpu: CpuLibrary, data: st.DataObject):
    """Few distinct scores, among them both zeros and denormals: exactly torch's stable order."""
    levels = [0.0, -0.0, 1e-45, -1e-45, 0.25, 0.5, 1.0, 3e38, float("inf"), float("-inf")]
    scores = data.draw(st.lists(st.sampled_from(levels), min_size=1, max_size=120), label="scores")
    keep = data.draw(st.integers(0, len(scores) + 1), label="keep")
    torch.manual_seed(len(scores))
    rows = len(scores) + 4
    candidates, always = split_slots(rows, len(scores), 3, 1, shuffled=data.draw(st.booleans(), label="shuffled"))
    values = torch.tensor([scores])
    best = values.argsort(dim=1, descending=True, stable=True)[:, :keep]
    expected = torch.cat([always, candidates.gather(1, best)], dim=1).sort(dim=1).values
    assert torch.equal(cpu.choose(values, candidates, always, rows, keep), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_keys_go_to_the_first_candidates(cpu: CpuLibrary, dtype: torch.dtype):
    q = torch.randn(2, 32).to(dtype)
    keys = torch.randn(2, 1, 16).to(dtype).expand(2, 50, 16).contiguous()
    candidates, always = split_slots(50, 40, 10, 2, shuffled=True)
    chosen = cpu.select(q, keys, candidates, always, Options(7, 4, 2, 0.3))
    expected = torch.cat([candidates[:, :7], always], dim=1).sort(dim=1).values
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_4096_candidates(cpu: CpuLibrary, dtype: torch.dtype):
    torch.manual_seed(1)
    q, keys = torch.randn(1, 64).to(dtype), torch.randn(1, 4160, 32).to(dtype)
    slots = split_slots(4160, 4096, 64, 1, shuffled=False)
    check_select(cpu, q, keys, *slots, Options(456, 4, 2, 0.25))


@pytest.mark.parametrize(("visual", "keep"), [(0, 5), (12, 12), (12, 500), (1, 0)])
def test_select_edges(cpu: CpuLibrary, visual: int, keep: int):
    """N = 0, K = N and K > N run everything without a look at the scores, NaN or not; K = 0 runs the text alone."""
    q, keys = torch.full((1, 8), float("nan")), torch.full((1, 20, 8), float("nan"))
    candidates, always = split_slots(20, visual, 20 - visual, 1, shuffled=False)
    if keep < visual:
        q, keys = torch.zeros_like(q), torch.zeros_like(keys)
    expected = always if keep < visual else torch.arange(20)[None]
    assert torch.equal(cpu.select(q, keys, candidates, always, Options(keep, 2, 2, 1.0)), expected)


def test_one_token(cpu: CpuLibrary):
    one = torch.ones(1, 1, 8)
    none = torch.empty(1, 0, dtype=torch.int64)
    assert cpu.select(one[0], one, none, torch.zeros(1, 1, dtype=torch.int64), Options(4, 1, 1, 1.0)).tolist() == [[0]]


def test_huge_logits(cpu: CpuLibrary):
    """A softmax that is one-hot: everything else underflows to an exact tie at zero."""
    q = torch.full((1, 4), 1024.0)
    keys = torch.zeros(1, 30, 4)
    keys[0, 17] = 1024.0
    candidates, always = torch.arange(25)[None], torch.arange(25, 30)[None]
    chosen = cpu.select(q, keys, candidates, always, Options(3, 1, 1, 1.0))
    assert chosen.tolist() == [[0, 1, 17, 25, 26, 27, 28, 29]]
    assert torch.equal(chosen, ops.select(q, keys, candidates, always, 3, 1, 1, 1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(cpu: CpuLibrary, value: float):
    """Torch ranks NaN first, silently; here there is no best K without a number."""
    q, keys = torch.ones(1, 8), torch.ones(1, 20, 8)
    keys[0, 3, 2] = value
    candidates, always = torch.arange(15)[None], torch.arange(15, 20)[None]
    with pytest.raises(KernelError, match="NaN") as refused:
        cpu.select(q, keys, candidates, always, Options(4, 1, 1, 1.0))
    assert refused.value.code == NOT_A_NUMBER


@pytest.mark.parametrize(("slot", "code"), [(20, SLOT_OUT_OF_RANGE), (-1, SLOT_OUT_OF_RANGE), (16, SLOT_REPEATED)])
def test_wrong_slots_are_refused(cpu: CpuLibrary, slot: int, code: int):
    candidates, always = torch.arange(15)[None].clone(), torch.arange(15, 20)[None]
    candidates[0, 3] = slot
    with pytest.raises(KernelError) as refused:
        cpu.select(torch.ones(1, 8), torch.ones(1, 20, 8), candidates, always, Options(4, 1, 1, 1.0))
    assert refused.value.code == code


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_gather_and_scatter_random(cpu: CpuLibrary, data: st.DataObject):
    batch = data.draw(st.integers(1, 3), label="batch")
    rows = data.draw(st.integers(1, 40), label="rows")
    picked = data.draw(st.integers(0, rows), label="picked")
    width = data.draw(st.integers(1, 33), label="width")
    dtype = data.draw(st.sampled_from([*DTYPES, torch.int64]), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    full = (torch.randn(batch, rows, width) * 100).to(dtype)
    slots, _ = split_slots(rows, picked, 0, batch, shuffled=False)
    assert torch.equal(cpu.gather(full, slots), ops.gather(full, slots))
    new = (torch.randn(batch, picked, width) * 100).to(dtype)
    assert torch.equal(cpu.scatter(full, slots, new), ops.scatter(full, slots, new))


def test_rows_keep_their_bits(cpu: CpuLibrary):
    """NaN payloads and both zeros are bytes like any other."""
    bits = torch.tensor([[[0x7FC00001, -0x7FFFFFFF - 1], [0x7F800001, 0], [-1, 1]]], dtype=torch.int32)
    full = bits.view(torch.float32)
    slots = torch.tensor([[0, 2]])
    rows = cpu.gather(full, slots)
    assert torch.equal(rows.view(torch.int32), bits[:, [0, 2]])
    assert torch.equal(cpu.scatter(full, slots, rows).view(torch.int32), bits)


def test_gather_takes_any_order_and_scatter_only_ascending(cpu: CpuLibrary):
    full = torch.randn(1, 5, 3)
    slots = torch.tensor([[4, 1, 1]])
    assert torch.equal(cpu.gather(full, slots), ops.gather(full, slots))
    with pytest.raises(KernelError) as refused:
        cpu.scatter(full, slots, torch.randn(1, 3, 3))
    assert refused.value.code == NOT_ASCENDING
    for call in (lambda s: cpu.gather(full, s), lambda s: cpu.scatter(full, s, torch.randn(1, 1, 3))):
        with pytest.raises(KernelError) as refused:
            call(torch.tensor([[5]]))
        assert refused.value.code == SLOT_OUT_OF_RANGE
