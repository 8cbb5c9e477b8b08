"""The seven ways in which the published code breaks (docs/architecture.md), each as a test of ours.

Every test runs the torch decoder and the built engine, and compares with a statement of its own where there is one:
`dense_step` below, or `independent_forward` of tests/export/independent.py, both float64 numpy without stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from reroute.engines import build
from reroute.errors import UserError
from reroute.export import export_checkpoint
from reroute.export.checkpoint import Checkpoint
from reroute.export.models import family_of
from reroute.export.reference import RecordingDecoder
from reroute.manifest import Manifest
from reroute.runtime import BackendOptions, Bundle, Session
from reroute.runtime.backend import open_backend
from reroute.runtime.layout import Layout, StepInputs, stack
from reroute.runtime.rope import Rotary
from tests.conftest import TINY_ROUTING
from tests.export import independent as ind

VISUAL, HIDDEN, LAYERS, EPS, THETA = 36, 64, 6, 1e-6, 10000.0
HEADS, KV_HEADS = 4, 2
ROUTINGS = {"routed": TINY_ROUTING, "dense": "dense", "layer 0": "reroute@0,3:keep=7,4"}
BOTH = pytest.mark.parametrize("kind", ["torch", "engine"])
Weights = dict[str, np.ndarray]


def layout(ids: Sequence[int], visual: int = 0, start: int = 4) -> Layout:
    """A step of text with `visual` visual rows from slot `start` on."""
    slots = np.arange(len(ids) + visual)
    is_visual = (slots >= start) & (slots < start + visual)
    return Layout(
        input_ids=np.asarray(ids, dtype=np.int64),
        text_slots=np.flatnonzero(~is_visual),
        visual_slots=np.flatnonzero(is_visual),
    )


def words(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(16, 150, count).tolist()


def image(seed: int = 0) -> np.ndarray:
    """Visual embeddings [1, N, D]."""
    return np.random.default_rng(100 + seed).standard_normal((1, VISUAL, HIDDEN)).astype(np.float32)


NO_IMAGE = np.zeros((1, 0, HIDDEN), dtype=np.float32)


def inputs_of(place: Layout, embeds: np.ndarray, rotary: Rotary, start: int) -> StepInputs:
    """A step whose rows stand at consecutive positions from `start` on."""
    return place.inputs(embeds, *rotary.rows(start, place.num_text + place.num_visual))


class Run:
    """One decoder with its caches: torch or the engine, driven alike.

    Attributes:
        kind: "torch" or "engine".
    """

    def __init__(self, kind: str, bundle: Path, checkpoint: Path, batch: int) -> None:
        self.kind = kind
        manifest = Manifest.load(bundle)
        self.schedule = manifest.schedule
        self.rotary = Rotary(head_dim=HIDDEN // HEADS, theta=THETA, rows=512)
        if kind == "engine":
            self.engine = open_backend(Bundle.open(bundle), BackendOptions(batch=batch, threads=1))
        else:
            opened = Checkpoint.open(checkpoint)
            decoder = family_of(opened).build_decoder(opened, manifest.model, self.schedule)
            self.torch = RecordingDecoder(decoder, capacity=512, batch=batch)

    @property
    def lengths(self) -> list[int]:
        return self.engine.lengths.tolist() if self.kind == "engine" else list(self.torch.lengths)

    def step(self, *rows: Layout, embeds: np.ndarray = NO_IMAGE) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [B, V] and the slots of each routed stage [B, A]."""
        images = [NO_IMAGE] * len(rows) if embeds is NO_IMAGE else np.split(embeds, len(rows))
        inputs = stack(
            [inputs_of(row, image, self.rotary, self.lengths[0]) for row, image in zip(rows, images, strict=True)]
        )
        if self.kind == "engine":
            outputs = self.engine.step(inputs)
            return outputs.logits.copy(), list(outputs.routes)
        parts = (inputs.input_ids, inputs.visual_embeds, inputs.text_slots, inputs.visual_slots)
        output = self.torch.step(*(torch.from_numpy(part) for part in parts))
        return output.logits.numpy(), [route.numpy() for route in output.routes]

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Valid keys and values [B, H_kv, rows, head_dim], copied."""
        rows = self.lengths[self.schedule.stage_of_layer(layer)]
        pair = self.engine.cache(layer) if self.kind == "engine" else self.torch.past[layer]
        key, value = (np.array(part)[:, :, :rows] for part in pair)
        return key, value

    def caches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.cache(layer) for layer in range(LAYERS)]


MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Bundles of `tiny_checkpoint` by name of their routing, made when first asked for."""
    made = {"routed": tiny_bundle}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("published")
            export_checkpoint(tiny_checkpoint, folder / "export", routing=ROUTINGS[name])
            build(folder / "export", folder / "bundle")
            made[name] = folder / "bundle"
        return made[name]

    return get


