"""Ways to damage a checkpoint, an export or a bundle."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from reroute.manifest import FILE_NAME, file_table

Damage = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ABSENT = object()


def set_json(name: str, key: str, value: Any) -> Damage:
    """Set `a.b.c` in a JSON file; ABSENT removes it."""

    def damage(folder: Path) -> None:
        data = inner = json.loads((folder / name).read_text())
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is ABSENT:
            del inner[last]
        else:
            inner[last] = value
        (folder / name).write_text(json.dumps(data))

    return damage


def config(key: str, value: Any) -> Damage:
    return set_json("config.json", key, value)


def processor(key: str, value: Any) -> Damage:
    return set_json("preprocessor_config.json", key, value)


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def binary(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(name: str, share: float = 0.5) -> Damage:
    """Keep the first `share` of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip(name: str) -> Damage:
    """Change one bit in the middle; the size stays."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def tensor(name_end: str, change: Callable[[Any], Any] | None) -> Damage:
    """Change the one tensor whose name ends with `name_end`; None removes it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (name,) = (key for key in tensors if key.endswith(name_end))
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
        save_file(tensors, folder / WEIGHTS)

    return damage


def shard(folder: Path) -> None:
    """Split the weights into one.safetensors and two.safetensors with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def point_index_at(place: Any) -> Damage:
    """A sharded checkpoint whose index names `place` for one tensor."""

    def damage(folder: Path) -> None:
        shard(folder)
        data = json.loads((folder / INDEX).read_text())
        data["weight_map"][sorted(data["weight_map"])[0]] = place
        (folder / INDEX).write_text(json.dumps(data))

    return damage


def then(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def rehash(folder: Path) -> None:
    """Make the manifest's hashes right again: damage that a check of hashes does not see."""
    data = json.loads((folder / FILE_NAME).read_text())
    data["files"] = {name: vars(file) for name, file in file_table(folder).items()}
    (folder / FILE_NAME).write_text(json.dumps(data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
