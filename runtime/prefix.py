"""A saved prefix: the cache rows of a system text, run once, that dialogues start from without running it again.

A prefix is text, so every row of it ran in every layer, and its rows in a layer depend on nothing behind them. What
starts from it gives bit for bit what running the prefix and then the first prompt as two steps gives. It is not always
what one long prompt gives: a decision scores the rows of its own step only, so with a prefix the softmax of the first
question's decisions runs over the rows behind it, and the visual tokens kept may be others.

On disk it is an uncompressed `.npz` without pickle; equal prefixes are equal bytes:

| name | dtype, shape | meaning |
|---|---|---|
| header | uint8 [n] | JSON in UTF-8: `_Header` |
| token_ids | int64 [P] | what was run |
| lengths | int32 [stages] | valid cache rows of each stage |
| cache.{layer}.key, .value | as the engine's caches, [1, H_kv, rows, head_dim] | those rows |
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroute import scenario
from reroute.errors import UserError
from reroute.folders import write_whole
from reroute.manifest import decode

FORMAT = "reroute.prefix"
SCHEMA_VERSION = 1
AGAIN = "make it again for this bundle: `reroute run BUNDLE --system TEXT --save-prefix FILE`, or session.prefix(...)"


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of itself, besides the arrays.

    Attributes:
        format: `FORMAT`.
        schema_version: raised when a reader of the older form would go wrong.
        decoder_sha256: see `Bundle.decoder_sha256`.
        system: the system text.
        cut: see `Prefix.cut`.
        shift: see `Positions.shift`.
    """

    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION
    decoder_sha256: str
    system: str
    cut: int
    shift: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Cache rows of a system text; made by `Session.prefix`, taken by `Session.reset`.

    Attributes:
        system: the system text.
        token_ids: what was run of the template: every prompt with this system text starts with it.
        cut: tokens of the shared text that are not part of it, because a tokenizer may join them with a question.
        lengths: int32 [stages], valid cache rows of each stage.
        shift: how far the next position is ahead of the cache rows (see `Positions.shift`).
        caches: keys and values of each layer, [1, H_kv, rows, head_dim], read-only.
        decoder_sha256: of the engine that it belongs to (see `Bundle.decoder_sha256`).
    """

    system: str
    token_ids: tuple[int, ...]
    cut: int
    lengths: np.ndarray
    shift: int
    caches: tuple[tuple[np.ndarray, np.ndarray], ...]
    decoder_sha256: str

    def __post_init__(self) -> None:
        for array in (self.lengths, *(array for pair in self.caches for array in pair)):
            array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        """Bytes of the cache rows."""
        return sum(array.nbytes for pair in self.caches for array in pair)

    def rest(self, prompt_ids: Sequence[int]) -> list[int]:
        """The ids of a whole first prompt that are left to run. Raises UserError for a prompt that starts otherwise."""
        kept = len(self.token_ids)
        pairs = zip(self.token_ids, prompt_ids, strict=False)
        same = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(kept, len(prompt_ids)))
        if same == kept < len(prompt_ids):
            return list(prompt_ids[kept:])
        raise UserError(
            f"this prompt of {len(prompt_ids)} tokens and the prefix of {kept} part at token {same}: "
            f"{list(prompt_ids[same : same + 3])} and {list(self.token_ids[same : same + 3])}",
            hint="the tokenizer joins this question with the prefix, or the template writes the date: start without a "
            "prefix, session.reset(system=...)",
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises UserError."""
        header = _Header(decoder_sha256=self.decoder_sha256, system=self.system, cut=self.cut, shift=self.shift)
        text = json.dumps(dataclasses.asdict(header), ensure_ascii=False)
        arrays = {
            "header": np.frombuffer(text.encode("utf-8"), dtype=np.uint8),
            "token_ids": np.asarray(self.token_ids, dtype=np.int64),
            "lengths": self.lengths,
        }
        for layer, (key, value) in enumerate(self.caches):
            arrays |= {f"cache.{layer}.key": key, f"cache.{layer}.value": value}
        buffer = io.BytesIO()
        scenario.save(buffer, arrays)
        write_whole(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Prefix:
        """Read a file that `save` wrote; whether it fits an engine is checked where it is used. Raises UserError."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no prefix {path}", hint="make one with `reroute run ... --save-prefix FILE`")
        try:
            arrays = scenario.load(path)
        except UserError as error:
            raise UserError(error.message, hint=AGAIN) from error
        header = _read_header(arrays.pop("header", None), path)
        ids, lengths = arrays.pop("token_ids", None), arrays.pop("lengths", None)
        layers = len(arrays) // 2
        names = [f"cache.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        problem = ""
        if ids is None or lengths is None or sorted(names) != sorted(arrays) or not layers:
            problem = "its arrays are not those of a prefix"
        elif ids.dtype != np.int64 or ids.ndim != 1 or not len(ids):
            problem = f"its token ids are {ids.dtype} {list(ids.shape)}, not int64 [P]"
        elif lengths.dtype != np.int32 or lengths.ndim != 1 or (lengths != len(ids)).any():
            problem = f"it has {len(ids)} tokens, but {lengths.tolist()} cache rows"
        elif len({(array.shape, array.dtype) for array in arrays.values()}) != 1:
            problem = "its layers differ in shape or dtype"
        if problem:
            raise UserError(f"{path.name} is damaged: {problem}", hint=AGAIN)
        assert ids is not None
        assert lengths is not None
        return cls(
            system=header.system,
            token_ids=tuple(ids.tolist()),
            cut=header.cut,
            lengths=lengths,
            shift=header.shift,
            caches=tuple((arrays[f"cache.{layer}.key"], arrays[f"cache.{layer}.value"]) for layer in range(layers)),
            decoder_sha256=header.decoder_sha256,
        )


def _read_header(array: np.ndarray | None, path: Path) -> _Header:
    data: Any = None
    if array is not None and array.dtype == np.uint8:
        try:
            data = json.loads(array.tobytes().decode("utf-8"))
        except ValueError:
            data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path.name} is not a saved prefix", hint="give a file that --save-prefix wrote")
    if (version := data.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(
            f"{path.name} has schema version {version}, this Reroute reads version {SCHEMA_VERSION}", hint=AGAIN
        )
    try:
        return decode(_Header, data, where=path.name)
    except UserError as error:
        raise UserError(error.message, hint=AGAIN) from error
