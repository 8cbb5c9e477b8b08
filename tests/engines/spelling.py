"""Run beside the real bindings: does everything that our code says to TensorRT exist there?

    python spelling.py tensorrt MODULE SOURCE...   with MODULE's folder on sys.path
    python spelling.py cuda MODULE SOURCE...

The sources are read, not run. Names are followed through the code by a small type inference: what a variable of a known
name is (`VARIABLES`), what a constructor makes, and what pybind11's docstrings say that a method takes and returns.
JSON on stdout: {"uses": [...], "wrong": [...]}. It needs the standard library only.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

# What our variables of these names hold, wherever they stand: a name means one thing in these files.
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "layer": "ILayer",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "_vision": "IExecutionContext",
}
MODULES = ("trt", "_trt")


def signatures(function: Any) -> list[tuple[list[str], int]]:
    """Argument names (without self) of each overload, and how many of them have no default."""
    result = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((.*)\) ->", line.strip())
        if not match or "*args" in match.group(1):
            continue
        parts = [part.strip() for part in re.split(r",(?![^\[<]*[\]>])", match.group(1)) if ":" in part]
        names = [part.split(":")[0].strip() for part in parts]
        required = sum("=" not in part for part in parts)
        own = names[:1] == ["self"]
        result.append((names[own:], required - own))
    return result


def accepts(function: Any, call: ast.Call) -> bool:
    """Whether some overload takes the call's number of positional arguments and its keywords."""
    found = signatures(function)
    unbound = isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"  # self is written out
    count, keywords = len(call.args) - unbound, {keyword.arg for keyword in call.keywords if keyword.arg}
    return not found or any(
        count <= len(names) and keywords <= set(names[count:]) and count + len(keywords) >= required
        for names, required in found
    )


class Walk(ast.NodeVisitor):
    """Collects every use of the module, and those that do not exist."""

    def __init__(self, module: Any, file: str) -> None:
        self.module, self.file = module, file
        self.uses: set[str] = set()
        self.wrong: list[str] = []

    def type_of(self, node: ast.AST) -> str | None:
        """Class of an expression, "module" for TensorRT itself, None for anything else."""
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in MODULES:
            return "module"
        if isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and self.is_self(node.value)):
            return VARIABLES.get(name)
        return None

    @staticmethod
    def is_self(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == "self"

    def resolve(self, node: ast.AST) -> Any:
        """The real object that an expression names, or None."""
        if self.type_of(node) == "module":
            return self.module
        if isinstance(node, ast.Attribute):
            kind = self.type_of(node.value)
            owner = getattr(self.module, kind, None) if kind not in (None, "module") else self.resolve(node.value)
            return None if owner is None else getattr(owner, node.attr, None)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self.type_of(node.value)
        text = ast.unparse(node)
        if kind is not None and kind != "module":
            self.check(node, f"{kind}.{node.attr}", hasattr(getattr(self.module, kind, None), node.attr))
        elif kind == "module" or (isinstance(node.value, ast.Attribute) and self.resolve(node.value) is not None):
            self.check(node, re.sub(r"^(self\.)?_?trt\.", "", text), self.resolve(node) is not None)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.resolve(node.func)
        if function is not None:
            made = function.__init__ if isinstance(function, type) else function
            if not accepts(made, node):
                self.wrong.append(f"{self.file}:{node.lineno}: {ast.unparse(node)} does not fit {signatures(made)}")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            parent: Any = self.resolve(base)
            for method in node.body if parent is not None else []:
                if not isinstance(method, ast.FunctionDef) or method.name.startswith("__"):
                    continue
                self.check(method, f"{ast.unparse(base).split('.')[-1]}.{method.name}", hasattr(parent, method.name))
                have = [argument.arg for argument in method.args.args[1:]]
                known = [names for names, _ in signatures(getattr(parent, method.name, None))]
                if known and have not in known:
                    self.wrong.append(f"{self.file}:{method.lineno}: {method.name}{have} overrides {known}")
        self.generic_visit(node)

    def check(self, node: Any, name: str, exists: bool) -> None:
        self.uses.add(name)
        if not exists:
            self.wrong.append(f"{self.file}:{node.lineno}: {name} does not exist")


class CudaWalk(ast.NodeVisitor):
    """`x.call("cudaName", ...)` and `x._runtime.Enum.member` of cuda-python."""

    def __init__(self, module: Any, file: str) -> None:
        self.module, self.file = module, file
        self.uses: set[str] = set()
        self.wrong: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        names = [arg.value for arg in ast.walk(node.args[0]) if isinstance(arg, ast.Constant)] if node.args else []
        if isinstance(node.func, ast.Attribute) and node.func.attr == "call":
            for name in (name for name in names if isinstance(name, str)):
                self.uses.add(name)
                function = getattr(self.module, name, None)
                match = re.match(rf"{name}\((.*)\)", (function.__doc__ or "").splitlines()[0]) if function else None
                if match is None:
                    self.wrong.append(f"{self.file}:{node.lineno}: {name} does not exist")
                elif (have := len(node.args) - 1) != (want := len([p for p in match.group(1).split(",") if p.strip()])):
                    self.wrong.append(f"{self.file}:{node.lineno}: {name} is called with {have} arguments of {want}")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        text = ast.unparse(node)
        if match := re.fullmatch(r"self\._runtime\.(\w+)\.(\w+)", text):
            self.uses.add(f"{match.group(1)}.{match.group(2)}")
            if not hasattr(getattr(self.module, match.group(1), None), match.group(2)):
                self.wrong.append(f"{self.file}:{node.lineno}: {text} does not exist")
        self.generic_visit(node)


def main() -> None:
    """Walk the sources and print the result."""
    kind, name, *sources = sys.argv[1:]
    module = importlib.import_module(name)
    uses: set[str] = set()
    wrong: list[str] = []
    for source in sources:
        walk = (Walk if kind == "tensorrt" else CudaWalk)(module, Path(source).name)
        walk.visit(ast.parse(Path(source).read_text(encoding="utf-8")))
        uses |= walk.uses
        wrong += walk.wrong
    print(json.dumps({"version": getattr(module, "__version__", ""), "uses": sorted(uses), "wrong": wrong}))


if __name__ == "__main__":
    main()
