"""Outputs appear whole or not at all: a folder or file is written beside its place and then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from reroute.errors import UserError
from reroute.manifest import FILE_NAME


def written_by_stage(folder: Path) -> set[str]:
    """Names at the top of an export or bundle, of any schema version, as its manifest lists them; else nothing."""
    try:
        files = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["files"]
        return {FILE_NAME, *(Path(name).parts[0] for name in files)} if files else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def check_output(output: Path, *, force: bool, written: Callable[[Path], set[str]] = written_by_stage) -> None:
    """Refuse an output that would overwrite something. Raises UserError.

    `force` replaces an earlier output of the same kind, never a folder that Reroute did not write or that something
    was added to. `written` names what an earlier output holds, and nothing for any other folder.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir() or not written(output):
        what = "a Reroute export or bundle" if written is written_by_stage else "an earlier output of this command"
        raise UserError(f"{output} exists and is not {what}", hint="choose another output, or remove it")
    if not force:
        raise UserError(f"{output} exists already", hint="add --force to replace it")
    if strange := sorted({path.name for path in output.iterdir()} - written(output)):
        raise UserError(
            f"{output} holds {strange[0]}, which Reroute did not write", hint="move it away: --force would delete it"
        )


@contextlib.contextmanager
def whole_folder(
    output: Path, *, force: bool, written: Callable[[Path], set[str]] = written_by_stage
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` when the block ends without an exception.

    Raises:
        UserError: as `check_output`, or the parent cannot be written to.
    """
    check_output(output, force=force, written=written)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}", hint="choose another output") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it: readers see the old one or the new one. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        staging = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            staging.chmod(0o666 & ~_umask())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", hint="choose another path") from error


def _replace(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; what was there before goes only after the new one stands."""
    if not output.exists():
        staging.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(old / output.name)
    try:
        staging.rename(output)
    except OSError:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
