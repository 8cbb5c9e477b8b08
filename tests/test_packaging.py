"""What a wheel holds: the stages as real folders, and neither tests nor weights."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of what git knows or would add, so that the checkout stays clean."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        origin, copy = REPOSITORY / name, source / name
        if not (origin.exists() or origin.is_symlink()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(origin.readlink())
        else:
            copy.write_bytes(origin.read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(output), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("reroute-*.whl")
    return zipfile.ZipFile(path)


def modules_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["export", "engines", "runtime"])
def test_the_wheel_has_every_module_of_every_stage(wheel: zipfile.ZipFile, stage: str):
    names = set(wheel.namelist())
    modules = modules_of(REPOSITORY / stage)
    assert "__init__.py" in modules
    assert {f"reroute/{stage}/{module}" for module in modules} <= names


@pytest.mark.slow
def test_the_wheel_has_the_shared_modules_and_the_type_marker(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    assert {"reroute/manifest.py", "reroute/routing.py", "reroute/cli.py", "reroute/py.typed"} <= names


@pytest.mark.slow
def test_the_wheel_has_the_template_of_the_route_page(wheel: zipfile.ZipFile):
    page = (REPOSITORY / "runtime" / "page.html").read_bytes()
    assert wheel.read("reroute/runtime/page.html") == page


@pytest.mark.slow
def test_the_wheel_has_no_tests_weights_or_foreign_packages(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"reroute"}
    assert [name for name in names if name.endswith((".safetensors", ".onnx", ".data", ".npz", ".png"))] == []
    assert [name for name in names if "/tests/" in name or "/test_" in name] == []
    assert sum(info.file_size for info in wheel.infolist()) < 2_000_000


@pytest.mark.slow
def test_the_wheel_installs_the_command_and_no_heavy_requirement(wheel: zipfile.ZipFile):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "reroute = reroute.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    lines = wheel.read(f"{folder}/METADATA").decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    heavy = ("torch", "transformers", "onnx", "cuda", "tensorrt")
    assert required
    assert [line for line in required if any(name in line for name in heavy)] == []
