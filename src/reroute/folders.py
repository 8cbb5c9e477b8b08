"""Outputs appear whole or not at all: a folder is written beside its place and then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reroute.errors import UserError
from reroute.manifest import FILE_NAME


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that would overwrite something. Raises UserError.

    `force` replaces an earlier export or bundle, never a folder that Reroute did not write or that something was
    added to.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir() or not _written(output):
        raise UserError(
            f"{output} exists and is not a Reroute export or bundle",
            hint="choose another output, or remove it",
        )
    if not force:
        raise UserError(f"{output} exists already", hint="add --force to replace it")
    if strange := sorted({path.name for path in output.iterdir()} - _written(output)):
        raise UserError(
            f"{output} holds {strange[0]}, which Reroute did not write", hint="move it away: --force would delete it"
        )


@contextlib.contextmanager
def whole_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` when the block ends without an exception.

    Raises:
        UserError: as `check_output`, or the parent cannot be written to.
    """
    check_output(output, force=force)
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


def _written(folder: Path) -> set[str]:
    """Names at the top of an export or bundle, of any schema version, as its manifest lists them; else nothing."""
    try:
        files = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["files"]
        return {FILE_NAME, *(Path(name).parts[0] for name in files)} if files else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
