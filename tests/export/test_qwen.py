"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints against transformers' own models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reroute.errors import UserError
from reroute.export import read_model, resolve
from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import Output, RoutedDecoder
from reroute.export.grids import parse_grids, with_grids
from reroute.export.models import family_of
from reroute.export.models.qwen_vl import default_grids, window_order
from reroute.export.reference import RecordingDecoder, Visual, encode, mrope_offsets, run_grids
from reroute.manifest import Grid, GridProcessing, Model, MRope
from tests.qwen import CELL, GRIDS, IMAGE_TOKEN, KINDS, LAYERS, Kind, make_qwen, model_class

KEEP_ALL = "reroute@1,2,4:keep=1.0,1.0,1.0"
# Three images would be more than two grids show; the second prompt has the images the other way round.
PROMPTS: dict[str, tuple[list[int], list[Grid]]] = {
    "wide": ([8, 1, 3, IMAGE_TOKEN, 4, 20, 30], [(4, 6)]),
    "high": ([8, 1, 3, IMAGE_TOKEN, 4, 20, 30], [(5, 3)]),
    "text": ([8, 1, 20, 30, 40], []),
    "two": ([8, 3, IMAGE_TOKEN, 4, 20, 3, IMAGE_TOKEN, 4, 50, 60], [(5, 3), (4, 6)]),
}


class Ours:
    """A checkpoint's decoder and tower in torch."""

    def __init__(self, folder: Path, routing: str) -> None:
        opened = Checkpoint.open(folder)
        family = family_of(opened)
        self.model: Model = with_grids(family.read(opened), GRIDS)
        self.decoder: RoutedDecoder = family.build_decoder(opened, self.model, resolve_for(routing, self.model))
        self.tower = family.build_vision(opened, self.model, self.decoder.schedule)

    def prompt(self, ids: list[int], grids: list[Grid], pixels: list[torch.Tensor]) -> tuple[RecordingDecoder, Output]:
        run = RecordingDecoder(self.decoder, capacity=200)
        visuals = [encode(self.tower, one) for one in pixels]
        return run, run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, visuals)


def resolve_for(routing: str, model: Model) -> Any:
    return resolve(routing, model)


class Theirs:
    """transformers' model, fed with the same pixels."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.model: Any = model_class(kind).from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, grid: Grid) -> Any:
        return self.model.model.get_image_features(flat_patches(pixels, grid), thw([grid]))

    @torch.no_grad()
    def logits(self, ids: list[int], grids: list[Grid], pixels: list[torch.Tensor]) -> torch.Tensor:
        """[S, V] of token ids with one placeholder for each image."""
        left = list(grids)
        wide: list[int] = []
        for token in ids:
            count = 1
            if token == IMAGE_TOKEN:
                rows, columns = left.pop(0)
                count = rows * columns
            wide += [token] * count
        tensor = torch.tensor([wide])
        images: dict[str, Any] = {}
        if grids:
            patches = [flat_patches(one, grid) for one, grid in zip(pixels, grids, strict=True)]
            images = {"pixel_values": torch.cat(patches), "image_grid_thw": thw(grids)}
            images["mm_token_type_ids"] = (tensor == IMAGE_TOKEN).int()
        return self.model(input_ids=tensor, **images).logits[0]


def flat_patches(pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[1, 3, H, W] to the patches [P, 3 * 2 * p * p] that transformers' processor makes."""
    patch = CELL // 2
    x = pixels[0].reshape(3, grid[0], 2, patch, grid[1], 2, patch).permute(1, 4, 2, 5, 0, 3, 6)
    x = x[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(-1, 3 * 2 * patch**2)


def thw(grids: list[Grid]) -> torch.Tensor:
    return torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])


