"""Which visual tokens lie on an object, and how large objects are called."""

from __future__ import annotations

from typing import Literal

import numpy as np

from reroute.evaluation.questions import Box
from reroute.manifest import GridProcessing, Model
from reroute.runtime.image import nearest_grid

Size = Literal["small", "medium", "large"]

# Geometric mean of a box's sides as a share of the image's: tertiles of the generated scenes of 3 to 7 objects. On a
# grid of 24 x 24 visual tokens they are 4.1 and 5.4 tokens a side.
MEDIUM_SIDE, LARGE_SIDE = 0.17, 0.225


def size_of(box: Box) -> Size:
    """Size group of a true box; the same borders for every set, so that its tables compare."""
    side = (max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])) ** 0.5
    return "small" if side < MEDIUM_SIDE else "medium" if side < LARGE_SIDE else "large"


def tokens_in(box: Box, size: tuple[int, int], model: Model) -> np.ndarray:
    """Visual tokens whose centre lies in a box; where no centre does, the one below the box's centre.

    Visual tokens lie on the crop of the model's image processor (`reroute.runtime.image.crop`), a box on the whole
    image: what the processor cuts away has no tokens.

    Args:
        box: shares of the image's width and height.
        size: (width, height) of the image in pixels.
        model: its image processor and its grid.

    Returns:
        Ascending int64 indices, row-major on the image's grid; empty for a box outside the crop.
    """
    (width, height), image = size, model.image
    if isinstance(image, GridProcessing):
        rows, columns = nearest_grid(size, image, model.vision.all_grids)
        crops = resized = (columns * image.cell, rows * image.cell)
    else:
        rows, columns = model.vision.grid
        long = int(image.shortest_edge * max(size) / min(size))
        resized = (image.shortest_edge, long) if width <= height else (long, image.shortest_edge)
        crops = (image.crop_width, image.crop_height)
    spans = []
    for axis, (crop, cells) in enumerate(zip(crops, (columns, rows), strict=True)):
        start = (resized[axis] - crop) // 2
        low, high = ((box[axis + corner] * resized[axis] - start) * cells / crop for corner in (0, 2))
        inside = np.flatnonzero((low <= np.arange(cells) + 0.5) & (np.arange(cells) + 0.5 < high))
        middle = int(np.floor((low + high) / 2))
        spans.append(inside if len(inside) or not 0 <= middle < cells else np.asarray([middle]))
    across, down = spans
    return (down[:, None] * columns + across[None]).ravel()
