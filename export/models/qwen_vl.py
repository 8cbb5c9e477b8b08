"""What the Qwen-VL models share: reading a checkpoint, and a vision tower for a declared set of grids.

The tower (Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, arXiv 2502.13923) takes images of any shape. Which patches attend to
each other and where they stand follows from the grid, so with the grid fixed everything that depends on data is a
constant, and one graph for each grid is traced from one set of weights.

A still image fills both frames of the checkpoint's patch embedding, so the two kernels are added once, at load.
Letters: M images, N visual tokens, P patches (N times merge squared), C tower width, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reroute.errors import UserError
from reroute.export import llama, ops
from reroute.export.checkpoint import Checkpoint, read_json
from reroute.export.decoder import Linear, RoutedDecoder
from reroute.export.grids import with_grids
from reroute.export.weights import Weight, streamed
from reroute.manifest import Boxes, Grid, GridProcessing, Model, MRope, TextModel, VisionModel
from reroute.schedule import Schedule

# Grids that an export has unless it is told others: these shapes with at most so many visual tokens, which is what the
# Reroute paper gives Qwen2.5-VL (max_pixels 451584 = 576 * 28 * 28).
_SHAPES = ((1, 1), (3, 4), (4, 3), (9, 16), (16, 9))
_MAX_TOKENS = 576
# Windows of equal size lie side by side: (how many, tokens of each).
Groups = list[tuple[int, int]]


def parse_config(checkpoint: Checkpoint, kind: Any, name: str) -> Any:
    """The transformers config of class `kind`. Raises UserError for what we do not support, by name."""
    try:
        config: Any = kind.from_dict(checkpoint.config)
    except Exception as error:  # transformers raises many types for a bad config; all are the user's to mend
        raise UserError(f"config.json is not a valid {name} config: {error}", hint="copy config.json again") from error
    llama.refuse_quantized(checkpoint)
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters or {})
    sections = rope.get("mrope_section")
    for what, value, supported in (
        ("text activation", text.hidden_act, "silu"),
        ("rotary type", rope.get("rope_type", "default"), "default"),
        ("sliding window", bool(getattr(text, "use_sliding_window", False)), False),
        ("number of M-RoPE sections", len(sections or ()), 3),
        ("number of colours", vision.in_channels, 3),
    ):
        if value != supported:
            raise UserError(f"the {what} {value!r} is not supported in a {name} model", hint=f"supported: {supported}")
    return config


def read(
    checkpoint: Checkpoint, config: Any, *, text: TextModel, vision: VisionModel, tower: nn.Module, boxes: Boxes,
    biased: Collection[str],
) -> Model:  # fmt: skip
    """Check all tensors, the tokenizer and the processor, and describe the model. Raises UserError.

    Args:
        checkpoint: to read.
        config: its parsed config.
        text: shape of the decoder.
        vision: shape of the tower, with any grid; the default grids are put into it.
        tower: the tower on the meta device.
        boxes: how the model writes boxes.
        biased: projections of the decoder that have a bias.
    """
    if sum(text.mrope.sections if text.mrope else ()) != text.head_dim // 2:
        raise UserError(
            f"the M-RoPE sections {text.mrope and text.mrope.sections} do not add up to half of the head size "
            f"{text.head_dim}",
            hint="config.json is not consistent: copy it again",
        )
    llama.require(checkpoint, text, biased)
    for name, tensor in checkpoint_shapes(tower, config.vision_config).items():
        checkpoint.require(f"visual.{name}", tensor)
    image = processing(checkpoint, vision)
    return with_grids(
        Model(
            model_type=str(checkpoint.config["model_type"]),
            text=text,
            vision=vision,
            image=image,
            tokens=llama.tokens(checkpoint, config),
            num_parameters={
                "decoder": llama.count_parameters(checkpoint),
                "vision": sum(tensor.numel() for tensor in tower.state_dict().values()),
            },
            boxes=boxes,
        ),
        default_grids(image),
    )


def mrope(config: Any, *, interleaved: bool = False) -> MRope:
    """The text model's sections."""
    time, row, column = (int(length) for length in config.text_config.rope_parameters["mrope_section"])
    return MRope(sections=(time, row, column), interleaved=interleaved)


def build_decoder(checkpoint: Checkpoint, model: Model, schedule: Schedule, biased: Collection[str]) -> RoutedDecoder:
    """The routed decoder with its weights. Raises UserError for schedules that these models cannot have."""
    if schedule.positions == "renumbered":
        raise UserError(
            "positions=renumbered is not defined for a model with M-RoPE: a visual token stands at its row and column",
            hint="leave the key away: positions stay what they are",
        )
    return llama.build_decoder(checkpoint, model.text, schedule, biased)


