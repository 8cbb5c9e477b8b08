"""What the registry promises: at most two files for a model, and no model's name behind the export."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from reroute.export import models
from reroute.manifest import Model
from tests.conftest import REPOSITORY

PLACES = [
    REPOSITORY / "export" / "decoder.py",
    REPOSITORY / "export" / "trace.py",
    REPOSITORY / "export" / "reference.py",
    *sorted((REPOSITORY / "engines").rglob("*.py")),
    *sorted((REPOSITORY / "runtime").rglob("*.py")),
]
NAMES = ("llava", "qwen")


def code_words(source: str) -> set[str]:
    """Names and strings of a module, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
    text = ast.unparse(tree)
    kinds = (tokenize.NAME, tokenize.STRING)
    return {token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type in kinds}


@pytest.mark.parametrize("path", PLACES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_model_is_named_behind_the_export(path: Path) -> None:
    words = code_words(path.read_text(encoding="utf-8"))
    assert "model_type" not in words
    assert not [word for word in words if any(name in word.lower() for name in NAMES)]


def test_a_name_would_be_seen() -> None:
    assert "'qwen3_vl'" in code_words('def f(m):\n    """Qwen."""\n    return m == "qwen3_vl"\n')
    assert not [word for word in code_words('def f():\n    """Qwen."""\n') if "Qwen" in word]


def test_a_model_is_at_most_two_files() -> None:
    """Every file of the folder belongs to a model, or is what the models of a family share."""
    files = {path.stem for path in (REPOSITORY / "export" / "models").glob("*.py")} - {"__init__"}
    assert files == {*models.FAMILIES, "qwen_vl"}
    for name, family in models.FAMILIES.items():
        homes = {function.__module__.rpartition(".")[2] for function in (family.read, family.build_decoder)}
        assert homes == {name}
    assert "model_type" in Model.__dataclass_fields__
