"""Visual tokens of images that were encoded before, so that an image asked about again is not encoded again.

What an image gives depends on its preprocessed pixels alone, so those are the key: the same picture from a file and
from memory is one image, and a file that was changed is another. The tokens are kept within a number of bytes; the
image that was asked about longest ago goes first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reroute.errors import UserError
from reroute.manifest import Model
from reroute.runtime.answer import View
from reroute.runtime.positions import VisualTokens, join, split

if TYPE_CHECKING:
    from reroute.runtime.image import ImageInput

DEFAULT_MIB = 32.0
Encode = Callable[[np.ndarray], VisualTokens]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Encoded images, to ask about more than once: made by `Session.encode`, taken where an image is.

    They fit every bundle with the same vision graph, whatever its decoder's schedule.

    Attributes:
        visual: the visual tokens.
        vision_sha256: of the vision graph and its weights.
        views: how the images were seen.
    """

    visual: VisualTokens
    vision_sha256: str
    views: tuple[View, ...] = ()


def see(images: Sequence[ImageInput], model: Model) -> tuple[list[np.ndarray], tuple[View, ...]]:
    """Pixel values float32 [3, H, W] of each image, and how it is seen. Raises UserError for an unusable image."""
    if not images:
        return [], ()
    from reroute.runtime.image import grid_of, open_image, preprocess  # a dialogue of text needs no Pillow

    pixels, views, choices = [], [], len(model.vision.all_grids)
    for one in images:
        opened = open_image(one)
        grid = grid_of(opened, model)
        pixels.append(preprocess(opened, model.image, grid))
        views.append(View(original=opened.size, pixels=pixels[-1].shape[:0:-1], grid=grid, choices=choices))
    return pixels, tuple(views)


class FeatureCache:
    """Encodes images and keeps what the last ones gave.

    Attributes:
        nbytes: of the tokens that are kept.
    """

    def __init__(self, mib: float = DEFAULT_MIB) -> None:
        """Keep at most `mib` MiB; 0 keeps nothing. Raises UserError for less than that."""
        if not mib >= 0:
            raise UserError(f"image_cache_mib is {mib}", hint="give a size in MiB, or 0 to encode every image anew")
        self._limit = int(min(mib, 2**40) * 2**20)
        self._kept: OrderedDict[bytes, VisualTokens] = OrderedDict()
        self.nbytes = 0

    def encode(self, images: Sequence[np.ndarray], run: Encode) -> tuple[VisualTokens, int]:
        """Visual tokens of images in their order, and how many images did not have to be encoded.

        Args:
            images: float32 [3, H, W], at least one.
            run: encodes float32 [M, 3, H, W]; given the images that are missing, each once, together where all have
                one size.
        """
        keys = [_key(image) if self._limit else str(index).encode() for index, image in enumerate(images)]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        made = dict(zip(missing, _run(list(missing.values()), run), strict=True))
        for key in dict.fromkeys(keys):
            self._keep(key, found.get(key) or made[key])
        return join([found.get(key) or made[key] for key in keys]), len(images) - len(missing)

    def clear(self) -> None:
        """Keep nothing of what was encoded so far."""
        self._kept.clear()
        self.nbytes = 0

    def _keep(self, key: bytes, visual: VisualTokens) -> None:
        """Make `visual` the newest, and let go of the oldest beyond the limit."""
        if visual.nbytes > self._limit:
            return
        if self._kept.pop(key, None) is None:
            self.nbytes += visual.nbytes
        self._kept[key] = visual
        while self.nbytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes


def _run(images: list[np.ndarray], run: Encode) -> list[VisualTokens]:
    if len({image.shape for image in images}) == 1:
        return split(run(np.stack(images)))
    return [run(image[None]) for image in images]


def _key(image: np.ndarray) -> bytes:
    digest = hashlib.sha256(f"{image.dtype}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
