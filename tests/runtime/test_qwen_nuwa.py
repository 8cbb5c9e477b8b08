"""Nüwa bundles of Qwen-VL models as a user runs them: engine against torch, sessions, pictures, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute.check import check_bundle
from reroute.manifest import Capacity
from reroute.runtime import Session
from reroute.runtime.backend import open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.overlay import overlay
from reroute.runtime.positions import Positions, join
from tests.qwen import CELL, IMAGE_TOKEN, Kind, make_qwen

pytest.importorskip("onnxruntime")
GRIDS = ((4, 6), (5, 3))
CASES: dict[Kind, str] = {
    "qwen2_5_vl": "removal@2:nuwa=.6:keep=.396:score=previous:rows=3:heads=max",
    "qwen3_vl": "reroute@1,3:nuwa=.6:keep=.3,.2:rows=3:heads=max:pool=image",
}
# Tokens that leave the tower of each grid, then what each decision keeps of them.
KEPT = {"qwen2_5_vl": {(4, 6): (15, 9), (5, 3): (9, 5)}, "qwen3_vl": {(4, 6): (15, 7, 5), (5, 3): (9, 4, 3)}}
Make = Callable[[Kind], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A built and checked bundle in a folder beside its checkpoint and export, made once."""
    from reroute.engines import build
    from reroute.export import export_checkpoint

    made: dict[Kind, Path] = {}

    def bundle(kind: Kind) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            make_qwen(folder / "model", kind, layers=4, full=(0, 2))
            capacity = Capacity(max_text=200, max_images=3)
            export_checkpoint(folder / "model", folder / "export", routing=CASES[kind], capacity=capacity, grids=GRIDS)
            build(folder / "export", folder / "bundle")
            made[kind] = folder / "bundle"
        return made[kind]

    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_the_check_holds_the_places_of_every_grid(kind: Kind, make: Make) -> None:
    result = check_bundle(make(kind))
    assert result.passed
    places = {row.quantity: row.measured for row in result.rows if row.quantity.startswith("places")}
    assert places == {"places": "15 of 15 equal", "places of 5 x 3": "9 of 9 equal"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_engines_equal_torch_slot_by_slot(kind: Kind, make: Make) -> None:
    """Each grid, both in one prompt, text alone; then decode steps and a later turn."""
    import torch

    from reroute.export.checkpoint import Checkpoint
    from reroute.export.models import family_of
    from reroute.export.reference import RecordingDecoder, encode, run_grids

    bundle = Bundle.open(make(kind))
    manifest, backend = bundle.manifest, open_backend(bundle)
    opened = Checkpoint.open(bundle.path.parent / "model")
    family = family_of(opened)
    decoder = family.build_decoder(opened, manifest.model, manifest.schedule)
    tower = family.build_vision(opened, manifest.model, manifest.schedule)
    positions, generator = Positions(manifest), np.random.default_rng(1)
    for grids in ([GRIDS[0]], [GRIDS[1]], [GRIDS[1], GRIDS[0]], []):
        backend.reset()
        run = RecordingDecoder(decoder, capacity=200)
        ids = [8, 1, *(token for _ in grids for token in (3, IMAGE_TOKEN, 4)), 40, 50, 60]
        pixels = [generator.standard_normal((1, 3, y * CELL, x * CELL)).astype(np.float32) for y, x in grids]
        visual = join([backend.encode(one) for one in pixels]) if pixels else None
        layout = lay_out(
            ids,
            image_token="<|image_pad|>",
            image_token_id=IMAGE_TOKEN,
            num_images=len(grids),
            tokens_per_image=[KEPT[kind][grid][0] for grid in grids],
        )
        visuals = [encode(tower, torch.from_numpy(one)) for one in pixels]
        expected = run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, visuals)
        outputs = backend.step(positions.inputs(layout, visual, backend.lengths))
        for stage, (have, want) in enumerate(zip(outputs.routes, expected.routes, strict=True), start=1):
            np.testing.assert_array_equal(have, want)
            kept = [KEPT[kind][grid][stage] for grid in grids]
            if manifest.schedule.pool == "all" and len(grids) == 2:
                kept = [int((15 + 9) * 0.66)]
            assert have.shape[1] == layout.num_text + sum(kept)
        np.testing.assert_allclose(outputs.logits, expected.logits, atol=1e-4)
        shift = positions.shift(visual)
        assert backend.lengths[0] + shift == run.position
        for tokens in ([11], [12], [13, 14, 15], [16]):
            step = positions.inputs(Layout.of_text(tokens), None, backend.lengths, shift=shift)
            logits = backend.step(step).logits
            np.testing.assert_allclose(logits, run.run_text(torch.tensor([tokens])).logits, atol=1e-4)
        assert backend.lengths.tolist() == run.lengths


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_session_of_several_images_says_where_their_tokens_were(kind: Kind, make: Make) -> None:
    """Indices count on from image to image, in all tokens of the images' own grids; a later turn goes on."""
    rng = np.random.default_rng(0)
    wide, high = (Image.fromarray(rng.integers(0, 256, (y, x, 3), dtype=np.uint8)) for y, x in ((33, 50), (41, 25)))
    with Session.open(make(kind), threads=1) as session:
        answer = session.ask("where?", [wide, high], max_new_tokens=3)
        assert answer.visual_tokens == len(answer.entered) == 15 + 9
        alone = [session.encode(picture).visual.places for picture in (wide, high)]
        assert alone[0] is not None
        assert alone[1] is not None
        assert answer.entered.tolist() == [*alone[0][0].tolist(), *(24 + alone[1][0]).tolist()]
        assert all(np.isin(route, answer.entered).all() for route in answer.routes)
        if kind == "qwen3_vl":
            assert [[int((route < 24).sum()), int((route >= 24).sum())] for route in answer.routes] == [[7, 4], [5, 3]]
        second = overlay(high, answer, session.manifest, image_index=1)
        assert second.stages[0].ran == 9
        assert int((second.stages[0].fates != 4).sum()) == 9
        assert session.ask("and what?", max_new_tokens=2).token_ids
        session.reset()
        again = session.ask("where?", session.encode([wide, high]), max_new_tokens=3)
        assert again.token_ids == answer.token_ids
        np.testing.assert_array_equal(again.entered, answer.entered)
