"""The packed training forward gives the logits of the transformers model, question by question."""

from __future__ import annotations

import numpy as np
import torch

from demo.data import BatchSpec, make_batch
from demo.model import MEAN, STD, build_model
from demo.packed import Packed
from demo.tokenizer import BOS, IMAGE, encode_words


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
