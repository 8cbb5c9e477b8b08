"""Who may import whom. The rules are what lets the runtime live on a Jetson without torch.

The walk sees imports anywhere in a file, also inside functions; imports for type checkers only do not count.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "reroute"
FORBIDDEN = {
    "runtime": {"torch", "transformers", "onnx", "onnxscript", "polygraphy", "safetensors", "reroute.export",
                "reroute.engines", "reroute.demo", "reroute.check"},
    "export": {"reroute.runtime", "reroute.engines", "reroute.demo"},
    "engines": {"torch", "transformers", "onnxscript", "reroute.export", "reroute.demo"},
}  # fmt: skip
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "safetensors", "polygraphy"}
# Modules that the stages share: the standard library, and each other.
SHARED = (
    "__init__",
    "boxes",
    "cost",
    "errors",
    "folders",
    "manifest",
    "published",
    "routing",
    "schedule",
    "solver",
    "tower_cost",
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Absolute names that a module imports: for `from a import b` both `a` and `a.b`."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") + ["__init__"] * is_package
                base = ".".join([*parents[: -node.level], *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        if is_type_checking(node) and isinstance(node, ast.If):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))
    return found


def breaks(names: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in names for bad in forbidden if name == bad or name.startswith(bad + ".")}


def files_of(stage: str) -> list[Path]:
    return sorted((PACKAGE / stage).resolve().rglob("*.py"))


def imports_of_file(path: Path, stage: str) -> set[str]:
    relative = path.relative_to((PACKAGE / stage).resolve()).with_suffix("")
    is_package = relative.name == "__init__"
    parts = relative.parts[:-1] if is_package else relative.parts
    return imports_of(path.read_text(encoding="utf-8"), ".".join(("reroute", stage, *parts)), is_package=is_package)


@pytest.mark.parametrize("stage", sorted(FORBIDDEN))
def test_a_stage_imports_nothing_that_it_must_live_without(stage: str):
    files = files_of(stage)
    assert files, f"no modules in {stage}: the symlinks under src/reroute are broken"
    wrong = {path.name: breaks(imports_of_file(path, stage), FORBIDDEN[stage]) for path in files}
    assert {name: bad for name, bad in wrong.items() if bad} == {}


@pytest.mark.parametrize("name", SHARED)
def test_shared_modules_need_only_the_standard_library(name: str):
    names = imports_of((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), f"reroute.{name}")
    roots = {name.split(".")[0] for name in names}
    # tomli is the standard library's tomllib for Python 3.10.
    assert roots - {"reroute", "tomli"} <= sys.stdlib_module_names
    allowed = {f"reroute.{shared}" for shared in SHARED}
    others = {name for name in names if name.startswith("reroute.")}
    assert others == {other for other in others if any(f"{other}.".startswith(f"{ok}.") for ok in allowed)}


def test_engines_reach_the_runtime_only_through_the_check():
    names = set[str]().union(*(imports_of_file(path, "engines") for path in files_of("engines")))
    assert breaks(names, {"reroute.runtime"}) == set()


@pytest.mark.parametrize("stage", ["export", "engines", "runtime", "demo"])
def test_bare_names_of_the_top_level_folders_are_not_imported(stage: str):
    for path in files_of(stage):
        assert breaks(imports_of_file(path, stage), {"export", "engines", "runtime", "demo"}) == set(), path.name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("def f():\n    from torch import nn", {"torch", "torch.nn"}),
        ("from ..export import trace", {"reroute.export", "reroute.export.trace"}),
        ("from .ort import OrtBackend", {"reroute.runtime.ort", "reroute.runtime.ort.OrtBackend"}),
        ("from . import ort", {"reroute.runtime", "reroute.runtime.ort"}),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            {"typing", "typing.TYPE_CHECKING"},
        ),
        ("try:\n    import onnx\nexcept ImportError:\n    pass", {"onnx"}),
    ],
)
def test_the_walk_sees_every_kind_of_import(source: str, expected: set[str]):
    assert imports_of(source, "reroute.runtime.session") == expected


def test_a_forbidden_name_is_not_confused_with_a_longer_one():
    assert breaks({"onnxruntime", "torchvision", "onnx.checker"}, {"onnx", "torch"}) == {"onnx.checker"}


def test_every_module_of_the_runtime_loads_without_torch_transformers_and_onnx():
    """The same for what imports import: in a process where the heavy packages cannot be found."""
    modules = [
        ".".join(("reroute.runtime", *path.relative_to((PACKAGE / "runtime").resolve()).with_suffix("").parts))
        for path in files_of("runtime")
    ]
    code = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name.removesuffix(".__init__"))
import reroute.runtime
for name in reroute.runtime.__all__:
    getattr(reroute.runtime, name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
