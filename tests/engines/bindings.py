"""The real TensorRT and cuda-python bindings, without TensorRT and without a GPU.

A bindings wheel is a few MiB and needs nine C functions of libraries that the index does not have: a stub of them makes
it importable. `python -m tests.engines.bindings` fetches the wheels (24 MiB in all) into a folder that later runs,
with or without a network, find again: REROUTE_BINDINGS_DIR, or .venv/bindings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Package, version, major version in the names of the libraries.
TENSORRT = (
    ("tensorrt-cu12-bindings", "10.3.0", 10),
    ("tensorrt-cu12-bindings", "10.15.1.29", 10),
    ("tensorrt-cu13-bindings", "10.16.1.11", 10),
    ("tensorrt-cu13-bindings", "11.4.0.106", 11),
)
CUDA = (("cuda-bindings", "12.9.4"), ("cuda-bindings", "13.2.0"))
_PATHFINDER = ("cuda-pathfinder", "1.9.0")  # what cuda-bindings imports
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")


def folder() -> Path:
    """Where the wheels are kept."""
    return Path(os.environ.get("REROUTE_BINDINGS_DIR") or REPOSITORY / ".venv" / "bindings")


def wheel(package: str, version: str) -> Path | None:
    """A fetched wheel that fits this Python, or None."""
    name = f"{package.replace('-', '_')}-{version}-"
    tags = ("py3-none-", f"cp{sys.version_info.major}{sys.version_info.minor}-")
    found = [p for p in folder().glob(f"{name}*.whl") if p.name.removeprefix(name).startswith(tags)]
    return found[0] if found else None


def fetch() -> list[str]:
    """Download what is missing from the package index; returns what could not be had."""
    lacking = []
    for package, version in (*((p, v) for p, v, _ in TENSORRT), *CUDA, _PATHFINDER):
        if wheel(package, version) is not None:
            continue
        folder().mkdir(parents=True, exist_ok=True)
        options = ("--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "10")
        command = [sys.executable, "-m", "pip", "download", *options, "--only-binary=:all:", "-d", str(folder())]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode or wheel(package, version) is None:
            lacking.append(f"{package} {version}")
    return lacking


def unpack(package: str, version: str, target: Path) -> Path:
    """Unpack a fetched wheel, with what it imports, into `target`, and return that."""
    names = [(package, version), *([_PATHFINDER] if package == "cuda-bindings" else [])]
    for name, number in names:
        path = wheel(name, number)
        assert path is not None, f"{name} {number} was not fetched"
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
    return target


def build_stub(target: Path, major: int) -> Path:
    """Compile the nine functions into the three libraries that the bindings link to; returns their folder."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "no C compiler"
    target.mkdir(parents=True, exist_ok=True)
    source = target / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for name in LIBRARIES:
        library = f"lib{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(target / library), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    return target


if __name__ == "__main__":
    if missing := fetch():
        print(f"not fetched: {', '.join(missing)}; tests of TensorRT's names will be skipped", file=sys.stderr)
    sys.exit(bool(missing))
