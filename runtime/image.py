"""Images in, pixel values out: the CLIP image processor of the checkpoint without transformers.

The numbers are those of `CLIPImageProcessorPil` of transformers 5.23 (the one used without torchvision):
resize the shortest edge, centre crop in uint8 (what is missing is black), rescale in float64, normalise in
float32.

One deliberate difference lies before the processor: transparent images are laid on white, where transformers
drops the alpha channel and shows whatever colour lies below it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from reroute.errors import UserError
from reroute.manifest import ImageProcessing

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


def crop(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    """What the model sees of an RGB image: resized and cropped to [crop_height, crop_width], still uint8."""
    width, height = image.size
    short, long = sorted((width, height))
    edge = processing.shortest_edge
    long = int(edge * long / short)
    size = (edge, long) if width <= height else (long, edge)
    resized = image.resize(size, resample=Image.Resampling(processing.resample))
    left, top = (size[0] - processing.crop_width) // 2, (size[1] - processing.crop_height) // 2
    return resized.crop((left, top, left + processing.crop_width, top + processing.crop_height))


def preprocess(image: Image.Image, processing: ImageProcessing) -> np.ndarray:
    """Pixel values of an RGB image: float32 [3, crop_height, crop_width], normalised."""
    pixels = np.asarray(crop(image, processing)).astype(np.float64) * processing.rescale_factor
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
