"""The grids that a tower of variable shape is exported for: each becomes a graph of its own.

Written as `24x24,18x32`: rows and columns of visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reroute.errors import UserError
from reroute.manifest import Grid, GridProcessing, Model


def parse_grids(text: str) -> tuple[Grid, ...]:
    """`24x24,18x32` as (rows, columns). Raises UserError."""
    grids: list[Grid] = []
    for item in text.split(","):
        rows, times, columns = item.strip().partition("x")
        if not times or not (rows.isdecimal() and columns.isdecimal()) or not int(rows) or not int(columns):
            raise UserError(
                f"{item!r} in {text!r} is not a grid", hint="write rows x columns of visual tokens, such as 24x24,18x32"
            )
        grids.append((int(rows), int(columns)))
    if twice := {grid for grid in grids if grids.count(grid) > 1}:
        rows, columns = min(twice)
        raise UserError(f"the grid {rows}x{columns} occurs twice in {text!r}", hint="give each grid once")
    return tuple(grids)


def with_grids(model: Model, grids: Sequence[Grid]) -> Model:
    """The model with these grids, the one of the most tokens first.

    Raises:
        UserError: a model whose images all have one shape, or a grid outside the image processor's pixels.
    """
    image = model.image
    if not isinstance(image, GridProcessing):
        rows, columns = model.vision.grid
        raise UserError(
            f"every image of this model has {rows} x {columns} visual tokens: it takes no other grids",
            hint="leave --grids away",
        )
    for rows, columns in grids:
        pixels = rows * columns * image.cell**2
        if not image.min_pixels <= pixels <= image.max_pixels:
            raise UserError(
                f"the grid {rows}x{columns} has {pixels} pixels, the image processor {image.min_pixels} to "
                f"{image.max_pixels}",
                hint="choose a grid within min_pixels and max_pixels of preprocessor_config.json",
            )
    ordered = tuple(sorted(grids, key=lambda grid: -grid[0] * grid[1]))
    if not ordered:
        raise UserError(
            f"no grid has {image.min_pixels} to {image.max_pixels} pixels", hint="name the grids: --grids 24x24,18x32"
        )
    first = ordered[0]
    vision = replace(
        model.vision,
        grid=first,
        grids=ordered,
        tokens_per_image=first[0] * first[1],
        image_size=max(first) * image.cell,
    )
    return replace(model, vision=vision)
