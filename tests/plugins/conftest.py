"""Builds the CPU part of plugins_cpp once, in pytest's cache folder, so that a second run only relinks what changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .cpu_library import CpuLibrary

PLUGINS = Path(__file__).resolve().parents[2] / "plugins_cpp"


def run(*command: str | Path) -> str:
    """Output of a build command; its last lines are the failure if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} exited with {result.returncode}:\n{output[-4000:]}", pytrace=False)
    return output


@pytest.fixture(scope="session")
def build_folder(request: pytest.FixtureRequest) -> Path:
    """plugins_cpp without CUDA: CPU reference, C ABI, and the CUDA sources under the block emulator."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed: the C++ kernels were not built")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        pytest.skip("no C++ compiler is installed: the C++ kernels were not built")
    cache = request.config.cache
    assert cache is not None
    folder = Path(cache.mkdir("plugins-cpp"))
    run("cmake", "-S", PLUGINS, "-B", folder, "-DREROUTE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture(scope="session")
def cpu(build_folder: Path) -> CpuLibrary:
    """The CPU kernels, called through their C ABI."""
    return CpuLibrary(build_folder / "libreroute_cpu.so")
