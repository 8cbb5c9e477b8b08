"""Annotation files that are JSON or JSON lines, and the image folders that go with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from reroute.errors import UserError, nearest
from reroute.evaluation.datasets.local import Images, open_image

_COCO_ID = re.compile(r"COCO_(train|val)2014_(\d{12})")
_FOLDERS = ("", "train2014", "val2014", "images")


def load(path: Path) -> Any:
    """A JSON file's value; for JSON lines, whatever the file is called, the list of the lines' values.

    Raises:
        UserError: not there, not UTF-8, not JSON; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", hint="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", hint="it must be JSON in UTF-8") from error
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the data", hint="git lfs pull, or download the file")
    try:
        value = json.loads(text)
        return [value] if path.suffix == ".jsonl" and isinstance(value, dict) else value
    except json.JSONDecodeError as error:
        # A second value after the first one: one value a line (POPE's files are, and end in .json).
        if path.suffix != ".jsonl" and not error.msg.startswith("Extra data"):
            raise UserError(f"{path} is damaged: line {error.lineno}: {error.msg}", hint="download it again") from error
    return [_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def records(path: Path, value: Any, what: str) -> list[dict[str, Any]]:
    """`value` as a list of objects. Raises UserError with the first that is none."""
    if not isinstance(value, list):
        raise UserError(f"{path} is not a list of {what}", hint=f"it holds a JSON {_kind(value)}")
    for row, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, row {row} is not an object but a {_kind(entry)}", hint=f"one object a {what}")
    return value


def text(record: dict[str, Any], key: str, where: str) -> str:
    """A text value; whole numbers are written out (ids come as both). Raises UserError."""
    value = take(record, key, where)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {key} is a {_kind(value)}, not a text", hint="use the file as published")
    return str(value)


def numbers(record: dict[str, Any], key: str, count: int, where: str) -> list[float]:
    """A list of `count` finite numbers. Raises UserError."""
    value = take(record, key, where)
    fits = isinstance(value, list) and len(value) == count
    if not fits or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf") for v in value
    ):
        raise UserError(f"{where}: {key} is {value!r}, not {count} numbers", hint="use the file as published")
    return [float(v) for v in value]


def size(record: dict[str, Any], where: str) -> tuple[int, int] | None:
    """(width, height) where the record has both. Raises UserError when they are no sizes."""
    if "width" not in record and "height" not in record:
        return None
    width, height = (take(record, key, where) for key in ("width", "height"))
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in (width, height)):
        raise UserError(f"{where}: the size is {width!r} x {height!r}", hint="width and height are pixels, at least 1")
    return width, height


def take(record: dict[str, Any], key: str, where: str) -> Any:
    """A value that must be there. Raises UserError with the nearest key."""
    if key not in record:
        raise UserError(f"{where} has no {key!r}", hint=nearest(key, record).replace("supported", "it has"))
    return record[key]


class FolderImages(Images):
    """Images in a folder, found by the name in the annotation.

    Tried in this order: the name as it is, and its last part, both below the folder and below its `train2014`,
    `val2014` and `images`; then the number of a COCO 2014 name as COCO 2017 calls the same image.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path] = {}

    def place(self, key: str) -> str:
        """See `Images`."""
        return str(self._found.get(key, self._folder / key))

    def open(self, key: str) -> Image.Image:
        """See `Images`."""
        if key not in self._found:
            self._found[key] = self._find(key)
        return open_image(self._found[key], str(self._found[key]))

    def _find(self, key: str) -> Path:
        for path in self._candidates(key):
            if path.is_file():
                return path
        raise UserError(
            f"there is no image {key} in {self._folder}",
            hint="give the folder of the images (COCO: the one that holds train2014 and val2014) as --images",
        )

    def _candidates(self, key: str) -> Iterable[Path]:
        name = PurePosixPath(key)
        names = [PurePosixPath(name.name)]
        if not name.is_absolute() and ".." not in name.parts and name != names[0]:
            names.insert(0, name)
        for part in names:
            yield from (self._folder / folder / part for folder in _FOLDERS)
        if match := _COCO_ID.search(name.name):
            yield from (self._folder / folder / f"{match[2]}.jpg" for folder in ("", "train2017", "val2017"))


def image_folder(images: Path | None, path: Path) -> FolderImages:
    """The folder that --images names. Raises UserError."""
    if images is None:
        raise UserError(
            f"{path.name} names images and holds none", hint="give their folder: --images DIR, for example coco"
        )
    if not images.is_dir():
        raise UserError(f"there is no image folder {images}", hint="give the folder of the COCO or GQA images")
    return FolderImages(images)


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: line {number}: {error.msg}", hint="download it again") from error


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null")
