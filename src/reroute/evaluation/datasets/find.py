"""From the path that the user gave to the files of one split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from reroute.errors import UserError
from reroute.evaluation.datasets.json_files import first_file
from reroute.evaluation.datasets.local import check_split
from reroute.evaluation.datasets.parquet import shards, split_of

_PICKLES = (".p", ".pkl", ".pickle")


def find(
    path: Path, split: str | None, *, dataset: str, splits: Sequence[str], folders: Sequence[str], names: Sequence[str]
) -> tuple[str, Literal["parquet", "json"], list[Path]]:
    """The files of a split.

    Args:
        path: a file, or a folder as downloaded.
        split: which one; None for the one that the file's name says, or the first.
        dataset: for messages.
        splits: that the dataset has.
        folders: below `path`, where parquet shards are looked for; the first that has the split is taken.
        names: of annotation files in `path`, with {split} for the split; the first that is there is taken.

    Returns:
        The split, the layout, and its files in order.

    Raises:
        UserError: no such path, split or files, a pickle, or a file of another split.
    """
    if split is not None:
        check_split(dataset, split, splits)
    if path.is_file():
        layout = _layout_of(path)
        told = split_in(path, splits)
        if split is not None and told is not None and told != split:
            raise UserError(
                f"{path} is of the split {told!r}, {split!r} was asked for", hint="give the file of that split"
            )
        return split or told or splits[0], layout, [path]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}", hint=f"give the {dataset} data as downloaded")
    split = split or splits[0]
    for folder in folders:
        if files := shards(path / folder.format(split=split), split):
            return split, "parquet", files
    if (file := first_file(path, [name.format(split=split) for name in names])) is not None:
        return split, "json", [file]
    if pickles := sorted(p for p in path.iterdir() if p.suffix in _PICKLES):
        raise _pickle(pickles[0])
    looked = [f"{folder.format(split=split)}/{split}-*.parquet".lstrip("/") for folder in folders]
    looked += [name.format(split=split) for name in names]
    raise UserError(f"{path} has no files of {dataset}, split {split!r}", hint=f"looked for {', '.join(looked)}")


def split_in(path: Path, splits: Sequence[str]) -> str | None:
    """The split that a file's name tells, or None."""
    told = split_of(path)
    if told is None:
        match = re.search(rf"(?:^|_)({'|'.join(sorted(splits, key=len, reverse=True))})(?=_|$)", path.stem)
        told = match[1] if match else None
    return told


def _layout_of(path: Path) -> Literal["parquet", "json"]:
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix in (".json", ".jsonl"):
        return "json"
    if path.suffix in _PICKLES:
        raise _pickle(path)
    raise UserError(f"{path} is of an unknown kind", hint="supported: .parquet, .json, .jsonl, or a folder of them")


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run code when it is read: it is not read here",
        hint="use the parquet files of lmms-lab, or the same annotations as JSON (docs/evaluation.md)",
    )
