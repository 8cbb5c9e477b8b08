"""What the runtime may import: neither the toolchain of the other stages nor the other stages."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reroute.runtime
from reroute.runtime import Session
from tests.runtime import fakes

SOURCES = sorted(Path(reroute.runtime.__file__).parent.glob("*.py"))
FORBIDDEN = ("torch", "transformers", "onnx", "onnxscript", "reroute.export", "reroute.engines")


def imported(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name} has a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_forbidden_import_is_written(source: Path) -> None:
    for name in imported(source):
        assert not any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_syntax_is_python_3_10(source: Path) -> None:
    ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 10))


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_using_every_module_imports_nothing_forbidden(tmp_path: Path) -> None:
    fakes.write_bundle(tmp_path / "bundle")
    code = """
import importlib, pkgutil, sys
import numpy as np
import reroute.runtime
from reroute.runtime import Bundle
for module in pkgutil.iter_modules(reroute.runtime.__path__):
    importlib.import_module("reroute.runtime." + module.name)
bundle = Bundle.open(sys.argv[1])
bundle.chat().first_turn([{"role": "user", "content": [{"type": "text", "text": "where"}]}])
from reroute.runtime.image import open_image, preprocess
preprocess(open_image(np.zeros((9, 9, 3), np.uint8)), bundle.manifest.model.image)
bad = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "reroute.export", "reroute.engines")
print([name for name in bad if name in sys.modules])
"""
    assert run(code, str(tmp_path / "bundle")).strip() == "[]"


def test_answering_from_an_engine_imports_nothing_forbidden(tiny_bundle: Path) -> None:
    code = """
import sys
import numpy as np
from reroute.runtime import Session
with Session.open(sys.argv[1]) as session:
    answer = session.ask("where is the red circle ?", np.zeros((40, 60, 3), np.uint8), max_new_tokens=3)
    assert len(answer.token_ids) >= 1
print([name for name in ("torch", "transformers", "onnx", "onnxscript") if name in sys.modules])
"""
    assert run(code, str(tiny_bundle)).strip() == "[]"


def test_the_package_alone_loads_no_library() -> None:
    code = """
import sys
import reroute.runtime
heavy = ("numpy", "PIL", "tokenizers", "jinja2", "onnxruntime")
print([name for name in heavy if name in sys.modules])
for name in reroute.runtime.__all__:
    getattr(reroute.runtime, name)
"""
    assert run(code).strip() == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="Sesion"):
        _ = reroute.runtime.Sesion


LIBRARIES = ("PIL", "tokenizers", "jinja2", "onnxruntime", "rich")


def test_the_session_class_loads_no_library_but_numpy() -> None:
    code = f"""
import sys
from reroute.runtime import Answer, Bundle, Features, Prefix, Sampling, Session
print([name for name in {LIBRARIES!r} if name in sys.modules], "numpy" in sys.modules)
"""
    assert run(code).strip() == "[] True"


def test_a_dialogue_of_text_loads_no_pillow_and_one_with_an_image_does(tiny_bundle: Path) -> None:
    code = f"""
import sys
import numpy as np
from reroute.runtime import Session
with Session.open(sys.argv[1], threads=1) as session:
    session.ask("where is the red circle ?", max_new_tokens=2)
    print([name for name in {LIBRARIES!r} if name in sys.modules])
    session.ask("where is it ?", np.zeros((40, 60, 3), np.uint8), max_new_tokens=1)
    print("PIL" in sys.modules)
"""
    assert run(code, str(tiny_bundle)).splitlines() == ["['tokenizers', 'jinja2', 'onnxruntime']", "True"]


def test_a_session_does_not_read_the_recorded_reference(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "reference.npz").unlink()
    with Session.open(tmp_path / "bundle", threads=1, verify=False) as session:
        assert session.ask("where is the red circle ?", max_new_tokens=1).text is not None
