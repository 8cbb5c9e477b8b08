"""Parquet files of the Hugging Face hub: finding the shards of a split, reading columns, streaming embedded images.

The hub's files are `<split>-<shard>-of-<shards>.parquet`, older ones with a hash behind, and an image column is a
struct of `bytes` and `path` (`huggingface/datasets`, its Image feature). Questions read only the light columns;
image bytes are read batch by batch, and never more than a few batches are held.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reroute.errors import UserError, nearest
from reroute.evaluation.datasets.local import Images, open_image

# What a column must be: the name of a check in pyarrow.types, of the values where it is a list.
TEXT, TEXTS, NUMBERS = "string", "list of strings", "list of numbers"

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
_BATCH_ROWS = 32
_BATCHES_HELD = 4


def shards(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, in order; none when the folder has none of it.

    Raises:
        UserError: a shard is missing.
    """
    if not folder.is_dir():
        return []
    single = folder / f"{split}.parquet"
    found: dict[int, Path] = {}
    count = 0
    for path in sorted(folder.glob("*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match and match["split"] == split:
            found[int(match["index"])] = path
            count = max(count, int(match["count"]))
    missing = [index for index in range(count) if index not in found]
    if missing:
        raise UserError(
            f"{folder} has {len(found)} of {count} files of {split!r}: "
            f"{split}-{missing[0]:05d}-of-{count:05d}.parquet is missing",
            hint="download the rest, or give one file to ask only its questions",
        )
    return [found[index] for index in sorted(found)] or ([single] if single.is_file() else [])


def shard_note(files: Sequence[Path]) -> str:
    """Text for a set's name when it is one shard of several, or nothing."""
    match = _SHARD.fullmatch(files[0].name) if len(files) == 1 else None
    return f"[{match['index']}-of-{match['count']}]" if match and int(match["count"]) > 1 else ""


def split_of(path: Path) -> str | None:
    """The split in a shard's name, or None."""
    match = _SHARD.fullmatch(path.name)
    return match["split"] if match else None


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises UserError: no pyarrow, no file, or not a parquet file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"reading {path.name} needs pyarrow, which is not installed", hint='pip install "reroute[eval]"'
        ) from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_rows(
    files: Sequence[Path], columns: Mapping[str, str], optional: Sequence[str] = ()
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """The rows of files, without images.

    Args:
        files: parquet files.
        columns: name to what it must be: TEXT, TEXTS or NUMBERS.
        optional: columns read where they are there; they are checked by whoever uses them.

    Yields:
        File, row in it counted from 0, and the values; no value of `columns` is None.

    Raises:
        UserError: a column is missing or of another type, a value is missing, a file is damaged.
    """
    for path in files:
        with open_parquet(path) as file:
            schema = file.schema_arrow
            for name, kind in columns.items():
                _check_column(path, schema, name, kind)
            wanted = [*columns, *(name for name in optional if name in schema.names)]
            row = 0
            for batch in _batches(path, file, columns=wanted, batch_size=4096):
                for values in batch.to_pylist():
                    for name in columns:
                        if values[name] is None:
                            raise UserError(f"{path}, row {row}: {name} is empty", hint="download the file again")
                    yield path, row, values
                    row += 1


class ParquetImages(Images):
    """Images embedded in parquet files; a key is registered with its file and row."""

    def __init__(self, column: str = "image") -> None:
        self._column = column
        self._rows: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        self._held: OrderedDict[tuple[Path, int, int], list[bytes | None]] = OrderedDict()

    def add(self, key: str, path: Path, row: int) -> None:
        """Register an image. The first row of a key stays."""
        self._rows.setdefault(key, (path, row))

    def check(self, files: Sequence[Path]) -> None:
        """Raises UserError unless each file has the image column."""
        for path in files:
            _check_column(path, self._file(path).schema_arrow, self._column, "image")

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def place(self, key: str) -> str:
        """See `Images`."""
        path, row = self._rows[key]
        return f"{path}, row {row}"

    def open(self, key: str) -> Image.Image:
        """See `Images`."""
        if key not in self._rows:
            raise UserError(f"there is no image {key!r}", hint="use the keys of this set's questions")
        data = self._bytes(*self._rows[key])
        if data is None:
            raise UserError(
                f"{self.place(key)}: the {self._column} has no bytes",
                hint="use the files as downloaded, with embedded images",
            )
        return open_image(data, self.place(key))

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_parquet(path)
        return self._open[path]

    def _bytes(self, path: Path, row: int) -> bytes | None:
        file = self._file(path)
        group = 0
        while row >= (rows := file.metadata.row_group(group).num_rows):
            row -= rows
            group += 1
        wanted, offset = divmod(row, _BATCH_ROWS)
        key = (path, group, wanted)
        if key not in self._held:
            options = {"columns": [f"{self._column}.bytes"], "row_groups": [group], "batch_size": _BATCH_ROWS}
            for index, batch in enumerate(_batches(path, file, **options)):
                if index == wanted:
                    self._held[key] = batch.column(0).field("bytes").to_pylist()
                    break
            while len(self._held) > _BATCHES_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key][offset]


def _batches(path: Path, file: Any, **options: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(**options)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _check_column(path: Path, schema: Any, name: str, kind: str) -> None:
    import pyarrow as pa

    if name not in schema.names:
        raise UserError(
            f"{path} has no column {name!r}", hint=nearest(name, schema.names).replace("supported", "it has")
        )
    type_ = schema.field(name).type
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    value = type_.value_type if is_list else type_
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value)
    if kind == "image":
        fits = pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0
    elif kind == NUMBERS:
        fits = is_list and (pa.types.is_floating(value) or pa.types.is_integer(value))
    else:
        fits = is_text and is_list == (kind == TEXTS)
    if not fits:
        kind = "struct of bytes and path" if kind == "image" else kind
        raise UserError(
            f"{path}: the column {name!r} is of type {type_}, not a {kind}", hint="use the files as downloaded"
        )


def _damaged(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"there is no file {path}", hint="check the path")
    with path.open("rb") as file:
        pointer = file.read(12) == b"version http"
    if pointer:
        return UserError(f"{path} is a Git LFS pointer, not the data", hint="git lfs pull, or download the file")
    reason = str(error).splitlines()[0]
    return UserError(f"{path} is damaged or not a parquet file: {reason}", hint="download it again")
