"""Nüwa's first stage against an independent statement of it, in loops and float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from reroute import scenario
from reroute.check import check_bundle
from reroute.engines import build
from reroute.errors import UserError
from reroute.export import export_checkpoint, nuwa, resolve
from reroute.export.checkpoint import Checkpoint
from reroute.export.models import family_of
from reroute.export.reference import RecordingDecoder, encode, run_prompt
from reroute.runtime.session import Session
from tests.conftest import TinyLlava, make_llava
from tests.export.independent import independent_decode, independent_forward, last_logits

Grid = tuple[int, int]


def independent_choice(salience: np.ndarray, grid: Grid, per_region: int, keep: int) -> list[int]:
    """The K most salient of the n most salient patches of each 2 x 2 region; the first of equals."""
    candidates: list[int] = []
    for top in range(0, grid[0], 2):
        for left in range(0, grid[1], 2):
            region = [
                y * grid[1] + x for y in range(top, min(top + 2, grid[0])) for x in range(left, min(left + 2, grid[1]))
            ]
            candidates += sorted(region, key=lambda p: (-salience[p], p))[:per_region]
    return sorted(sorted(candidates, key=lambda p: (-salience[p], p))[:keep])


def independent_tokens(
    features: np.ndarray, similar: np.ndarray, salience: np.ndarray, kept: list[int], grid: Grid
) -> np.ndarray:
    """Pillars as they are; collectors with the weighted features of all others."""
    count = len(features)
    threshold = np.quantile(salience[kept], 0.55)
    reach = math.sqrt(280) * math.sqrt(grid[0] * grid[1]) / 24
    rows = []
    for i in kept:
        if salience[i] >= threshold:
            rows.append(features[i])
            continue
        weights = np.zeros(count)
        for j in range(count):
            cosine = similar[i] @ similar[j] / np.linalg.norm(similar[i]) / np.linalg.norm(similar[j])
            distance = math.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1])
            weights[j] = max(0.0, cosine) * (1 - min(1.0, distance / reach))
        weights /= weights.sum() + 1e-8
        weights[i] = 1.0
        rows.append(weights @ features)
    return np.stack(rows)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Grid, int, np.ndarray, np.ndarray, np.ndarray]:
    """A grid, a budget, salience (with ties), features and similarity states."""
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    count = grid[0] * grid[1]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    salience = rng.integers(0, draw(st.sampled_from([2, 5, 10**6])), count) / 7
    return grid, draw(st.integers(1, count)), salience, rng.normal(size=(count, 5)), rng.normal(size=(count, 6))


@settings(max_examples=80, deadline=None)
@given(pictures())
def test_the_choice_and_the_tokens_are_those_of_the_independent_statement(
    case: tuple[Grid, int, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    grid, keep, salience, features, similar = case
    per_region = nuwa.candidates_per_region(grid, keep)
    m = torch.from_numpy(salience).float()[None]
    kept = nuwa.select(m, grid, keep)
    expected = independent_choice(m[0].numpy(), grid, per_region, keep)
    assert kept[0].tolist() == expected
    assert len(expected) == keep
    near = nuwa.closeness(grid).double()
    tokens = nuwa.collect(torch.from_numpy(features)[None], torch.from_numpy(similar)[None], m.double(), kept, near)
    wanted = independent_tokens(features, similar, m[0].double().numpy(), expected, grid)
    np.testing.assert_allclose(tokens[0].numpy(), wanted, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(pictures())
def test_10_pillars_are_untouched_regions_are_limited_and_the_budget_is_exact(
    case: tuple[Grid, int, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    grid, keep, salience, features, similar = case
    m, x = torch.from_numpy(salience)[None], torch.from_numpy(features)[None]
    kept = nuwa.select(m, grid, keep)
    assert kept.shape == (1, keep)
    assert (kept[0, 1:] > kept[0, :-1]).all()
    per_region = nuwa.candidates_per_region(grid, keep)
    width = -(-grid[1] // 2)
    regions = kept // grid[1] // 2 * width + kept % grid[1] // 2
    assert int(regions.bincount(minlength=1).max() if regions.dim() == 1 else regions[0].bincount().max()) <= per_region
    tokens = nuwa.collect(x, torch.from_numpy(similar)[None], m, kept, nuwa.closeness(grid).double())
    scores = m[0, kept[0]]
    pillars = scores >= torch.quantile(scores, nuwa.QUANTILE)
    assert pillars.any()
    torch.testing.assert_close(tokens[0, pillars], x[0, kept[0, pillars]], rtol=0, atol=0)


@pytest.mark.parametrize(("keep", "per_region"), [(112, 1), (144, 1), (145, 2), (224, 2), (336, 3), (433, 4), (576, 4)])
def test_candidates_of_the_published_budgets(keep: int, per_region: int) -> None:
    assert nuwa.candidates_per_region((24, 24), keep) == per_region


def test_the_published_layers_and_reach() -> None:
    assert nuwa.first_similar_state(24) == 16
    near = nuwa.closeness((24, 24))
    assert near[0, 0] == 1
    assert near[0, 16 * 24] == pytest.approx(1 - 16 / math.sqrt(280), abs=1e-6)
    assert near[0, 17 * 24] == 0


@pytest.mark.parametrize("image_size", [48, 56], ids=["6x6", "7x7"])
def test_the_tower_is_transformers_tower_with_the_independent_first_stage(tmp_path: Path, image_size: int) -> None:
    """Salience, features and similarity are transformers' attentions and hidden states of the same weights."""
    folder = make_llava(tmp_path / "model", TinyLlava(image_size=image_size, vision_layers=5))
    opened = Checkpoint.open(folder)
    family = family_of(opened)
    model = family.read(opened)
    side, keep = image_size // 8, 13
    tower = family.build_vision(opened, model, resolve(f"removal@2:nuwa={keep}:keep=4:score=previous", model))
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    tokens, places, _ = encode(tower, pixels)
    assert places is not None
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    clip: CLIPVisionModel = theirs.model.vision_tower
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        out: Any = clip(pixels.double(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6
    for image in range(2):
        salience = out.attentions[-2][image, :, 0, 1:].sum(0).numpy()
        features = out.hidden_states[-2][image, 1:].numpy()
        similar = torch.stack(out.hidden_states[3:6]).mean(0)[image, 1:].numpy()
        per_region = nuwa.candidates_per_region((side, side), keep)
        kept = independent_choice(salience, (side, side), per_region, keep)
        assert places[image].tolist() == kept
        wanted = independent_tokens(features, similar, salience, kept, (side, side))
        with torch.no_grad():
            projected = theirs.model.multi_modal_projector(torch.from_numpy(wanted))
        np.testing.assert_allclose(tokens[image].numpy(), projected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("routing", "scoring", "decisions"),
    [
        ("removal@3:nuwa=12:keep=4:score=previous", "previous", {3: 4}),
        ("reroute@2,4:nuwa=12:keep=5,3", "own", {2: 5, 4: 3}),
        ("reroute@2,4:nuwa=12:keep=5,3:rows=3:heads=max", "own", {2: 5, 4: 3}),
        ("removal@3,4:nuwa=12:keep=6,4:score=previous:rows=2", "previous", {3: 6, 4: 4}),
        ("removal@2,4:nuwa=12:keep=6,4:heads=max", "own", {2: 6, 4: 4}),
    ],
)
def test_the_decoder_keeps_the_positions_of_the_unpruned_image(
    tiny_checkpoint: Path, routing: str, scoring: str, decisions: dict[int, int]
) -> None:
    """Rows, the text behind the image and decoded tokens stand where they would stand without Nüwa."""
    opened = Checkpoint.open(tiny_checkpoint)
    family = family_of(opened)
    model = family.read(opened)
    schedule = resolve(routing, model)
    decoder, tower = family.build_decoder(opened, model, schedule), family.build_vision(opened, model, schedule)
    inputs = scenario.probe(model)
    visual = encode(tower, torch.from_numpy(inputs.pixel_values))
    assert visual.places is not None
    run = RecordingDecoder(decoder, capacity=100)
    output = run_prompt(run, inputs.prompt_ids, model.tokens.image_token_id, model.vision.tokens_per_image, visual)
    text = opened.config["text_config"]
    weights = {
        name.removeprefix("language_model."): opened.load(name, torch.float64).numpy()
        for name in opened.entries
        if name.startswith(("language_model.", "lm_head."))
    }
    before = int(np.flatnonzero(inputs.prompt_ids == model.tokens.image_token_id)[0])
    words = inputs.prompt_ids[inputs.prompt_ids != model.tokens.image_token_id]
    embedded = weights["embed_tokens.weight"][words]
    assert visual.places is not None
    places = visual.places[0].numpy()
    positions = np.concatenate([np.arange(before), before + places, before + 36 + np.arange(len(words) - before)])
    sizes = {"heads": text["num_attention_heads"], "eps": model.text.rms_norm_eps, "theta": model.text.rope_theta}
    result = independent_forward(
        weights,
        np.concatenate([embedded[:before], visual[0][0].double().numpy(), embedded[before:]]),
        is_visual=np.isin(np.arange(len(positions)), before + np.arange(12)),
        decisions=decisions,
        action=schedule.action,
        num_layers=model.text.num_layers,
        kv_heads=model.text.num_kv_heads,
        scoring=scoring,
        positions=positions,
        last_rows=schedule.rows,
        largest_head=schedule.heads == "max",
        **sizes,
    )
    for route, layer in zip(output.routes, decisions, strict=True):
        np.testing.assert_array_equal(route[0].numpy(), result.ran[layer])
    logits = last_logits(weights, result, sizes["eps"])
    np.testing.assert_allclose(output.logits[0].numpy(), logits, atol=1e-4)
    for token in (7, 30):
        wanted = independent_decode(weights, result, weights["embed_tokens.weight"][[token]], **sizes)
        np.testing.assert_allclose(run.decode(token).logits[0].numpy(), wanted, atol=1e-4)


@pytest.fixture(scope="module")
def nuwa_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nuwa")
    export_checkpoint(tiny_checkpoint, folder / "export", routing="reroute@2,4:nuwa=12:keep=5,3")
    build(folder / "export", folder / "bundle")
    return folder / "bundle"


def test_the_engine_passes_its_check(nuwa_bundle: Path) -> None:
    result = check_bundle(nuwa_bundle)
    assert result.passed
    assert ("places", "12 of 12 equal") in [(row.quantity, row.measured) for row in result.rows]


def test_a_dialogue_with_two_images_is_torchs(nuwa_bundle: Path, tiny_checkpoint: Path) -> None:
    """Positions go on over both images, wherever the second turn brings the second one."""
    opened = Checkpoint.open(tiny_checkpoint)
    family = family_of(opened)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)) for i in (1, 2)]
    with Session.open(nuwa_bundle, threads=1) as session:
        manifest, chat = session.manifest, session.bundle.chat()
        model = manifest.model
        decoder = family.build_decoder(opened, model, manifest.schedule)
        tower = family.build_vision(opened, model, manifest.schedule)
        run = RecordingDecoder(decoder, capacity=300)
        features = session.encode(images[1])
        talk: list[Any] = []
        pending: list[int] = []
        for number, (question, given) in enumerate([("where ?", images[0]), ("how many ?", features), ("why ?", None)]):
            from reroute.runtime.chat import assistant_message, user_message

            talk.append(user_message(question, num_images=int(given is not None)))
            ids = np.asarray(pending + (chat.next_turn(talk) if number else chat.first_turn(talk)))
            answer = session.ask(question, given, max_new_tokens=3)
            if given is None:
                logits = run.run_text(torch.from_numpy(ids)[None]).logits
                assert answer.entered.size == 0
            else:
                from reroute.runtime.image import preprocess

                pixels = torch.from_numpy(preprocess(images[number], model.image))[None]
                visual = encode(tower, pixels)
                assert visual.places is not None
                output = run_prompt(run, ids, model.tokens.image_token_id, 36, visual)
                logits = output.logits
                assert answer.entered.tolist() == visual.places[0].tolist()
                for route, slots, budget in zip(answer.routes, output.routes, (5, 3), strict=True):
                    assert len(route) == budget
                    assert set(route.tolist()) <= set(answer.entered.tolist())
                    assert len(slots[0]) - len(ids) + 1 == budget
            tokens = run.greedy(logits, len(answer.token_ids))
            assert tokens == list(answer.token_ids)
            assert answer.stop_reason == "length"
            pending = tokens[-1:]
            talk.append(assistant_message(answer.text))
        images_and_text = run.position
        assert images_and_text == run.lengths[0] + 2 * (36 - 12)


def test_features_of_another_vision_graph_are_refused(nuwa_bundle: Path, tiny_bundle: Path) -> None:
    image = Image.new("RGB", (48, 48), (90, 120, 30))
    with Session.open(nuwa_bundle, threads=1) as session, Session.open(tiny_bundle, threads=1) as other:
        features = session.encode(image)
        assert session.ask("where ?", features, max_new_tokens=2).token_ids
        with pytest.raises(UserError, match="another vision graph"):
            other.ask("where ?", features)
        session.reset()
        assert session.ask("where ?", features, max_new_tokens=2) is not None


@pytest.mark.parametrize(
    "size", [TinyLlava(feature_layer=(-2, -1)), TinyLlava(strategy="full"), TinyLlava(feature_layer=0)]
)
def test_a_tower_that_nuwa_does_not_fit_is_refused_by_name(tmp_path: Path, size: TinyLlava) -> None:
    folder = make_llava(tmp_path / "model", size)
    with pytest.raises(UserError, match="Nüwa cannot prune this tower"):
        export_checkpoint(folder, tmp_path / "out", routing="nuwa@3:avg=9")
    assert not (tmp_path / "out").exists()
