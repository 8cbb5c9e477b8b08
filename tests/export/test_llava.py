"""LLaVA checkpoints against transformers' own `LlavaForConditionalGeneration`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from reroute import scenario
from reroute.export import read_model, resolve
from reroute.export.checkpoint import Checkpoint, canonical_name
from reroute.export.models import family_of
from reroute.export.reference import RecordingDecoder, place_image, record
from tests.conftest import TinyLlava, make_llava

SIZES = {
    "grouped": TinyLlava(),
    "multi-head": TinyLlava(kv_heads=4),
    "tied": TinyLlava(tied=True),
    "biased": TinyLlava(attention_bias=True),
    "all-patches": TinyLlava(strategy="full"),
    "two-feature-layers": TinyLlava(feature_layer=(-2, -1)),
    "mistral": TinyLlava(text="mistral"),
    "qwen2": TinyLlava(text="qwen2"),
    "qwen3": TinyLlava(text="qwen3"),
    "as-13b": TinyLlava(layers=5, hidden=80, heads=5, kv_heads=5),
    "sharded": TinyLlava(max_shard_size="200KB"),
}


@pytest.mark.parametrize("name", SIZES)
def test_keeping_everything_equals_transformers(name: str, tmp_path: Path) -> None:
    """keep = 1 everywhere: prompt and greedy tokens of HF's model, vision features of its tower."""
    folder = make_llava(tmp_path / "checkpoint", SIZES[name])
    _compare_with_transformers(folder, "reroute@1,3:keep=1.0,1.0", tokens=16)


def test_an_lm_head_of_its_own_wins_over_a_config_that_ties(tmp_path: Path) -> None:
    """transformers does not tie two tensors that differ, whatever config.json says."""
    folder = make_llava(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    _compare_with_transformers(folder, "reroute@1,3:keep=1.0,1.0", tokens=4)


@pytest.mark.slow
def test_demo_model_equals_transformers(demo_checkpoint: Path) -> None:
    _compare_with_transformers(demo_checkpoint, "reroute@2,7,15,23:keep=1.0,1.0,1.0,1.0", tokens=64)


def _compare_with_transformers(folder: Path, routing: str, *, tokens: int) -> None:
    opened = Checkpoint.open(folder)
    family = family_of(opened)
    model = family.read(opened)
    decoder = family.build_decoder(opened, model, resolve(routing, model))
    tower = family.build_vision(opened, model, decoder.schedule)
    inputs = scenario.probe(model, num_tokens=tokens)
    ours = record(decoder, tower, model, inputs)

    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.from_numpy(inputs.pixel_values)
    wide = np.repeat(
        inputs.prompt_ids,
        np.where(inputs.prompt_ids == model.tokens.image_token_id, model.vision.tokens_per_image, 1),
    )
    ids = torch.from_numpy(wide)[None]
    with torch.no_grad():
        features = theirs.model.get_image_features(pixels).pooler_output[0]
        np.testing.assert_allclose(ours["visual_embeds"][0], features.numpy(), atol=1e-5)
        logits = theirs(input_ids=ids, pixel_values=pixels).logits[:, -1]
        np.testing.assert_allclose(ours["prompt.logits"], logits.numpy(), atol=1e-4)
        generated = theirs.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
        )
    np.testing.assert_array_equal(ours["tokens"], generated[0, -tokens:].numpy())


def test_removal_and_reroute_change_the_answer_of_a_real_model(tiny_checkpoint: Path) -> None:
    """The two actions really differ on one checkpoint, and both from dense: nothing is silently dense."""
    opened = Checkpoint.open(tiny_checkpoint)
    family = family_of(opened)
    model = family.read(opened)
    inputs = scenario.probe(model)
    ids, text_slots, visual_slots = place_image(
        inputs.prompt_ids, model.tokens.image_token_id, model.vision.tokens_per_image
    )
    embeds = family.build_vision(opened, model, resolve("dense", model))(torch.from_numpy(inputs.pixel_values))
    logits = {}
    for routing in ("dense", "removal@1,3,5:keep=6,4,2", "reroute@1,3,5:keep=6,4,2"):
        decoder = family.build_decoder(opened, model, resolve(routing, model))
        logits[routing] = RecordingDecoder(decoder, 80).step(ids, embeds, text_slots, visual_slots).logits
    values = list(logits.values())
    assert not torch.allclose(values[0], values[1], atol=1e-3)
    assert not torch.allclose(values[0], values[2], atol=1e-3)
    assert not torch.allclose(values[1], values[2], atol=1e-3)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    ],
)
def test_every_generation_of_the_layout_has_one_name(key: str, name: str) -> None:
    assert canonical_name(key) == name


def test_parameters_are_counted_by_part(tiny_checkpoint: Path) -> None:
    """Decoder and vision counts are HF's, less the tower's unused last layer and norm."""
    model = read_model(tiny_checkpoint)
    theirs = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    text = sum(p.numel() for n, p in theirs.named_parameters() if "vision" not in n and "projector" not in n)
    assert model.num_parameters["decoder"] == text
    last = sum(p.numel() for n, p in theirs.named_parameters() if "encoder.layers.2." in n or "post_layernorm" in n)
    vision = sum(p.numel() for n, p in theirs.named_parameters() if "vision" in n or "projector" in n)
    assert model.num_parameters["vision"] == vision - last
