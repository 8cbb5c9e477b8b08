"""The C++ tests: CPU reference against brute force, CUDA sources under the emulator, and the TensorRT adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from .conftest import PLUGINS, run


def test_ctest(build_folder: Path):
    output = run("ctest", "--test-dir", build_folder, "--output-on-failure")
    assert "100% tests passed" in output
    assert "kernels_emulated" in output


@pytest.mark.slow
def test_tensorrt_adapters(tmp_path: Path):
    """Only where nvcc is and TRT_INCLUDE_DIR names TensorRT's headers: see plugins_cpp/README.md."""
    headers = os.environ.get("TRT_INCLUDE_DIR", "")
    if not headers or shutil.which("nvcc") is None:
        pytest.skip("set TRT_INCLUDE_DIR and install nvcc to build the TensorRT adapters: they were not built")
    run("cmake", "-S", PLUGINS, "-B", tmp_path, f"-DTRT_INCLUDE_DIR={headers}", "-DCMAKE_CUDA_ARCHITECTURES=87-real")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    output = run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert "100% tests passed" in output
    assert "plugin_enqueue_emulated" in output


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["-DREROUTE_CUDA=MAYBE"], "it must be AUTO, ON or OFF"),
        (["-DREROUTE_CUDA=OFF", "-DTRT_INCLUDE_DIR=nowhere"], "has no NvInferRuntime.h"),
    ],
)
def test_a_wrong_configuration_is_refused(build_folder: Path, tmp_path: Path, options: list[str], hint: str):
    with pytest.raises(pytest.fail.Exception, match=hint):
        run("cmake", "-S", PLUGINS, "-B", tmp_path, *options)
