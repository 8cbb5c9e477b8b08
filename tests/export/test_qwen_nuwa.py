"""Nüwa for Qwen-VL: the first stage against an independent statement in loops and float64, and against transformers'
own attentions and hidden states; the decoder on what is left, against transformers' with the same rows.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reroute.errors import UserError
from reroute.export import resolve
from reroute.export.checkpoint import Checkpoint
from reroute.export.grids import with_grids
from reroute.export.models import family_of
from reroute.export.nuwa_grid import candidates_per_region, misread, reach, similar_layers
from reroute.export.reference import RecordingDecoder, Visual, encode, run_grids
from reroute.manifest import Grid
from tests.export.test_qwen import PROMPTS, flat_patches, pixels_of, thw
from tests.qwen import CELL, GRIDS, IMAGE_TOKEN, KINDS, Kind, make_qwen, model_class

# Candidates of a region, share that leaves the tower, share of those that stays: the three settings of the code.
TIERS = {".35": (3, 0.42), ".6": (3, 0.66), ".85": (4, 0.7)}
KEPT = {".35": ".147", ".6": ".396", ".85": ".595"}
SCORED = "score=previous:rows=3:heads=max"


def independent_choice(salience: np.ndarray, grid: Grid, per_region: int, keep: int) -> list[int]:
    """The K most salient of the n most salient tokens of each 2 x 2 region of the grid padded with zeros."""
    rows, columns = (length + length % 2 for length in grid)
    padded = np.zeros((rows, columns))
    padded[: grid[0], : grid[1]] = salience.reshape(grid)
    candidates: list[tuple[float, int, int]] = []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            cells = [(-padded[y, x], y, x) for y in (top, top + 1) for x in (left, left + 1)]
            candidates += sorted(cells)[:per_region]
    best = sorted(candidates)[:keep]
    return sorted(y * grid[1] + x for _, y, x in best if y < grid[0] and x < grid[1])


def independent_tokens(
    features: np.ndarray, similar: np.ndarray, salience: np.ndarray, kept: list[int], grid: Grid
) -> np.ndarray:
    """The least salient tenth of the kept becomes a weighted mean of all tokens."""
    high, wide = (length + length % 2 for length in grid)
    farthest = 0.8 * math.sqrt((high - 1) ** 2 + (wide - 1) ** 2)
    threshold = np.quantile(salience[kept], 0.1)
    rows = []
    for i in kept:
        if salience[i] >= threshold:
            rows.append(features[i])
            continue
        weights = np.zeros(len(features))
        for j in range(len(features)):
            cosine = similar[i] @ similar[j] / np.linalg.norm(similar[i]) / np.linalg.norm(similar[j])
            distance = math.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1])
            weights[j] = max(0.0, cosine) * (1 - min(1.0, distance / farthest))
        rows.append(weights @ features / (weights.sum() + 1e-8))
    return np.stack(rows)


class Theirs:
    """transformers' model in float64, with the attention matrices and hidden states of its tower."""

    def __init__(self, folder: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind: Kind = kind
        self.model: Any = (
            model_class(kind).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        )
        self.visual = self.model.model.visual
        self.matrices: list[torch.Tensor] = []
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        eager = module.eager_attention_forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            output, weights = eager(*args, **kwargs)
            self.matrices.append(weights)
            return output, weights

        monkeypatch.setattr(module, "eager_attention_forward", watched)

    @torch.no_grad()
    def tower(self, pixels: torch.Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
        """Tokens [N, D] row-major, similarity [N, D] as the code has it, salience [N], deepstack features."""
        self.matrices.clear()
        states: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(lambda _m, _a, out: states.append(out)) for block in self.visual.blocks]
        out = self.model.model.get_image_features(flat_patches(pixels.double(), grid), thw([grid]))
        for hook in hooks:
            hook.remove()
        depth = len(states)
        middle = torch.stack(states[depth * 7 // 32 : depth * 23 // 32 + 1]).mean(0)
        columns = self.matrices[-1][0].mean(0).sum(0).view(-1, 4).mean(1)
        order = torch.arange(grid[0] * grid[1])
        if self.kind == "qwen2_5_vl":
            from transformers.vision_utils import get_vision_window_index

            order = get_vision_window_index(thw([grid]), 2, 2 * CELL, CELL // 2)[0]
        deepstack = getattr(out, "deepstack_features", None)
        similar = self.visual.merger(middle)  # left in the order of the windows
        return out.pooler_output[0].numpy(), similar.numpy(), columns[torch.argsort(order)].numpy(), deepstack

    @torch.no_grad()
    def text(self, embeds: torch.Tensor, at: torch.Tensor, is_visual: torch.Tensor, deepstack: Any) -> torch.Tensor:
        """Logits [S, V] of rows [S, D] at positions [S, 3]; `matrices` then has each layer's attention."""
        self.matrices.clear()
        more = {}
        if deepstack is not None:
            more = {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": list(deepstack)}
        out = self.model.model.language_model(
            inputs_embeds=embeds[None], position_ids=at.T[:, None], use_cache=False, **more
        )
        return self.model.lm_head(out.last_hidden_state[0])


class Ours:
    """A checkpoint's decoder and tower with Nüwa in torch."""

    def __init__(self, folder: Path, routing: str) -> None:
        opened = Checkpoint.open(folder)
        family = family_of(opened)
        self.model = with_grids(family.read(opened), GRIDS)
        self.schedule = resolve(routing, self.model)
        self.decoder = family.build_decoder(opened, self.model, self.schedule)
        self.tower: Any = family.build_vision(opened, self.model, self.schedule)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("qwen-nuwa")
    return {kind: make_qwen(root / kind, kind, full=(0, 2)) for kind in KINDS}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_transformers_with_the_independent_first_stage(
    kind: Kind, tier: str, folders: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images in one batch, on grids with even and with odd sides, whole and cut windows."""
    ours = Ours(folders[kind], f"removal@3:nuwa={tier}:keep={KEPT[tier]}:{SCORED}")
    theirs = Theirs(folders[kind], kind, monkeypatch)
    collectors = 0
    for grid in GRIDS:
        pixels = [*pixels_of([grid], 3), *pixels_of([grid], 4)]
        made = encode(ours.tower, torch.cat(pixels))
        assert made.places is not None
        for index, one in enumerate(pixels):
            features, similar, salience, deepstack = theirs.tower(one, grid)
            assert ours.tower.salience(states_of(ours, one)[-2], grid)[0].numpy() == pytest.approx(salience, abs=1e-5)
            keep = math.ceil(grid[0] * grid[1] * float(tier))
            kept = independent_choice(salience, grid, TIERS[tier][0], keep)
            assert len(kept) == keep
            assert made.places[index].tolist() == kept
            wanted = independent_tokens(features, similar, salience, kept, grid)
            np.testing.assert_allclose(made.embeds[index].numpy(), wanted, atol=1e-4)
            collectors += int((np.abs(wanted - features[kept]).max(axis=1) > 1e-3).sum())
            if deepstack is not None:
                assert made.deepstack is not None
                for have, (want,) in zip(made.deepstack, deepstack, strict=True):
                    np.testing.assert_allclose(have[index].numpy(), want[kept].numpy(), atol=1e-4)
    assert collectors > 0


def states_of(ours: Ours, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What the tower has behind each layer."""
    inner = ours.tower.tower
    inner.states = states = []
    with torch.no_grad():
        inner(pixels)
    inner.states = None
    return states


@pytest.mark.parametrize("prompt", ["wide", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_ranks_as_transformers_attention_says(
    kind: Kind, prompt: str, folders: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are left, at their places' positions, in transformers' decoder: the mean of the last three rows of
    layer 2's attention, the largest of all heads, says what a decision at layer 3 keeps; with nothing more removed the
    logits are transformers', also those of a token that follows.
    """
    theirs = Theirs(folders[kind], kind, monkeypatch)
    ids, grids = PROMPTS[prompt]
    pixels = pixels_of(grids)
    routed = Ours(folders[kind], f"removal@3:nuwa=.6:keep=.396:{SCORED}")
    visuals = [encode(routed.tower, one) for one in pixels]
    run = RecordingDecoder(routed.decoder, capacity=80)
    output = run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, visuals)

    embeds, at, is_visual, deepstack, after = rows_of(theirs, ids, grids, visuals)
    theirs.text(embeds, at, is_visual, deepstack)
    scores = theirs.matrices[2][0][:, -3:].mean(1).amax(0)
    places = torch.where(is_visual)[0]
    keep = int(len(places) * 0.66)
    best = places[scores[places].argsort(descending=True)[:keep]]
    expected = torch.cat([torch.where(~is_visual)[0], best]).sort().values
    assert output.routes[0][0].tolist() == expected.tolist()
    plain = theirs.matrices[2][0][:, -1].mean(0)
    assert set(best.tolist()) != set(places[plain[places].argsort(descending=True)[:keep]].tolist())

    whole = Ours(folders[kind], f"removal@3:nuwa=.6:keep=.6:{SCORED}")
    run = RecordingDecoder(whole.decoder, capacity=80)
    output = run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, visuals)
    logits = [output.logits[0], run.decode(77).logits[0]]
    embeds = torch.cat([embeds, theirs.model.get_input_embeddings()(torch.tensor([77]))])
    at = torch.cat([at, torch.full((1, 3), after)])
    wanted = theirs.text(embeds, at, torch.cat([is_visual, torch.zeros(1, dtype=torch.bool)]), deepstack)
    np.testing.assert_allclose(torch.stack(logits), wanted[-2:], atol=1e-4)


@torch.no_grad()
def rows_of(
    theirs: Theirs, ids: list[int], grids: list[Grid], visuals: list[Visual]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, int]:
    """Rows that enter the decoder, their positions by transformers, which are visual, deepstack, next position."""
    left = iter(grids)
    wide = [i for t in ids for i in ([t] * math.prod(next(left)) if t == IMAGE_TOKEN else [t])]
    tensor = torch.tensor([wide])
    at, delta = theirs.model.model.get_rope_index(tensor, (tensor == IMAGE_TOKEN).int(), image_grid_thw=thw(grids))
    is_image = tensor[0] == IMAGE_TOKEN
    rows = theirs.model.get_input_embeddings()(tensor)[0]
    stays = ~is_image
    done = 0
    slots = torch.where(is_image)[0]
    for grid, visual in zip(grids, visuals, strict=True):
        assert visual.places is not None
        kept = slots[done + visual.places[0]]
        done += math.prod(grid)
        stays[kept] = True
        rows[kept] = visual.embeds[0].double()
    deepstack = None
    if visuals[0].deepstack is not None:
        deepstack = torch.cat(
            [visual.deepstack[:, 0] for visual in visuals if visual.deepstack is not None], 1
        ).double()
    return rows[stays], at[:, 0].T[stays], is_image[stays], deepstack, len(wide) + int(delta)


@pytest.mark.parametrize("grid", [*GRIDS, (24, 24), (18, 32), (1, 9), (9, 14)])
def test_the_order_in_which_similarity_is_read_is_that_of_transformers_windows(grid: Grid) -> None:
    from transformers.vision_utils import get_vision_window_index

    order = get_vision_window_index(thw([grid]), 2, 112, 14)[0]
    assert misread(grid, 4).tolist() == order.tolist()
    assert misread(grid, 0).tolist() == list(range(grid[0] * grid[1]))


def test_the_published_settings() -> None:
    assert similar_layers(32) == range(7, 24)
    assert reach((24, 24)) == pytest.approx(0.8 * 23 * math.sqrt(2))
    assert reach((19, 24)) == pytest.approx(0.8 * math.hypot(19, 23))
    for share, per_region in ((0.35, 3), (0.6, 3), (0.85, 4)):
        for count in (576, 540, 144, 9):
            assert candidates_per_region(count, math.ceil(count * share)) == per_region


def test_a_tower_whose_last_layer_has_windows_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_qwen(tmp_path / "model", full=(1,))
    with pytest.raises(UserError, match="attention of the last of 3 layers, which is within windows"):
        Ours(folder, "nuwa:avg=1/3")