def processing(checkpoint: Checkpoint, vision: VisionModel) -> GridProcessing:
    """Constants of the Qwen2-VL image processor, of which the other two are users. Raises UserError."""
    data = read_json(checkpoint.folder, "preprocessor_config.json")
    data = data or read_json(checkpoint.folder, "processor_config.json").get("image_processor", {})
    if not data:
        raise UserError(f"{checkpoint.folder} holds no preprocessor_config.json", hint="copy the processor files too")
    kind = str(data.get("image_processor_type", "Qwen2VLImageProcessor"))
    if not kind.startswith("Qwen2VLImageProcessor"):
        raise UserError(f"the image processor {kind!r} is not supported", hint="supported: Qwen2VLImageProcessor")
    off = [step for step in ("do_resize", "do_rescale", "do_normalize") if not data.get(step, True)]
    if off:
        raise UserError(f"the image processor has {off[0]}=false", hint="supported: resize, rescale, normalise")
    size = data.get("size") or {}
    try:
        patch, merge = int(data.get("patch_size", 14)), int(data.get("merge_size", 2))
        result = GridProcessing(
            cell=patch * merge,
            min_pixels=int(data.get("min_pixels") or size.get("shortest_edge") or size["min_pixels"]),
            max_pixels=int(data.get("max_pixels") or size.get("longest_edge") or size["max_pixels"]),
            resample=int(data.get("resample", 3)),
            rescale_factor=float(data.get("rescale_factor", 1 / 255)),
            mean=llama.three(data, "image_mean"),
            std=llama.three(data, "image_std"),
        )
    except (TypeError, ValueError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"the image processor's settings are not valid: {what}", hint="copy preprocessor_config.json again"
        ) from error
    if (patch, merge) != (vision.patch_size, vision.merge):
        raise UserError(
            f"the image processor cuts patches of {patch} pixels and merges {merge} a side, the tower "
            f"{vision.patch_size} and {vision.merge}",
            hint="preprocessor_config.json and config.json do not match",
        )
    return result