@pytest.fixture
def start(bundles: Callable[[str], Path], tiny_checkpoint: Path) -> MakeRun:
    """`start(kind, routing="routed", batch=1)`."""

    def make(kind: str, routing: str = "routed", batch: int = 1) -> Run:
        return Run(kind, bundles(routing), tiny_checkpoint, batch)

    return make


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> Weights:
    """The text model's tensors, float64, [out, in], by the names that `independent` uses."""
    opened = Checkpoint.open(tiny_checkpoint)
    return {
        name.removeprefix("language_model."): opened.load(name, torch.float64).numpy()
        for name in opened.entries
        if name.startswith(("language_model.", "lm_head."))
    }


def dense_step(
    weights: Weights, ids: Sequence[int], position: int, caches: list[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Logits [V] after `ids` at positions `position`...: every row runs in every layer, over that layer's own cache."""
    h = weights["embed_tokens.weight"][np.asarray(ids)]
    positions = position + np.arange(len(ids))
    for layer, cache in enumerate(caches):
        w = {name.split(f"layers.{layer}.")[1]: value for name, value in weights.items() if f"layers.{layer}." in name}
        x = ind.norm(h, w["input_layernorm.weight"], EPS)
        q = ind.rope(ind.split(x @ w["self_attn.q_proj.weight"].T, HEADS), positions, THETA)
        k = ind.rope(ind.split(x @ w["self_attn.k_proj.weight"].T, KV_HEADS), positions, THETA)
        v = ind.split(x @ w["self_attn.v_proj.weight"].T, KV_HEADS)
        past_k, past_v = (part[0].transpose(1, 0, 2).astype(np.float64) for part in cache)
        k, v = (np.repeat(np.concatenate(pair), HEADS // KV_HEADS, axis=1) for pair in ((past_k, k), (past_v, v)))
        products = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        seen = np.arange(len(k))[None, :] <= len(past_k) + np.arange(len(ids))[:, None]
        products = np.exp(np.where(seen, products, -np.inf))
        mixed = np.einsum("hqk,khd->qhd", products / products.sum(axis=-1, keepdims=True), v)
        h = h + mixed.reshape(len(ids), -1) @ w["self_attn.o_proj.weight"].T
        z = ind.norm(h, w["post_attention_layernorm.weight"], EPS)
        gate = z @ w["mlp.gate_proj.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * (z @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return ind.norm(h[-1:], weights["norm.weight"], EPS)[0] @ weights["lm_head.weight"].T


@BOTH
@pytest.mark.parametrize("routing", ["dense", "routed"])
def test_a_the_causal_mask_holds(kind: str, routing: str, start: MakeRun) -> None:
    """Published: eager attention loses the causal mask. Here a later token never touches an earlier row's keys or
    values. Where the decision itself changes, only rows before the first slot that differs can be compared."""
    ids = words(12)
    runs = [start(kind, routing) for _ in range(2)]
    changed = len(ids) - 2
    slot = changed + VISUAL
    outputs = [
        run.step(layout(row, VISUAL), embeds=image()) for run, row in zip(runs, _pair(ids, changed), strict=True)
    ]
    (logits, routes), (other_logits, other_routes) = outputs
    assert np.abs(logits - other_logits).max() > 1e-3, "the change does nothing: nothing is tested"
    everything = [np.arange(len(ids) + VISUAL)[None]] * 2
    compared = 0
    for layer in range(LAYERS):
        stage = runs[0].schedule.stage_of_layer(layer)
        differ = [np.setxor1d(a, b) for a, b in zip(routes[:stage], other_routes[:stage], strict=True)]
        limit = min([slot, *(int(slots.min()) for slots in differ if len(slots))])
        slots, other_slots = (routes[stage - 1], other_routes[stage - 1]) if stage else everything
        rows = int((slots[0] < limit).sum())
        assert rows == int((other_slots[0] < limit).sum())
        for ours, other in zip(runs[0].cache(layer), runs[1].cache(layer), strict=True):
            np.testing.assert_allclose(ours[:, :, :rows], other[:, :, :rows], atol=1e-6)
            assert np.abs(ours[:, :, -1] - other[:, :, -1]).max() > 1e-3 or layer == 0
        compared += rows
        assert rows > 4, "only the text before the image was compared"
    assert compared >= 2 * slot


def _pair(ids: list[int], place: int) -> tuple[list[int], list[int]]:
    return ids, [*ids[:place], ids[place] + 1, *ids[place + 1 :]]


@BOTH
@pytest.mark.parametrize("routing", ["routed", "layer 0"])
def test_b_a_text_only_prompt_after_an_image_is_not_routed(
    kind: str, routing: str, start: MakeRun, weights: Weights
) -> None:
    """Published: it is routed with the image's stale range. Here every row runs in every stage."""
    run = start(kind, routing)
    run.step(layout(words(9), VISUAL), embeds=image())
    before, caches = run.lengths, run.caches()
    assert before == [9 + VISUAL, 9 + 7, 9 + 4]
    turn = words(6, seed=1)
    logits, routes = run.step(layout(turn))
    assert run.lengths == [length + 6 for length in before]
    assert [route.tolist() for route in routes] == [[list(range(6))]] * 2
    np.testing.assert_allclose(logits[0], dense_step(weights, turn, 9 + VISUAL, caches), atol=1e-4)
    for (key, value), (key_before, value_before) in zip(run.caches(), caches, strict=True):
        np.testing.assert_array_equal(key[:, :, : key_before.shape[2]], key_before)
        np.testing.assert_array_equal(value[:, :, : value_before.shape[2]], value_before)


@BOTH
def test_c_every_row_of_a_batch_has_its_own_route(kind: str, start: MakeRun) -> None:
    """Published: row 0's selection is used for every row. Here each row is its own batch of one, also at decode and,
    in torch, in a later turn; ONNX Runtime has no attention for that one, and it is refused by name."""
    prompts, images = [words(9), words(9, seed=1)], [image(), image(1)]
    batch = start(kind, batch=2)
    steps = [batch.step(*(layout(ids, VISUAL) for ids in prompts), embeds=np.concatenate(images))]
    steps.append(batch.step(layout([20]), layout([30])))
    if kind == "torch":
        steps.append(batch.step(layout([21, 22, 23]), layout([31, 32, 33])))
    else:
        lengths = batch.lengths
        with pytest.raises(UserError, match="a later prompt cannot run in a batch of 2"):
            batch.step(layout([21, 22, 23]), layout([31, 32, 33]))
        assert batch.lengths == lengths
        for offset in (1, 2, 3):
            steps.append(batch.step(layout([20 + offset]), layout([30 + offset])))
    routes = steps[0][1]
    for stage in routes:
        assert stage[0].tolist() != stage[1].tolist(), "both rows keep the same: nothing is tested"
    for row, (ids, embeds) in enumerate(zip(prompts, images, strict=True)):
        alone = start(kind)
        expected = [alone.step(layout(ids, VISUAL), embeds=embeds)]
        expected.append(alone.step(layout([20 + 10 * row])))
        later = [[21 + 10 * row, 22 + 10 * row, 23 + 10 * row]]
        for ids_later in later if kind == "torch" else [[token] for token in later[0]]:
            expected.append(alone.step(layout(ids_later)))
        for (logits, _), (logits_alone, _) in zip(steps, expected, strict=True):
            np.testing.assert_allclose(logits[row], logits_alone[0], atol=1e-4)
        for stage, stage_alone in zip(routes, expected[0][1], strict=True):
            assert stage[row].tolist() == stage_alone[0].tolist()
        for ours, theirs in zip(batch.caches(), alone.caches(), strict=True):
            for part, part_alone in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(part[row], part_alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        pytest.param(layout(words(11), VISUAL), r"9 text and 36 visual tokens, and 11 text and 36", id="longer"),
        pytest.param(layout(words(9)), r"9 text and 36 visual tokens, and 9 text and 0 visual", id="no image"),
        pytest.param(layout(words(9), VISUAL, start=5), "images at different places", id="image elsewhere"),
    ],
)
def test_d_padding_is_refused_by_name(other: Layout, says: str) -> None:
    """Published: left padding gives wrong results. Here prompts that would need it are refused."""
    rotary = Rotary(head_dim=16, theta=THETA, rows=64)
    with pytest.raises(UserError, match=says) as refusal:
        stack(
            [
                inputs_of(layout(words(9), VISUAL), image(), rotary, 0),
                inputs_of(other, image(1) if other.num_visual else NO_IMAGE, rotary, 0),
            ]
        )
    assert "padding" in refusal.value.message
    assert "one after the other" in refusal.value.hint


def test_d_without_padding_a_batch_is_its_rows() -> None:
    """`stack` of one is `inputs`; of two it is both, over one table of slots and positions."""
    rotary = Rotary(head_dim=16, theta=THETA, rows=64)
    rows, images = [layout(words(9, seed), VISUAL) for seed in (0, 1)], [image(0), image(1)]
    steps = [inputs_of(row, embeds, rotary, 3) for row, embeds in zip(rows, images, strict=True)]
    both = stack(steps)
    for index, step in enumerate(steps):
        for alone in (step, stack([step])):
            np.testing.assert_array_equal(both.input_ids[index], alone.input_ids[0])
            np.testing.assert_array_equal(both.visual_embeds[index], alone.visual_embeds[0])
            for name in ("text_slots", "visual_slots", "rope_cos", "rope_sin"):
                np.testing.assert_array_equal(getattr(both, name), getattr(alone, name))


@pytest.mark.parametrize("visual", [0, VISUAL], ids=["text", "image"])
@pytest.mark.parametrize("routing", ["routed", "layer 0"])
def test_e_a_longer_second_turn(routing: str, visual: int, start: MakeRun, weights: Weights) -> None:
    """Published: wrong results or a crash. Here the engine is the torch decoder, and both are the plain statement."""
    turn, after = words(17, seed=1), words(21, seed=2)
    seen = {}
    for kind in ("torch", "engine"):
        run = start(kind, routing)
        run.step(layout(words(5), VISUAL), embeds=image())
        _, routes = run.step(layout(turn, visual), embeds=image(1) if visual else NO_IMAGE)
        caches = run.caches()
        position = 5 + VISUAL + 17 + visual
        assert run.lengths == [position, 5 + 7 + 17 + min(7, visual), 5 + 4 + 17 + min(4, visual)]
        logits, _ = run.step(layout(after))
        np.testing.assert_allclose(logits[0], dense_step(weights, after, position, caches), atol=1e-4)
        seen[kind] = (logits, routes, run.caches())
    np.testing.assert_allclose(seen["engine"][0], seen["torch"][0], atol=1e-4)
    for ours, theirs in zip(seen["engine"][1], seen["torch"][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(seen["engine"][2], seen["torch"][2], strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-4)


@BOTH
@pytest.mark.parametrize(("routing", "decisions"), [("layer 0", {0: 7, 3: 4}), ("routed", {2: 7, 4: 4})])
def test_f_a_first_decision_at_layer_0(
    kind: str, routing: str, decisions: dict[int, int], start: MakeRun, weights: Weights
) -> None:
    """Published: positions are misread. Here slots, rotated keys and logits are the independent statement's."""
    run, ids = start(kind, routing), words(9)
    place = layout(ids, VISUAL)
    logits, routes = run.step(place, embeds=image())
    h = np.zeros((9 + VISUAL, HIDDEN))
    h[place.text_slots], h[place.visual_slots] = weights["embed_tokens.weight"][ids], image()[0]
    is_visual = np.isin(np.arange(9 + VISUAL), place.visual_slots)
    result = ind.independent_forward(
        weights,
        h,
        is_visual=is_visual,
        decisions=decisions,
        action="reroute",
        num_layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        eps=EPS,
        theta=THETA,
    )
    for layer, route in zip(decisions, routes, strict=True):
        assert route[0].tolist() == result.ran[layer].tolist()
    for layer in range(LAYERS):
        key = run.cache(layer)[0][0].transpose(1, 0, 2)
        np.testing.assert_allclose(key, result.keys[layer], atol=1e-4)
    np.testing.assert_allclose(logits[0], ind.last_logits(weights, result, EPS), atol=1e-4)
    caches = run.caches()
    logits, _ = run.step(layout([20]))
    np.testing.assert_allclose(logits[0], dense_step(weights, [20], 9 + VISUAL, caches), atol=1e-4)


def test_g_generation_really_routes(bundles: Callable[[str], Path]) -> None:
    """Published: under transformers 5.23 `generate()` silently runs every token everywhere. Here the caches of a
    session hold, after every step, exactly the rows that should have run."""
    picture = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Session.open(bundles("routed"), threads=1) as session:
        stream = session.stream("what is there ?", picture, max_new_tokens=6)
        text = 0
        for decoded, _ in enumerate(stream):
            lengths = session.backend.lengths.tolist()
            text = lengths[0] - VISUAL - decoded
            assert lengths == [VISUAL + text + decoded, 7 + text + decoded, 4 + text + decoded]
        answer = stream.answer
        assert (answer.prompt_tokens, answer.visual_tokens) == (text, VISUAL)
        assert len(answer.token_ids) > 2, "too few steps to show anything"
        assert session.backend.lengths[0] == text + VISUAL + len(answer.token_ids) - 1
        assert [len(route) for route in answer.routes] == [7, 4]
        for layer, rows in enumerate([VISUAL, VISUAL, 7, 7, 4, 4]):
            for part in session.backend.cache(layer):
                assert part.shape[2] == rows + text + len(answer.token_ids) - 1
                # A row that was counted and not written would be all zero.
                assert (np.abs(part).max(axis=(0, 1, 3)) > 0).all()


@BOTH
def test_g_routing_changes_what_the_model_says(kind: str, start: MakeRun) -> None:
    """A decoder that quietly kept everything would agree with the dense one."""
    place = layout(words(9), VISUAL)
    routed, _ = start(kind, "routed").step(place, embeds=image())
    dense, _ = start(kind, "dense").step(place, embeds=image())
    assert np.abs(routed - dense).max() > 1e-2
