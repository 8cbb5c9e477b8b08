"""The plan's arithmetic for the vision tower: FLOPs, parameters and workspace, in the conventions of `reroute.cost`.

A CLIP tower with its class token and LLaVA's two-layer projector, or a Qwen-VL tower with its mergers, whose windows
are counted as they are cut at the edges of the grid. Attention is full, within a window where there are windows. Nüwa's
first stage adds the layers behind the feature layer, the similarity of all patches and the aggregation; for Qwen-VL the
scores of the last layer once more, the merger once more, the similarity of the kept and the aggregation.
"""

from __future__ import annotations

from reroute.manifest import Grid, VisionModel
from reroute.schedule import Schedule


def vision_flops(vision: VisionModel, decoder_size: int, nuwa: int | None = None, grid: Grid | None = None) -> int:
    """Patch embedding, encoder and projector or mergers for one image of `grid` (default: the first).

    With `nuwa` tokens after Nüwa's first stage.
    """
    grid = grid or vision.grid
    tokens = grid[0] * grid[1]
    patches, size = tokens * vision.merge**2, vision.hidden_size
    rows = patches + vision.class_token
    embedding = 2 * patches * 3 * vision.patch_size**2 * size
    matrices = 3 if vision.gated_mlp else 2
    linear = 2 * rows * (4 * size * size + matrices * size * vision.intermediate_size)
    full = 4 * rows * rows * size
    layers = vision.num_layers * linear + vision.num_layers * full
    if vision.window:
        layers = vision.num_layers * linear + vision.full_layers * full
        layers += (vision.num_layers - vision.full_layers) * 4 * size * _window_pairs(vision, grid)
    if vision.mergers:
        wide = size * vision.merge**2
        merger = 2 * tokens * (wide * wide + wide * decoder_size)
        if nuwa is not None:
            layers += 2 * rows * rows * size + merger + 4 * min(nuwa, tokens) * tokens * decoder_size
        return embedding + layers + vision.mergers * merger
    kept = vision.tokens_per_image if nuwa is None else min(nuwa, vision.tokens_per_image)
    projector = 2 * kept * (size * decoder_size + decoder_size * decoder_size)
    if nuwa is None:
        return embedding + layers + projector
    # Similarity of all patches, the class token's query once more, and the weighted sums.
    stage_1 = 2 * patches * patches * size + 2 * size * size + 2 * rows * size + 2 * kept * patches * size
    return embedding + vision.depth * (linear + full) + stage_1 + projector


def _window_pairs(vision: VisionModel, grid: Grid) -> int:
    """Query-key pairs of a layer with windows: the square of each window's patches, summed."""
    sides = []
    for length in grid:
        whole, rest = divmod(length, vision.window)
        sides.append([vision.window] * whole + [rest] * (rest > 0))
    return sum((high * wide * vision.merge**2) ** 2 for high in sides[0] for wide in sides[1])


def extra_tower_parameters(vision: VisionModel, schedule: Schedule) -> int:
    """Parameters of the tower layers that only Nüwa's first stage runs: four projections, MLP, biases, two norms."""
    if schedule.nuwa is None:
        return 0
    size, wide = vision.hidden_size, vision.intermediate_size
    return (vision.depth - vision.num_layers) * (4 * size * (size + 1) + 2 * size * wide + wide + size + 4 * size)


def vision_workspace_bytes(vision: VisionModel, dtype_bytes: int) -> int:
    """The same for one tower layer on P + 1 rows: residual and norm, then q, k, v, output and float32
    probabilities, or the MLP's two wide tensors.
    """
    rows = vision.grid[0] * vision.grid[1] * vision.merge**2 + vision.class_token
    attention = 4 * rows * vision.hidden_size * dtype_bytes + 4 * vision.num_heads * rows * rows
    mlp = (3 if vision.gated_mlp else 2) * rows * vision.intermediate_size * dtype_bytes
    return 2 * rows * vision.hidden_size * dtype_bytes + max(attention, mlp)
