"""The packed training forward gives the logits of the transformers model, question by question."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from demo.data import BatchSpec, make_batch
from demo.model import MEAN, STD, build_model
from demo.packed import Packed
from demo.tokenizer import BOS, IMAGE, encode_words
from demo.train import grow
from demo.waiting import BUDGETS, CANDIDATES, waiting


def test_packed_forward_equals_transformers() -> None:
    """Two-turn slots, all visual tokens, fp32: every answer row agrees to 1e-4."""
    model = build_model(layers=3, tower_layers=2).eval()
    batch = make_batch(BatchSpec(seed=0, images=2, low=2, high=4, slots=3, turns=2), 0)
    pixels, ids = torch.from_numpy(batch["pixels"]), torch.from_numpy(batch["ids"])
    packed = Packed(model)
    with torch.no_grad():
        ours, _ = packed.answers(packed.visual(pixels), torch.from_numpy(batch["keep"]), ids)
        normal = ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        for b in range(2):
            for s in range(3):
                full = torch.tensor([[BOS, *encode_words("user:"), *[IMAGE] * 576, *ids[b, s].tolist()]])
                out = model(input_ids=full, pixel_values=normal[b : b + 1]).logits[0, 578:]
                assert (out - ours[b, s]).abs().max() < 1e-4


def test_batches_are_a_function_of_seed_and_step() -> None:
    """Two makings of a step agree; different steps differ."""
    spec = BatchSpec(seed=3, images=2, low=1, high=7, slots=4, keep=192)
    a, b, c = make_batch(spec, 5), make_batch(spec, 5), make_batch(spec, 6)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["pixels"], c["pixels"])


def test_rows_that_wait_are_unseen_and_come_back() -> None:
    """A stage from layer 0 on is a smaller image; rows that wait out a layer that does nothing have missed nothing."""
    model = build_model(layers=3, tower_layers=2).eval()
    idle: Any = model.model.language_model.layers[1]
    batch = make_batch(BatchSpec(seed=0, images=2, low=2, high=4, slots=3), 0)
    ids, keep = torch.from_numpy(batch["ids"]), torch.from_numpy(batch["keep"])
    some = torch.stack([torch.randperm(576)[:40].sort().values for _ in range(2)])
    packed = Packed(model)
    with torch.no_grad():
        visual = packed.visual(torch.from_numpy(batch["pixels"]))
        small, _ = packed.answers(visual, some, ids)
        staged, _ = packed.answers(visual, keep, ids, stages={0: some})
        assert (small - staged).abs().max() < 1e-4
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        dense, _ = packed.answers(visual, keep, ids)
        back, _ = packed.answers(visual, keep, ids, stages={1: some, 2: keep})
        assert (dense - back).abs().max() < 1e-4


def test_random_waiting() -> None:
    """Processes share the layers and the numbers of rows, not the rows; rows are distinct and ascending."""
    owner = torch.from_numpy(make_batch(BatchSpec(seed=0, images=2, low=2, high=4, slots=0), 0)["owner"])
    first, second = (waiting(1, 5, rank, 1.0, owner, 24) for rank in (0, 1))
    assert first is not None
    assert second is not None
    assert {k: v.shape for k, v in first[1].items()} == {k: v.shape for k, v in second[1].items()}
    assert not torch.equal(first[0], second[0])
    assert all((rows.diff() > 0).all() for rows in (first[0], *first[1].values()))
    assert all(rows.shape[1] in BUDGETS and rows.max() < CANDIDATES for rows in first[1].values())
    assert waiting(1, 5, 0, 0.0, owner, 24) is None


def test_moved_layers_answer_as_before() -> None:
    """Layers pulled out and put elsewhere give the same logits while the new ones between them do nothing."""
    model: Any = build_model(layers=3, tower_layers=2).eval()
    batch = make_batch(BatchSpec(seed=0, images=1, low=2, high=4, slots=2), 0)
    pixels, ids, keep = (torch.from_numpy(batch[k]) for k in ("pixels", "ids", "keep"))
    late = grow(model, 5, [2, 4], fresh=1, pull="0,2").eval()
    del model.model.language_model.layers[1]
    with torch.no_grad():
        before, after = (p.answers(p.visual(pixels), keep, ids)[0] for p in (Packed(model), Packed(late)))
    assert (before - after).abs().max() < 1e-5
    first, second = (late.model.language_model.layers[i].self_attn.q_proj.weight for i in (0, 1))
    assert not torch.equal(first, second)