def default_grids(image: GridProcessing) -> tuple[Grid, ...]:
    """The usual shapes, as large as the processor and `_MAX_TOKENS` allow; the most tokens first."""
    most = min(_MAX_TOKENS, image.max_pixels // image.cell**2)
    least = -(-image.min_pixels // image.cell**2)
    grids: list[Grid] = []
    for high, wide in _SHAPES:
        rows = max(1, math.isqrt(most * high // wide))
        columns = max(1, min(most // rows, round(rows * wide / high)))
        if rows * columns >= least and (rows, columns) not in grids:
            grids.append((rows, columns))
    return tuple(grids)


class Attention(nn.Module):
    """Attention of patches within their group, with rotary embeddings of row and column."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=True)
        self.proj = Linear(width, width, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        """[M, P, C] to the same; cos and sin [P, d/2]."""
        q, k, v = self.project(x, cos, sin)
        outputs, start = [], 0
        for count, length in groups:
            stop = start + count * length
            queries, keys, values = (
                t[:, start:stop].reshape(-1, length, self.heads, t.shape[2] // self.heads).transpose(1, 2)
                for t in (q, k, v)
            )
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
            outputs.append(mixed.transpose(1, 2).reshape(-1, count * length, x.shape[2]))
            start = stop
        return self.proj(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0])

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values [M, P, C]."""
        slots = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (ops.rotary(part.contiguous(), cos, sin, slots, self.heads) for part in (q, k))
        return q, k, v


class Block(nn.Module):
    """One layer of the tower."""

    def __init__(self, norm: Callable[[], nn.Module], mlp: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = Attention(width, heads)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        """[M, P, C] to the same."""
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The patch embedding of a still image: one matrix for both frames."""

    def __init__(self, patch: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(3 * patch**2, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, 3 * patch * patch] to [M, P, C]."""
        return self.proj(x)


class Merger(nn.Module):
    """Norm and two-layer map of Qwen2-VL and Qwen2.5-VL: `merge` x `merge` patches become one visual token."""

    def __init__(self, norm: nn.Module, width: int, out: int, merge: int) -> None:
        super().__init__()
        self.wide = width * merge**2
        self.ln_q = norm
        self.mlp = nn.Sequential(Linear(self.wide, self.wide, bias=True), nn.GELU(), Linear(self.wide, out, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, C] to [M, N, D]."""
        x = self.ln_q(x)
        return self.mlp(x.reshape(x.shape[0], -1, self.wide))


class GridTower(nn.Module):
    """A tower for the grids that it is given: pixel values [M, 3, H, W] to visual tokens [M, N, D], row-major.

    Which grid it is follows from H and W. Parameters have the checkpoint's names; a model file gives the parts in which
    the models differ.
    """

    outputs = ("visual_embeds",)

    def __init__(
        self,
        vision: VisionModel,
        *,
        theta: float,
        embed: PatchEmbed,
        blocks: Sequence[Block],
        merger: nn.Module,
        full: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.vision, self.theta, self.full = vision, theta, frozenset(full)
        self.cell = vision.patch_size * vision.merge
        self.patch_embed, self.blocks, self.merger = embed, nn.ModuleList(blocks), merger
        # A list here is given the rows [M, P, C] behind each layer, in the order they run in.
        self.states: list[Tensor] | None = None
        for grid in vision.all_grids:
            self.prepare(grid)

    def prepare(self, grid: Grid) -> None:
        """Make the constants of a grid: buffers, because a trace takes those as constants."""
        order, _ = window_order(grid, self.vision.window)
        half = self.vision.hidden_size // self.vision.num_heads // 2
        rows, columns = patch_places(grid, self.vision.merge, order)
        # In numpy, so that a tower on the meta device has its tables too.
        exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
        frequencies = (1.0 / self.theta ** exponents.astype(np.float64)).astype(np.float32)
        places = np.stack([rows, columns], axis=1).astype(np.float32)
        angles = (places[:, :, None] * frequencies).reshape(len(places), -1)
        tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
        if self.vision.window:
            tables |= {"order": order, "back": np.argsort(order)}
        for name, table in tables.items():
            self.register_buffer(f"{name}_{grid[0]}x{grid[1]}", torch.from_numpy(table), persistent=False)

    def table(self, name: str, grid: Grid) -> Tensor:
        """A constant of a grid."""
        return getattr(self, f"{name}_{grid[0]}x{grid[1]}")

    def patches(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """[M, 3, H, W] to [M, N, merge^2, 3 * patch^2], tokens row-major, and the grid of tokens."""
        height, width = pixel_values.shape[2:]
        grid = (height // self.cell, width // self.cell)
        merge, patch = self.vision.merge, self.vision.patch_size
        x = pixel_values.reshape(-1, 3, grid[0], merge, patch, grid[1], merge, patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)
        return x.reshape(-1, grid[0] * grid[1], merge**2, 3 * patch**2), grid

    def embed(self, patches: Tensor, grid: Grid) -> Tensor:
        """Embedded patches [M, P, C] of `patches` [M, P, 3 * patch^2] in the order they run in."""
        return self.patch_embed(patches)

    def collect(self, x: Tensor, index: int) -> None:
        """Called with the rows behind each layer, for models that read them."""

    def forward(self, pixel_values: Tensor) -> Any:
        """Pixel values [M, 3, H, W] to visual tokens [M, N, D]."""
        patches, grid = self.patches(pixel_values)
        _, windows = window_order(grid, self.vision.window)
        if self.vision.window:
            patches = patches[:, self.table("order", grid)]
        x = self.embed(patches.flatten(1, 2), grid)
        area = self.vision.merge**2
        everything = [(1, grid[0] * grid[1] * area)]
        grouped = [(count, tokens * area) for count, tokens in windows]
        cos, sin = self.table("cos", grid), self.table("sin", grid)
        for index, block in enumerate(self.blocks):
            whole = not self.vision.window or index in self.full
            x = block(x, cos, sin, everything if whole else grouped)
            self.collect(x, index)
            if self.states is not None:
                self.states.append(x)
        tokens = self.merger(x)
        return tokens[:, self.table("back", grid)] if self.vision.window else tokens


def window_order(grid: Grid, side: int) -> tuple[np.ndarray, Groups]:
    """Tokens window by window, int64 [N], and how many windows there are of each size.

    Windows are `side` x `side` tokens from the top left, cut at the right and bottom edge; those of equal size follow
    each other, so that they run as one batch. Side 0 is one window of all tokens in row-major order.
    """
    rows, columns = grid
    index = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    if not side:
        return index.ravel(), [(1, index.size)]
    cut = [index[y : y + side, x : x + side].ravel() for y in range(0, rows, side) for x in range(0, columns, side)]
    cut.sort(key=len, reverse=True)  # stable
    sizes = [len(window) for window in cut]
    return np.concatenate(cut), [(sizes.count(size), size) for size in dict.fromkeys(sizes)]


def patch_places(grid: Grid, merge: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch, int64 [P] each: the patches of a token follow each other, tokens as in `order`."""
    token_rows, token_columns = order // grid[1], order % grid[1]
    inside = np.arange(merge)
    rows = token_rows[:, None, None] * merge + inside[:, None] + 0 * inside
    columns = token_columns[:, None, None] * merge + inside + 0 * inside[:, None]
    return rows.ravel(), columns.ravel()


def checkpoint_shapes(tower: nn.Module, vision: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the checkpoint has for the parameters of a tower."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    linear = linear_weights(tower)
    shapes = {name: shape[::-1] if name in linear else shape for name, shape in shapes.items()}
    patch, frames = vision.patch_size, vision.temporal_patch_size
    name = "patch_embed.proj.weight"
    return shapes | {name: (shapes[name][0], 3, frames, patch, patch)}


def linear_weights(tower: nn.Module) -> set[str]:
    """Parameters that are stored transposed, [in, out]."""
    return {f"{name}.weight" for name, module in tower.named_modules() if isinstance(module, Linear)}


def load_tower(checkpoint: Checkpoint, tower: GridTower) -> GridTower:
    """Give a tower its weights, which are read when they are used."""
    linear = linear_weights(tower)
    weights = {
        name: Weight(
            checkpoint=checkpoint,
            name=f"visual.{name}",
            transposed=name in linear,
            summed_frames=name == "patch_embed.proj.weight",
        )
        for name, _ in tower.named_parameters()
    }
    return streamed(tower, weights)
