"""Qwen2.5-VL (arXiv 2502.13923): a tower of windows, RMS norms and gated MLPs; a Qwen2 text model (biases, M-RoPE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.activations import ACT2FN

from reroute.export import llama, nuwa_grid
from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import Linear, Norm, RoutedDecoder
from reroute.export.models import qwen_vl
from reroute.manifest import Model, VisionModel
from reroute.schedule import Schedule

BIASED = frozenset({"q_proj", "k_proj", "v_proj"})
_EPS = 1e-6


def read(checkpoint: Checkpoint) -> Model:
    """Check config, tensors, tokenizer and processor, and describe the model. Raises UserError."""
    config = parse_config(checkpoint)
    vision = vision_model(config)
    with torch.device("meta"):
        built = tower(config, vision)
    text = llama.text_model(checkpoint, config, mrope=qwen_vl.mrope(config))
    return qwen_vl.read(checkpoint, config, text=text, vision=vision, tower=built, boxes="pixels", biased=BIASED)


def parse_config(checkpoint: Checkpoint) -> Any:
    """The config, with transformers' defaults filled in. Raises UserError."""
    return qwen_vl.parse_config(checkpoint, Qwen2_5_VLConfig, "Qwen2.5-VL")


def vision_model(config: Any) -> VisionModel:
    """Shape of the tower, with a grid of one token."""
    vision = config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size
    return VisionModel(
        image_size=cell,
        patch_size=vision.patch_size,
        grid=(1, 1),
        tokens_per_image=1,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        num_layers=vision.depth,
        depth=vision.depth,
        merge=vision.spatial_merge_size,
        window=vision.window_size // cell,
        full_layers=len(vision.fullatt_block_indexes),
        class_token=False,
        gated_mlp=True,
        mergers=1,
    )


class Mlp(nn.Module):
    """The gated MLP of the tower."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=True)
        self.up_proj = Linear(width, inner, bias=True)
        self.down_proj = Linear(inner, width, bias=True)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, C] to the same."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def tower(config: Any, model: VisionModel) -> qwen_vl.GridTower:
    """The tower for the grids of `model`, without weights."""
    vision, width = config.vision_config, model.hidden_size
    blocks = [
        qwen_vl.Block(
            lambda: Norm(width, _EPS),
            Mlp(width, model.intermediate_size, vision.hidden_act),
            width,
            model.num_heads,
        )
        for _ in range(model.depth)
    ]
    return qwen_vl.GridTower(
        model,
        theta=float(vision.rope_parameters["rope_theta"]),
        embed=qwen_vl.PatchEmbed(model.patch_size, width, bias=False),
        blocks=blocks,
        merger=qwen_vl.Merger(Norm(width, _EPS), width, vision.out_hidden_size, model.merge),
        full=vision.fullatt_block_indexes,
    )


def build_decoder(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> RoutedDecoder:
    """The routed decoder with its weights."""
    return qwen_vl.build_decoder(checkpoint, model, schedule, BIASED)


def build_vision(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> nn.Module:
    """The tower for the model's grids, with its weights; with Nüwa's first stage where the schedule has it."""
    with torch.device("meta"):
        built = tower(parse_config(checkpoint), model.vision)
    return nuwa_grid.with_first_stage(qwen_vl.load_tower(checkpoint, built), schedule)
