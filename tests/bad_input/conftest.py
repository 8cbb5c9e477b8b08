"""Every bad input goes through the command line, in this process, and must leave the disk as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from reroute import cli
from reroute.errors import EXIT_USAGE
from reroute.manifest import sha256_of

# What commands tell on stderr before they can know that something is wrong.
PROGRESS = ("reading the weights", "tracing the", "recording the", "verifying the", "lowering the", "checking the")


@dataclass(frozen=True)
class Refusal:
    """What a command printed.

    Attributes:
        message: after `error: `.
        hint: after `hint: `.
        stdout: data, such as a plan printed before.
    """

    message: str
    hint: str
    stdout: str


Refused = Callable[..., Refusal]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused: `refused("export", folder, says=["two", "36"], code=2)`.

    Asserts the exit code, the form of stderr, every word of `says` in it, and that nothing below tmp_path changed.
    """

    def run(*argv: object, says: str | list[str] = (), code: int = EXIT_USAGE) -> Refusal:  # type: ignore[assignment]
        before = tree(tmp_path)
        capsys.readouterr()
        exit_code = cli.main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert exit_code == code, err
        lines = err.splitlines()
        while lines and lines[0].startswith(PROGRESS):
            del lines[0]
        assert len(lines) == 3, err
        assert lines[0].startswith("error: ")
        assert lines[1] == ""
        assert lines[2].startswith("hint: ")
        for word in [says] if isinstance(says, str) else says:
            assert word in lines[0] + "\n" + lines[2]
        assert tree(tmp_path) == before
        return Refusal(lines[0].removeprefix("error: "), lines[2].removeprefix("hint: "), out)

    return run


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too, with the hash of its content."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def exported(tiny_export: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_export` to damage."""
    return Path(shutil.copytree(tiny_export, tmp_path / "export"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
