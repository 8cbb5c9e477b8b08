"""Reading a Hugging Face checkpoint directory without trusting it: safetensors only, no pickle, no remote code.

Opening looks at the headers alone; tensors are read one at a time, by seek and read: mapped pages would count as
memory. The fingerprint (`sha256`) reads every shard once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from reroute.errors import UserError
from reroute.manifest import sha256_of

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# What `load` can widen to float32 as it is: anything else needs scales that it does not know of.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK = 1 << 22  # elements converted at once
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, its shape, its dtype in safetensors' spelling, and its first byte in the shard."""

    shard: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory.

    Attributes:
        folder: the directory.
        config: parsed config.json.
        entries: tensors by *canonical* name, the same for all generations of a layout (`canonical_name`).
    """

    folder: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a directory. Raises UserError: not a checkpoint, pickled weights, a missing or corrupt shard."""
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a directory",
                hint="give a checkpoint directory with config.json and *.safetensors",
            )
        config = read_json(folder, "config.json", required=True)
        return cls(folder, config, _scan(folder))

    @property
    def shards(self) -> list[str]:
        """Shard file names, sorted."""
        return sorted({entry.shard for entry in self.entries.values()})

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of config and weights."""
        digest = hashlib.sha256()
        for name in ("config.json", *self.shards):
            digest.update(f"{name}={sha256_of(self.folder / name)}\n".encode())
        return digest.hexdigest()

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there, of floats, and of the shape that the config implies. Raises UserError."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"{self.folder} lacks the tensor {name}", hint="config.json and the weights do not match")
        if entry.shape != shape:
            raise UserError(
                f"the tensor {entry.key} has shape {list(entry.shape)}, config.json implies {list(shape)}",
                hint="config.json and the weights do not match",
            )
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"the tensor {entry.key} has dtype {entry.dtype}: quantized weights are not supported",
                hint=f"supported: {', '.join(_DTYPES)}",
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        import torch

        return getattr(torch, _DTYPES[self.entries[name].dtype])

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor by canonical name, as `dtype` where given. Raises UserError: the shard was cut short."""
        import torch

        entry, kind = self.entries[name], self.dtype_of(name)
        tensor = torch.empty(entry.shape, dtype=dtype or kind)
        self._read(entry, entry.start, tensor.view(-1), kind)
        return tensor

    def load_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Read these rows of one tensor, in this order. Raises UserError: the shard was cut short."""
        import torch

        entry, kind = self.entries[name], self.dtype_of(name)
        tensor = torch.empty((len(rows), *entry.shape[1:]), dtype=dtype)
        width = tensor[0].numel() * kind.itemsize if rows else 0
        for place, row in enumerate(rows):
            self._read(entry, entry.start + row * width, tensor[place].view(-1), kind)
        return tensor

    def _read(self, entry: Entry, start: int, out: torch.Tensor, kind: torch.dtype) -> None:
        """Fill `out` [n] with the elements of type `kind` from byte `start` on, a few million at a time."""
        import torch

        with (self.folder / entry.shard).open("rb") as stream:
            stream.seek(start)
            for at in range(0, out.numel(), _BLOCK):
                part = out[at : at + _BLOCK]
                buffer = bytearray(part.numel() * kind.itemsize)
                if stream.readinto(buffer) != len(buffer):
                    raise UserError(
                        f"the shard {entry.shard} ends within {entry.key}", hint="it was cut short: copy it again"
                    )
                part.copy_(torch.frombuffer(buffer, dtype=kind))

    def count(self, prefix: str) -> int:
        """Number of parameters whose canonical name starts with `prefix`."""
        total = 0
        for name, entry in self.entries.items():
            if name.startswith(prefix):
                size = 1
                for length in entry.shape:
                    size *= length
                total += size
        return total


def canonical_name(key: str) -> str:
    """One name for a tensor of LLaVA or Qwen-VL, whichever version of transformers wrote it.

    `language_model.model.X`, `model.language_model.X` -> `language_model.X`; `language_model.lm_head` -> `lm_head`;
    `vision_tower.vision_model.X`, `model.vision_tower.vision_model.X` -> `vision_tower.X`; `model.visual.X` ->
    `visual.X`; Qwen-VL's older `model.layers.X` -> `language_model.layers.X`.
    """
    for part in ("language_model.", "vision_tower.", "multi_modal_projector.", "visual."):
        if key.startswith("model." + part):
            key = key.removeprefix("model.")
    for long, short in (
        *((f"model.{part}.", f"language_model.{part}.") for part in ("layers", "embed_tokens", "norm")),
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
    ):
        if key.startswith(long):
            key = short + key.removeprefix(long)
    return key


def read_json(folder: Path, name: str, *, required: bool = False) -> dict[str, Any]:
    """Parse a JSON object of the checkpoint; {} if it is absent and not required. Raises UserError."""
    path = folder / name
    if not path.is_file():
        if required:
            raise UserError(
                f"{folder} holds no {name}: it is not a checkpoint",
                hint="give the directory of a Hugging Face checkpoint, the one that config.json is in",
            )
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot parse {path}: {error}", hint="the file is damaged: copy it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object", hint="the file is damaged: copy it again")
    return data


def _scan(folder: Path) -> dict[str, Entry]:
    """Read the headers of all shards."""
    index = read_json(folder, INDEX_FILE)
    weight_map = index.get("weight_map")
    if index and not isinstance(weight_map, dict):
        raise UserError(f"{folder / INDEX_FILE} has no weight_map", hint="the file is damaged: copy it again")
    if weight_map:
        if wrong := [place for place in weight_map.values() if not isinstance(place, str)]:
            raise UserError(
                f"{folder / INDEX_FILE} names {wrong[0]!r} as a shard", hint="the file is damaged: copy it again"
            )
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE_FILE).is_file():
        shards = [SINGLE_FILE]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds pickled weights ({pickles[0]}) and no safetensors; reading a pickle can run code",
                hint="convert it where you trust it: AutoModel.from_pretrained(...).save_pretrained(...)",
            )
        raise UserError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}", hint="the weights are missing")
    entries: dict[str, Entry] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{INDEX_FILE} names a shard outside the directory: {shard}", hint="do not use this file")
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks the shard {shard}", hint=f"{INDEX_FILE} names it: copy it again")
        try:
            with safe_open(folder / shard, framework="np") as file:
                starts = _starts(folder / shard)
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    header = file.get_slice(key)
                    shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
                    entries[canonical_name(key)] = Entry(shard, key, shape, dtype, starts[key])
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"cannot read the shard {shard}: {error}", hint="it is damaged or cut short: copy it again"
            ) from error
    if weight_map:
        for key in weight_map:
            if canonical_name(key) not in entries:
                raise UserError(f"no shard holds {key}, which {INDEX_FILE} lists", hint="copy the shards again")
    return entries


def _starts(path: Path) -> dict[str, int]:
    """First byte of each tensor of a safetensors file whose header was checked: its length, itself, then the data."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}