def pixels_of(grids: list[Grid], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, rows * CELL, columns * CELL, generator=generator) for rows, columns in grids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("qwen")
    return {kind: make_qwen(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Ours, Theirs]:
    folder = folders[request.param]
    return Ours(folder, KEEP_ALL), Theirs(folder, request.param)


@pytest.mark.parametrize("grid", GRIDS)
def test_vision_features_are_transformers(pair: tuple[Ours, Theirs], grid: Grid) -> None:
    """Grids with whole and with cut windows; two images of one grid in one batch give what each gives alone."""
    ours, theirs = pair
    pixels = [*pixels_of([grid], 1), *pixels_of([grid], 2)]
    batch = encode(ours.tower, torch.cat(pixels))
    for index, one in enumerate(pixels):
        expected = theirs.features(one, grid)
        np.testing.assert_allclose(batch.embeds[index], expected.pooler_output[0], atol=1e-5)
        if ours.model.text.deepstack:
            assert batch.deepstack is not None
            for made, (wanted,) in zip(batch.deepstack, expected.deepstack_features, strict=True):
                np.testing.assert_allclose(made[index], wanted, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_keeping_everything_equals_transformers(pair: tuple[Ours, Theirs], prompt: str) -> None:
    """Prompt, 16 decode steps and a second turn of text; the positions behind an image are part of it."""
    ours, theirs = pair
    ids, grids = PROMPTS[prompt]
    pixels = pixels_of(grids)
    run, output = ours.prompt(ids, grids, pixels)
    logits, answer = [output.logits[0]], []
    for _ in range(16):
        answer.append(int(logits[-1].argmax()))
        logits.append(run.decode(answer[-1]).logits[0])
    turn = [21, 31, 41]
    logits.append(run.run_text(torch.tensor([turn])).logits[0])
    expected = theirs.logits([*ids, *answer, *turn], grids, pixels)
    np.testing.assert_allclose(torch.stack(logits[:-1]), expected[-len(turn) - 17 : -len(turn)], atol=1e-4)
    np.testing.assert_allclose(logits[-1], expected[-1], atol=1e-4)


def test_a_second_image_in_a_later_turn(pair: tuple[Ours, Theirs]) -> None:
    ours, theirs = pair
    first, second = [(5, 3)], [(4, 6)]
    ids, more = [8, 3, IMAGE_TOKEN, 4, 20], [22, 3, IMAGE_TOKEN, 4, 9]
    pixels = pixels_of([*first, *second])
    run, _ = ours.prompt(ids, first, pixels[:1])
    visual = encode(ours.tower, pixels[1])
    output = run_grids(run, np.asarray(more), IMAGE_TOKEN, second, [visual])
    expected = theirs.logits([*ids, *more], [*first, *second], pixels)
    np.testing.assert_allclose(output.logits[0], expected[-1], atol=1e-4)


def test_a_wrong_position_is_seen(folders: dict[str, Path]) -> None:
    """The parity above can fail: plain positions instead of rows and columns give other logits."""
    ours, theirs = Ours(folders["qwen2_5_vl"], KEEP_ALL), Theirs(folders["qwen2_5_vl"], "qwen2_5_vl")
    ids, grids = PROMPTS["wide"]
    pixels = pixels_of(grids)
    expected = theirs.logits(ids, grids, pixels)[-1]
    ours.decoder.model = replace(ours.decoder.model, mrope=MRope(sections=(8, 0, 0)))
    _, output = ours.prompt(ids, grids, pixels)
    assert float((output.logits[0] - expected).abs().max()) > 1e-2


def test_positions_are_those_of_transformers(folders: dict[str, Path]) -> None:
    model = Theirs(folders["qwen2_5_vl"], "qwen2_5_vl").model.model
    ids, grids = PROMPTS["two"]
    ours, span = mrope_offsets(np.asarray(ids), IMAGE_TOKEN, grids)
    counts = iter(rows * columns for rows, columns in grids)
    wide = torch.tensor([[i for t in ids for i in [t] * (next(counts) if t == IMAGE_TOKEN else 1)]])
    expected, delta = model.get_rope_index(wide, (wide == IMAGE_TOKEN).int(), image_grid_thw=thw(grids))
    np.testing.assert_array_equal(ours.T, expected[:, 0])
    assert span - wide.shape[1] == int(delta)


def test_interleaved_sections_are_transformers() -> None:
    """Which of the three positions each frequency of Qwen3-VL turns with."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rotary: Any = Qwen3VLTextRotaryEmbedding.__new__(Qwen3VLTextRotaryEmbedding)
    for sections in ((24, 20, 20), (6, 3, 3)):
        half = sum(sections)
        torch.nn.Module.__init__(rotary)
        rotary.mrope_section = list(sections)
        marked = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, half).clone()
        expected = rotary.recomposition_frequencies(marked)[0, 0, :half]
        assert list(MRope(sections=sections, interleaved=True).axes) == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["reroute@1,3:keep=.3,.2", "removal@1,3:keep=.3,.2:pool=image"])
def test_shares_follow_the_prompt(folders: dict[str, Path], kind: Kind, routing: str) -> None:
    """Of N visual tokens max(1, int(N share)) run, in one pool, or in each image."""
    ours = Ours(folders[kind], routing)
    for ids, grids in PROMPTS.values():
        run, output = ours.prompt(ids, grids, pixels_of(grids))
        counts = [rows * columns for rows, columns in grids]
        pools = counts if "pool=image" in routing else [sum(counts)]
        text = len(ids) - len(grids)
        wanted = [sum(min(n, max(1, int(n * share))) for n in pools) for share in (0.3, 0.2)]
        assert [route.shape[1] - text for route in output.routes] == wanted
        assert run.lengths == [text + sum(counts), *(text + rows for rows in wanted)]


def test_tokens_are_the_same_for_every_grid(folders: dict[str, Path]) -> None:
    ours = Ours(folders["qwen2_5_vl"], "reroute@1,3:keep=20,7")
    for name, kept in (("wide", [20, 7]), ("high", [15, 7]), ("two", [20, 7])):
        ids, grids = PROMPTS[name]
        _, output = ours.prompt(ids, grids, pixels_of(grids))
        assert [route.shape[1] - (len(ids) - len(grids)) for route in output.routes] == kept


@pytest.mark.parametrize("action", ["reroute", "removal"])
def test_a_budget_per_image_ranks_each_image_alone(folders: dict[str, Path], action: str) -> None:
    """With a pool for each image, the rows kept of it are the best of it by the recorded scores; with one pool they are
    the best of all, and the two differ.
    """
    ids, grids = PROMPTS["two"]
    pixels = pixels_of(grids)
    chosen = {}
    for pool in ("all", "image"):
        ours = Ours(folders["qwen2_5_vl"], f"{action}@1,3:keep=6,4:pool={pool}")
        run, output = ours.prompt(ids, grids, pixels)
        candidates, scores = run.decisions[0]
        visual = [int(slot) for slot in candidates[0]]
        score_of = dict(zip(visual, scores[0].tolist(), strict=True))
        pools = [visual] if pool == "all" else [visual[:15], visual[15:]]
        best = [slot for one in pools for slot in sorted(one, key=lambda slot: -score_of[slot])[:6]]
        chosen[pool] = sorted(set(output.routes[0][0].tolist()) & set(visual))
        assert chosen[pool] == sorted(best)
        later = [slot for slot in output.routes[1][0].tolist() if slot in score_of]
        assert len(later) == (4 if pool == "all" else 8)
        assert pool == "all" or sum(slot in visual[:15] for slot in later) == 4
    assert set(chosen["all"]) < set(chosen["image"])


def test_deepstack_features_reach_rows_that_wait(folders: dict[str, Path]) -> None:
    """A decision before the last deepstack layer: what waits there has its features when it comes back."""
    ours = Ours(folders["qwen3_vl"], "reroute@1,2:keep=5,24")
    ids, grids = PROMPTS["wide"]
    visual = encode(ours.tower, pixels_of(grids)[0])
    assert visual.deepstack is not None

    def seen(stack: torch.Tensor) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        layer: Any = ours.decoder.layers[2]
        hook = layer.input_norm.register_forward_hook(lambda _module, args, _output: rows.append(args[0][0].clone()))
        run = RecordingDecoder(ours.decoder, capacity=64)
        output = run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, [Visual(visual.embeds, None, stack)])
        hook.remove()
        ran = set(output.routes[0][0].tolist())
        return rows[0][[slot for slot in range(3, 27) if slot not in ran]]

    changed = visual.deepstack.clone()
    changed[1] += 1
    difference = seen(changed) - seen(visual.deepstack)
    assert difference.shape == (24 - 5, 64)
    torch.testing.assert_close(difference, torch.ones_like(difference), atol=1e-5, rtol=0)


def test_windows_cover_every_token_once() -> None:
    for grid in ((24, 24), (18, 32), (5, 3), (1, 9)):
        order, groups = window_order(grid, 4)
        assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
        assert sum(count * size for count, size in groups) == len(order)


def test_default_grids_stay_within_the_processors_pixels() -> None:
    image = GridProcessing(
        cell=28, min_pixels=3136, max_pixels=12845056, resample=3, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
    )
    grids = default_grids(image)
    assert grids == ((24, 24), (20, 27), (27, 20), (18, 32), (32, 18))
    small = default_grids(replace(image, max_pixels=100 * 28 * 28))
    assert all(rows * columns <= 100 for rows, columns in small)


@pytest.mark.parametrize("text", ["24", "24x", "x3", "0x4", "3x3,3x3", "4x4;3x3", "a x b"])
def test_bad_grids_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a grid|occurs twice"):
        parse_grids(text)


def test_what_cannot_be_is_refused_by_name(folders: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grid 100x100 has 640000 pixels, the image processor 256 to 2560"):
        read_model(folders["qwen2_5_vl"], [(100, 100)])
    with pytest.raises(UserError, match="every image of this model has 6 x 6 visual tokens"):
        read_model(tiny_checkpoint, [(3, 3)])
    with pytest.raises(UserError, match="renumbered is not defined for a model with M-RoPE"):
        Ours(folders["qwen2_5_vl"], "removal@1:keep=3:positions=renumbered")
    with pytest.raises(UserError, match="Nüwa cannot prune this tower"):
        Ours(folders["qwen2_5_vl"], "removal@2:nuwa=6:keep=3")
    folder = make_qwen(tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["use_sliding_window"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"sliding window True is not supported in a Qwen2\.5-VL model"):
        read_model(folder)


def test_a_tied_checkpoint(tmp_path: Path) -> None:
    folder = make_qwen(tmp_path / "tied", tied=True)
    ours, theirs = Ours(folder, "dense"), Theirs(folder, "qwen2_5_vl")
    assert ours.model.text.tie_word_embeddings
    ids, grids = PROMPTS["high"]
    pixels = pixels_of(grids)
    _, output = ours.prompt(ids, grids, pixels)
    np.testing.assert_allclose(output.logits[0], theirs.logits(ids, grids, pixels)[-1], atol=1e-4)


def test_the_published_schedules_fit_28_layers() -> None:
    from reroute.published import PUBLISHED
    from reroute.routing import RoutingSpec

    for name in PUBLISHED:
        if name.startswith("qwen25/"):
            schedule = RoutingSpec.parse(f"published:{name}").resolve(num_layers=28, num_visual=576, sizes_vary=True)
            assert schedule.decision_layers in ((3,), (3, 6, 13, 20), (2, 6, 13, 20), (15,))
            assert all(stage.share is not None for stage in schedule.stages[1:])
    assert LAYERS < 28
