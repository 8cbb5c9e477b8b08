"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reroute.errors import UserError
from reroute.folders import write_whole


def test_a_file_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "a.html"
    for data in (b"first, longer", b"second"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == ["a.html"]


def test_a_file_has_the_permissions_that_the_user_asks_for(tmp_path: Path):
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_keeps_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    write_whole(path, b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left on device"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(UserError, match="cannot write"):
        write_whole(path / "b.png", b"")
