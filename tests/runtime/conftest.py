"""A bundle without graphs, a tokenizer of each kind, and a backend that needs no engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from reroute.manifest import Manifest
from reroute.runtime.bundle import Bundle
from tests.runtime import fakes


@pytest.fixture
def word_tokenizer() -> Tokenizer:
    return fakes.word_tokenizer()


@pytest.fixture(scope="session")
def sentence_tokenizer() -> Tokenizer:
    return fakes.sentence_tokenizer()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return fakes.byte_tokenizer()


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Write and open a bundle: `make_bundle(routing=..., max_text=..., template=..., tokenizer=...)`."""

    def make(**options: object) -> Bundle:
        folder = tmp_path / "bundle"
        fakes.write_bundle(folder, **options)  # type: ignore[arg-type]
        return Bundle.open(folder)

    return make


@pytest.fixture
def manifest() -> Manifest:
    return fakes.make_manifest(files={})
