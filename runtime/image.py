"""Images in, pixel values out: the image processors of the checkpoints without transformers.

The numbers are those of `CLIPImageProcessorPil` and `Qwen2VLImageProcessorPil` of transformers 5.23 (the ones used
without torchvision). CLIP: resize the shortest edge, centre crop in uint8 (what is missing is black). Qwen-VL: resize
to whole visual tokens. Both: rescale in float64, normalise in float32.

Qwen-VL's processor resizes to any number of tokens between two limits (`wanted_grid`). An engine has graphs for the
grids that it was exported for, so the image is resized to the nearest of them (`nearest_grid`): the proportions may
change a little, as they do when the processor itself rounds to whole tokens.

One deliberate difference lies before the processor: transparent images are laid on white, where transformers
drops the alpha channel and shows whatever colour lies below it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from reroute.errors import UserError
from reroute.manifest import Grid, GridProcessing, ImageProcessing, Model

MAX_PIXELS = 64_000_000
MAX_ASPECT = 100

ImageInput = str | Path | Image.Image | np.ndarray


def open_image(source: ImageInput) -> Image.Image:
    """Read an image and make it RGB.

    EXIF orientation is applied; transparency is laid on white; 16-bit grey keeps its upper byte.

    Args:
        source: a path, a Pillow image, or a uint8 array [H, W, 3], [H, W, 4] or [H, W].

    Raises:
        UserError: not an image, damaged, empty, more than 64 megapixels or more than 100 times longer than
            wide. Size is checked before anything is decoded.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        _check_size(source, "the image")
        return _load(source, "the image")
    if not isinstance(source, str | Path):
        raise UserError(
            f"an image cannot be a {type(source).__name__}",
            hint="give a path, a Pillow image or a uint8 array [height, width, 3]",
        )
    name = Path(source).name or str(source)
    try:
        with warnings.catch_warnings():
            # Pillow's own limits are a warning and an error at other sizes; ours is below both.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except Image.DecompressionBombError:
        raise _too_large(name, "far more") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image Pillow can read", hint="for example PNG, JPEG or WebP") from None
    except FileNotFoundError:
        raise UserError(f"there is no image {source}", hint="check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the image {source}: {error}", hint="check the path") from error
    with image:
        _check_size(image, name)
        return _load(image, name)


def grid_of(image: Image.Image, model: Model) -> Grid:
    """The grid of visual tokens that an image gets."""
    if isinstance(model.image, ImageProcessing):
        return model.vision.grid
    return nearest_grid(image.size, model.image, model.vision.all_grids)


def wanted_grid(size: tuple[int, int], processing: GridProcessing) -> tuple[float, float]:
    """Rows and columns that the checkpoint's processor would give an image of (width, height) pixels.

    `smart_resize` of transformers: the nearest whole numbers, made smaller or larger in proportion where the pixels are
    more than `max_pixels` or fewer than `min_pixels`.
    """
    width, height = size
    cell, area = processing.cell, width * height
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns * cell**2 > processing.max_pixels:
        shrink = math.sqrt(area / processing.max_pixels)
        return max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
    if rows * columns * cell**2 < processing.min_pixels:
        grow = math.sqrt(processing.min_pixels / area)
        return math.ceil(height * grow / cell), math.ceil(width * grow / cell)
    return rows, columns


def nearest_grid(size: tuple[int, int], processing: GridProcessing, grids: Sequence[Grid]) -> Grid:
    """The grid that is nearest to what the checkpoint's processor would choose for an image of (width, height) pixels.

    Sides are compared by their ratio; an image larger than all grids is first made as small as the largest one, so that
    it is then its shape that counts. Of equally near grids the first.
    """
    rows, columns = wanted_grid(size, processing)
    if (rows, columns) in grids:
        return int(rows), int(columns)
    largest = max(grid[0] * grid[1] for grid in grids)
    if rows * columns > largest:
        width, height = size
        scale = math.sqrt(largest / (width * height))
        rows, columns = height * scale, width * scale
    rows, columns = max(rows, 0.5), max(columns, 0.5)
    return min(grids, key=lambda grid: math.log(grid[0] / rows) ** 2 + math.log(grid[1] / columns) ** 2)


def crop(image: Image.Image, processing: ImageProcessing | GridProcessing, grid: Grid | None = None) -> Image.Image:
    """What the model sees of an RGB image, still uint8: resized and cropped, or resized to the pixels of `grid`."""
    if isinstance(processing, GridProcessing):
        if grid is None:
            raise ValueError("an image for a tower of several grids needs one")
        size = (grid[1] * processing.cell, grid[0] * processing.cell)
        return image.resize(size, resample=Image.Resampling(processing.resample))
    width, height = image.size
    short, long = sorted((width, height))
    edge = processing.shortest_edge
    long = int(edge * long / short)
    size = (edge, long) if width <= height else (long, edge)
    resized = image.resize(size, resample=Image.Resampling(processing.resample))
    left, top = (size[0] - processing.crop_width) // 2, (size[1] - processing.crop_height) // 2
    return resized.crop((left, top, left + processing.crop_width, top + processing.crop_height))


def preprocess(
    image: Image.Image, processing: ImageProcessing | GridProcessing, grid: Grid | None = None
) -> np.ndarray:
    """Pixel values of an RGB image: float32 [3, H, W], normalised; with a `GridProcessing`, of `grid`."""
    pixels = np.asarray(crop(image, processing, grid)).astype(np.float64) * processing.rescale_factor
    mean, std = (np.asarray(v, dtype=np.float32) for v in (processing.mean, processing.std))
    return np.ascontiguousarray(((pixels.astype(np.float32) - mean) / std).transpose(2, 0, 1))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"an image array of dtype {array.dtype} and shape {list(array.shape)} is not supported",
            hint="give uint8 [height, width, 3]; scale floats by 255 and move channels last",
        )
    height, width = array.shape[:2]
    _check_shape(width, height, "the image array")
    return Image.fromarray(np.ascontiguousarray(array))


def _load(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        raise UserError(f"{name} is damaged: {error}", hint="open and save it again with an editor") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("images of floating-point pixels are not supported", hint="save the image with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 when it converts; the upper byte is the picture.
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _check_size(image: Image.Image, name: str) -> None:
    _check_shape(*image.size, name)


def _check_shape(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name} is empty: {width} x {height} pixels", hint="give an image with pixels")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height}, {width * height / 1e6:.0f} million")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{name} is {width} x {height}: one side is more than {MAX_ASPECT} times the other",
            hint="crop it to the part you ask about",
        )


def _too_large(name: str, size: Any) -> UserError:
    return UserError(
        f"{name} is too large: {size} pixels, at most {MAX_PIXELS // 1_000_000} million are read",
        hint="make it smaller first; the model sees a few hundred pixels a side",
    )
