"""A scenario: the fixed steps that a reference and an engine are both driven through, and what is compared after.

Steps: a prompt with one image, greedy decoding, and a later turn of text alone. Recorded as plain numpy arrays by name,
so that a reference travels with an export as one `.npz` file and is read without torch.

| name | dtype, shape | meaning |
|---|---|---|
| in.pixel_values | float32 [1, 3, H, W] | the image |
| in.prompt_ids | int64 [P] | the prompt's token ids, the image as one placeholder |
| in.turn_ids | int64 [P2] | token ids of the later turn |
| in.num_tokens | int64 [] | greedy tokens after the prompt |
| in.pixel_values.{R}x{C} | float32 [1, 3, H, W] | an image for each other grid that the model has |
| visual_embeds | float32 [1, N, D] | vision features |
| visual_places | int64 [1, N] | where the vision graph drops tokens (Nüwa): places on the grid of those left |
| visual_deepstack | float32 [E, 1, N, D] | what is added after the first decoder layers, for models that have it |
| {R}x{C}.visual_embeds, ... | float32 [1, N, D] | the same for the images of the other grids |
| prompt.logits | float32 [1, V] | last row of the prompt |
| routes.{s} | int64 [1, T + K_s] | slots of stage s of the prompt |
| scores.{s} | float32 [1, N] | reference only: what the decision before stage s ranked, by candidate slot |
| candidates.{s} | int64 [1, N_s] | reference only: the slots that were ranked, in the order of scores.{s} |
| tokens | int64 [G] | greedy tokens |
| turn.logits | float32 [1, V] | last row of the later turn |
| cache.{layer}.key, .value | float32 [1, H_kv, rows, head_dim] | all rows of the whole scenario |

Greedy tokens are forced to the reference's when an engine replays them, so that one early difference cannot hide what
comes after it: token t is the engine's own choice given the reference's tokens before t.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from reroute.errors import UserError
from reroute.manifest import Grid, Model

FILE_NAME = "reference.npz"
# Words of the probe before and after the image, and of the later turn.
_BEFORE, _AFTER = 4, 20
TURN_TOKENS = 7
_OTHER = "in.pixel_values."
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Inputs of a scenario; shapes in the module docstring."""

    pixel_values: np.ndarray
    prompt_ids: np.ndarray
    turn_ids: np.ndarray
    num_tokens: int
    other_pixels: dict[Grid, np.ndarray] = field(default_factory=dict)

    def to_arrays(self) -> Arrays:
        """The `in.*` arrays."""
        others = {f"{_OTHER}{rows}x{columns}": array for (rows, columns), array in self.other_pixels.items()}
        return {
            **others,
            "in.pixel_values": self.pixel_values,
            "in.prompt_ids": self.prompt_ids,
            "in.turn_ids": self.turn_ids,
            "in.num_tokens": np.asarray(self.num_tokens, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Scenario:
        """The inverse of `to_arrays`."""
        return cls(
            pixel_values=arrays["in.pixel_values"],
            prompt_ids=arrays["in.prompt_ids"],
            turn_ids=arrays["in.turn_ids"],
            num_tokens=int(arrays["in.num_tokens"]),
            other_pixels={
                _grid(name.removeprefix(_OTHER)): array for name, array in arrays.items() if name.startswith(_OTHER)
            },
        )


def _grid(text: str) -> Grid:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def text_tokens(num_tokens: int) -> int:
    """Text tokens that the probe runs in all: prompt, greedy tokens and the later turn; its last token is not run."""
    return _BEFORE + _AFTER + num_tokens + TURN_TOKENS


def probe(model: Model, *, num_tokens: int = 64, seed: int = 0) -> Scenario:
    """A seeded scenario for any model: an image of smooth colour blobs and random words around it."""
    rng = np.random.default_rng(seed)
    special = {model.tokens.image_token_id, *model.tokens.eos_token_ids}
    words = np.asarray([i for i in range(model.text.vocab_size) if i not in special], dtype=np.int64)
    prompt = np.concatenate([rng.choice(words, _BEFORE), [model.tokens.image_token_id], rng.choice(words, _AFTER)])
    pixels = _blobs(rng, *model.pixels(model.vision.grid))
    turn = rng.choice(words, TURN_TOKENS)
    others = [grid for grid in model.vision.all_grids if grid != model.vision.grid]
    return Scenario(
        pixel_values=pixels,
        prompt_ids=prompt.astype(np.int64),
        turn_ids=turn,
        num_tokens=num_tokens,
        other_pixels={grid: _blobs(rng, *model.pixels(grid)) for grid in others},
    )


def _blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pixel values [1, 3, H, W] of smooth colours with a little noise."""
    coarse = rng.standard_normal((1, 3, 6, 6))
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 6 // width
    pixels = coarse[:, :, rows][:, :, :, columns] + 0.1 * rng.standard_normal((1, 3, height, width))
    return pixels.astype(np.float32)


def save(path: Path | BinaryIO, arrays: Arrays) -> None:
    """Write arrays as an uncompressed `.npz`; equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            # A fixed date: the archive format would otherwise store the time of writing.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(arrays[name], order="C"), allow_pickle=False)


def load(path: Path) -> Arrays:
    """Read a `.npz` without pickle. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path.name}: {error}", hint="export and build again") from error
