"""Qwen3-VL: tower with learned positions and deepstack features, Qwen3 text model (norms of queries and keys).

Deepstack (arXiv 2406.04334): what the tower has after some of its layers goes through a merger of its own and is added
to the visual rows after the first decoder layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig
from transformers.activations import ACT2FN

from reroute.export import llama, nuwa_grid
from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import Linear, RoutedDecoder
from reroute.export.models import qwen_vl
from reroute.manifest import Grid, Model, VisionModel
from reroute.schedule import Schedule

_EPS = 1e-6


def read(checkpoint: Checkpoint) -> Model:
    """Check config, tensors, tokenizer and processor, and describe the model. Raises UserError."""
    config = parse_config(checkpoint)
    vision = vision_model(config)
    with torch.device("meta"):
        built = Tower(config, vision)
    text = llama.text_model(
        checkpoint,
        config,
        mrope=qwen_vl.mrope(config, interleaved=True),
        qk_norm=True,
        deepstack=len(config.vision_config.deepstack_visual_indexes),
    )
    return qwen_vl.read(
        checkpoint, config, text=text, vision=vision, tower=built, boxes="thousandths", biased=biases(config)
    )


def parse_config(checkpoint: Checkpoint) -> Any:
    """The config, with transformers' defaults filled in. Raises UserError."""
    return qwen_vl.parse_config(checkpoint, Qwen3VLConfig, "Qwen3-VL")


def biases(config: Any) -> frozenset[str]:
    """The decoder's projections that have a bias."""
    return llama.ATTENTION if config.text_config.attention_bias else frozenset()


def vision_model(config: Any) -> VisionModel:
    """Shape of the tower, with a grid of one token."""
    vision = config.vision_config
    return VisionModel(
        image_size=vision.patch_size * vision.spatial_merge_size,
        patch_size=vision.patch_size,
        grid=(1, 1),
        tokens_per_image=1,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        num_layers=vision.depth,
        depth=vision.depth,
        merge=vision.spatial_merge_size,
        class_token=False,
        mergers=1 + len(vision.deepstack_visual_indexes),
    )


class Mlp(nn.Module):
    """Two layers with a bias: the MLP of the tower, and the maps of its mergers."""

    def __init__(self, width: int, inner: int, out: int, activation: Any) -> None:
        super().__init__()
        self.linear_fc1 = Linear(width, inner, bias=True)
        self.linear_fc2 = Linear(inner, out, bias=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, C] to [M, P, out]."""
        return self.linear_fc2(self.activation(self.linear_fc1(x)))


class Merger(Mlp):
    """Norm and map of `merge` x `merge` patches; those of deepstack norm them together (`after`)."""

    def __init__(self, width: int, out: int, merge: int, *, after: bool) -> None:
        wide = width * merge**2
        super().__init__(wide, wide, out, nn.GELU())
        self.wide, self.after = wide, after
        self.norm = nn.LayerNorm(wide if after else width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, C] to [M, N, D]."""
        x = x if self.after else self.norm(x)
        x = x.reshape(x.shape[0], -1, self.wide)
        return super().forward(self.norm(x) if self.after else x)


class Tower(qwen_vl.GridTower):
    """Also returns what is added after the first decoder layers: float [E, M, N, D]."""

    outputs = ("visual_embeds", "visual_deepstack")

    def __init__(self, config: Any, model: VisionModel) -> None:
        vision, width = config.vision_config, model.hidden_size
        # Before the tables of the grids are made, which need it.
        self.side = int(vision.num_position_embeddings**0.5)
        norm = partial(nn.LayerNorm, width, eps=_EPS)
        activation = ACT2FN[vision.hidden_act]
        blocks = [
            qwen_vl.Block(norm, Mlp(width, model.intermediate_size, width, activation), width, model.num_heads)
            for _ in range(model.depth)
        ]
        merger = partial(Merger, width, vision.out_hidden_size, model.merge)
        super().__init__(
            model,
            theta=float(vision.rope_parameters["rope_theta"]),
            embed=qwen_vl.PatchEmbed(model.patch_size, width, bias=True),
            blocks=blocks,
            merger=merger(after=False),
        )
        self.pos_embed = nn.Embedding(vision.num_position_embeddings, width)
        self.indexes = tuple(vision.deepstack_visual_indexes)
        self.deepstack_merger_list = nn.ModuleList(merger(after=True) for _ in self.indexes)
        self.features: list[Tensor] = []

    def prepare(self, grid: Grid) -> None:
        """Also the four learned positions around each patch, and their weights."""
        super().prepare(grid)
        order, _ = qwen_vl.window_order(grid, 0)
        merge = self.vision.merge
        axes = []
        for places, length in zip(qwen_vl.patch_places(grid, merge, order), grid, strict=True):
            # From corner to corner: the first patch at the first learned position, the last at the last.
            at = places.astype(np.float32) * np.float32(self.side - 1) / np.float32(max(length * merge - 1, 1))
            low = np.floor(at).astype(np.int64)
            taps = np.stack([low, low + 1], axis=1).clip(0, self.side - 1)
            axes.append((taps, np.stack([1 - (at - low), at - low], axis=1).astype(np.float32)))
        (rows, row_weights), (columns, column_weights) = axes
        index = (rows[:, :, None] * self.side + columns[:, None, :]).reshape(-1, 4)
        weight = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4, 1)
        for name, table in (("index", index), ("weight", weight)):
            self.register_buffer(f"{name}_{grid[0]}x{grid[1]}", torch.from_numpy(table), persistent=False)

    def embed(self, patches: Tensor, grid: Grid) -> Tensor:
        """Adds the learned positions, interpolated to the grid."""
        positions = (self.pos_embed(self.table("index", grid)) * self.table("weight", grid)).sum(1)
        return self.patch_embed(patches) + positions

    def collect(self, x: Tensor, index: int) -> None:
        """Keep what goes to the decoder's layers."""
        if index in self.indexes:
            merger: Any = self.deepstack_merger_list[self.indexes.index(index)]
            self.features.append(merger(x))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel values [M, 3, H, W] to visual tokens [M, N, D] and deepstack features [E, M, N, D]."""
        self.features = []
        tokens = super().forward(pixel_values)
        features, self.features = torch.stack(self.features), []
        return tokens, features


def build_decoder(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> RoutedDecoder:
    """The routed decoder with its weights."""
    return qwen_vl.build_decoder(checkpoint, model, schedule, biases(parse_config(checkpoint)))


def build_vision(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> nn.Module:
    """The tower for the model's grids, with its weights; with Nüwa's first stage where the schedule has it."""
    with torch.device("meta"):
        built = Tower(parse_config(checkpoint), model.vision)
    return nuwa_grid.with_first_stage(qwen_vl.load_tower(checkpoint, built), schedule)
