"""The stagewise decoder against the independent per-layer statement, and the invariants of the algorithms.

Numbers in the names are those of the list "What a test can rely on" (docs/architecture.md, Invariants).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroute.export import ops
from reroute.export.reference import RecordingDecoder
from reroute.schedule import Action, Positions, Scoring
from tests.export.independent import attention_probabilities, independent_decode, rope
from tests.export.small import Small, score_margin

MARGIN = 1e-5
DECISIONS = {2: 7, 4: 4}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Small, Action, dict[int, int]]:
    """A random size, seed and schedule; budgets shrink, so that both actions accept them."""
    layers = draw(st.integers(2, 7))
    action: Action = draw(st.sampled_from(["reroute", "removal"]))
    scoring: Scoring = draw(st.sampled_from(["own", "previous"]))
    positions: list[Positions] = ["original", "renumbered"] if action == "removal" else ["original"]
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2)]))
    visual = draw(st.integers(1, 24))
    text = draw(st.integers(2, 8))
    small = Small(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        visual=visual,
        text=text,
        start=draw(st.integers(0, text - 1)),
        seed=draw(st.integers(0, 2**16)),
        scoring=scoring,
        positions=draw(st.sampled_from(positions)),
    )
    first = 1 if scoring == "previous" else 0
    where = sorted(draw(st.sets(st.integers(first, layers - 1), min_size=1, max_size=3)))
    budgets = sorted((draw(st.integers(1, visual)) for _ in where), reverse=True)
    return small, action, dict(zip(where, budgets, strict=True))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_routing_equals_the_independent_statement(case: tuple[Small, Action, dict[int, int]]) -> None:
    """2, 8, 9: stagewise = per layer, last-row = full-matrix scoring, angles by original position."""
    small, action, decisions = case
    output, run = small.prefill(action, decisions)
    result, logits = small.expected(action, decisions)
    for number, (layer, route) in enumerate(zip(decisions, output.routes, strict=True)):
        if score_margin(result.scores[layer], result.ran[layer], small.is_visual) <= MARGIN:
            return  # a tie: both choices are right, and what follows differs
        np.testing.assert_array_equal(route[0].numpy(), result.ran[layer])
        candidates, scores = run.decisions[number]
        slots = candidates[0].numpy()
        if action == "removal" and number:
            slots = output.routes[number - 1][0].numpy()[slots]
        np.testing.assert_allclose(scores[0].numpy(), result.scores[layer][slots], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(output.logits[0].numpy(), logits, atol=1e-4)
    for layer in range(small.layers):
        rows = run.lengths[run.schedule.stage_of_layer(layer)]
        assert rows == len(result.ran[layer])
        cache = output.present[layer][0][0, :, :rows].numpy().transpose(1, 0, 2)
        np.testing.assert_allclose(cache, result.keys[layer], atol=1e-4)
    # Decode: no routing, each layer sees its own cache, and the position goes on where the method says.
    weights = small.weights()
    for token in (3, 41):
        embedded = weights["embed_tokens.weight"][[token]]
        expected = independent_decode(weights, result, embedded, heads=small.heads, eps=small.eps, theta=small.theta)
        np.testing.assert_allclose(run.decode(token).logits[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("action", ["reroute", "removal"])
def test_1_keeping_everything_is_the_dense_model(action: Action) -> None:
    small = Small()
    dense, _ = small.prefill()
    kept, _ = small.prefill(action, {0: 20, 2: 20, 5: 20})
    torch.testing.assert_close(kept.logits, dense.logits, atol=1e-5, rtol=0)
    for (key, value), (key_dense, value_dense) in zip(kept.present, dense.present, strict=True):
        torch.testing.assert_close(key, key_dense, atol=1e-5, rtol=0)
        torch.testing.assert_close(value, value_dense, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(0, 2**16))
def test_3_one_decision_makes_reroute_and_removal_equal(layer: int, keep: int, seed: int) -> None:
    small = Small(seed=seed)
    reroute, _ = small.prefill("reroute", {layer: keep})
    removal, _ = small.prefill("removal", {layer: keep})
    torch.testing.assert_close(reroute.logits, removal.logits, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_4_5_6_7_sets_of_rows(case: tuple[Small, Action, dict[int, int]]) -> None:
    """First decisions agree, waiting rows do not change, caches are S then T + K, removal sets are nested."""
    small, _, decisions = case
    small.positions = "original"
    routes = {}
    actions: tuple[Action, ...] = ("reroute", "removal")
    for action in actions:
        output, run = small.prefill(action, decisions)
        routes[action] = [set(route[0].tolist()) for route in output.routes]
        assert run.lengths == [small.rows, *(small.text + k for k in decisions.values())]
        text = set(np.flatnonzero(~small.is_visual).tolist())
        for route, keep in zip(output.routes, decisions.values(), strict=True):
            slots = route[0].tolist()
            assert slots == sorted(set(slots))
            assert text <= set(slots)
            assert len(slots) == small.text + keep
    assert routes["reroute"][0] == routes["removal"][0]
    for before, after in zip(routes["removal"], routes["removal"][1:], strict=False):
        assert after <= before


def test_5_rows_that_wait_keep_their_hidden_state_bit_for_bit() -> None:
    """What the next decision scatters back holds the waiting rows untouched."""
    small = Small()
    decoder = small.decoder("reroute", DECISIONS)
    seen: list[torch.Tensor] = []
    layer: Any = decoder.layers[4]
    layer.input_norm.register_forward_hook(lambda _module, args, _output: seen.append(args[0].clone()))
    dense_until_2: list[torch.Tensor] = []
    earlier: Any = decoder.layers[2]
    norm = earlier.input_norm
    norm.register_forward_hook(lambda _module, args, _output: dense_until_2.append(args[0].clone()))
    output = RecordingDecoder(decoder, capacity=64).step(*small.inputs())
    waited = sorted(set(range(small.rows)) - set(output.routes[0][0].tolist()))
    assert len(waited) == 20 - 7
    assert torch.equal(seen[0][0, waited], dense_until_2[0][0, waited])
    ran = output.routes[0][0].tolist()
    assert not torch.equal(seen[0][0, ran], dense_until_2[0][0, ran])


def test_7_rerouted_rows_do_come_back() -> None:
    """Over seeds, some row that waited in one stage runs in the next: the point of the paper."""
    returned = 0
    for seed in range(10):
        output, _ = Small(seed=seed).prefill("reroute", DECISIONS)
        first, second = (set(route[0].tolist()) for route in output.routes)
        returned += len(second - first)
    assert returned > 0


def test_equal_scores_go_to_the_lower_slot() -> None:
    keys = torch.zeros(1, 9, 8)
    always, candidates = torch.tensor([[0, 8]]), torch.arange(1, 8)[None]
    slots = ops.select(torch.randn(1, 16), keys, candidates, always, 3, 4, 2, 0.5)
    assert slots.tolist() == [[0, 1, 2, 3, 8]]


@pytest.mark.parametrize("decisions", [{}, {2: 20, 4: 20}, {0: 20, 3: 20}])
@pytest.mark.parametrize("action", ["reroute", "removal"])
def test_decode_continues_the_prompt(action: Action, decisions: dict[int, int]) -> None:
    """With nothing dropped, a prompt and three decoded tokens give the logits of the prompt with them at its end."""
    small, longer = Small(), Small(text=9)
    _, run = small.prefill(action, decisions)
    ids, embeds, _, visual_slots = small.inputs()
    more = longer.inputs()[0][:, :3]
    whole = RecordingDecoder(longer.decoder(), capacity=64)
    text_slots = torch.where(~torch.from_numpy(longer.is_visual))[0]
    expected = whole.step(torch.cat([ids, more], dim=1), embeds, text_slots, visual_slots)
    logits = [run.decode(int(token)).logits for token in more[0]]
    torch.testing.assert_close(logits[-1], expected.logits, atol=1e-4, rtol=0)


def test_a_decoded_token_sees_what_ran_in_its_layer_at_original_positions() -> None:
    """One attention step of the last layer, done again from the cache of that layer alone."""
    small = Small()
    output, run = small.prefill("reroute", DECISIONS)
    layer: Any = run.decoder.layers[5]
    seen: dict[str, torch.Tensor] = {}
    layer.o_proj.register_forward_hook(lambda _module, args, _output: seen.update(mixed=args[0].clone()))
    layer.input_norm.register_forward_hook(lambda _module, _args, out: seen.update(x=out.clone()))
    run.decode(7)
    ran = output.routes[1][0].tolist()
    rows = run.lengths[2]
    assert rows == len(ran) + 1
    key, value = (cache[0, :, :rows].double().numpy() for cache in run.past[5])
    x = seen["x"][0].double().numpy()
    q = (x @ layer.q_proj.weight.double().numpy()).reshape(1, small.heads, -1)
    q = rope(q, np.asarray([small.rows]), small.theta)
    probabilities = attention_probabilities(q, key.transpose(1, 0, 2), causal=False)
    mixed = np.einsum("hqk,hkd->qhd", probabilities, np.repeat(value, small.heads // small.kv_heads, axis=0))
    np.testing.assert_allclose(seen["mixed"][0].numpy(), mixed.reshape(1, -1), atol=1e-5)
    # The keys were rotated by the slots that ran, not by their places in the cache.
    result, _ = small.expected("reroute", DECISIONS)
    np.testing.assert_allclose(key[:, : rows - 1].transpose(1, 0, 2), result.keys[5], atol=1e-4)
