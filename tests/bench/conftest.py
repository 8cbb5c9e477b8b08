"""Bundles for tests of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_dense_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense engine of `tiny_checkpoint`, unchecked. Do not change it."""
    from reroute.engines import build
    from reroute.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tiny-dense")
    export_checkpoint(tiny_checkpoint, folder / "export", routing="dense")
    build(folder / "export", folder / "bundle", check=False)
    return folder / "bundle"
