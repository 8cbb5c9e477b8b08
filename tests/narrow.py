"""Checkpoints of 16 bits, and the float32 checkpoints of the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def narrow_and_wide(checkpoint: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """Two copies beside a checkpoint of one shard: its weights in `dtype`, and those in float32 again."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    folders = []
    for name, kind in (("narrow", dtype), ("wide", torch.float32)):
        folder = checkpoint.parent / name
        shutil.copytree(checkpoint, folder)
        save_file(
            {key: tensor.to(kind) for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        folders.append(folder)
    return folders[0], folders[1]
