"""Every name, method and argument that our code says to TensorRT and CUDA exists in the real Python bindings.

This proves spelling, not behaviour: the libraries behind the bindings are stubs. The wheels come with `make test` where
the package index is reachable (`tests/engines/bindings.py`); `make check-tensorrt` fails where this skips.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import bindings

ENGINES, RUNTIME = bindings.REPOSITORY / "engines", bindings.REPOSITORY / "runtime"
TENSORRT_SOURCES = (ENGINES / "build_engine.py", RUNTIME / "tensorrt.py")
CUDA_SOURCES = (RUNTIME / "tensorrt_cuda.py",)
# The least that a walk must have seen, or it is the walk that is broken.
SEEN = {
    "Builder.create_network",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.parse_from_file",
    "IBuilderConfig.progress_monitor",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor.step_complete",
    "ParserError.node_name",
    "ILayer.type",
    "LayerType.PLUGIN_V3",
    "IPluginRegistry.load_library",
    "ICudaEngine.create_execution_context",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_device_memory",
    "EngineInspector.get_engine_information",
    "HardwareCompatibilityLevel.AMPERE_PLUS",
}


def unavailable(reason: str) -> None:
    if os.environ.get("REROUTE_BINDINGS") == "required":
        pytest.fail(reason)
    pytest.skip(f"{reason} (make check-tensorrt)")


def spelled(kind: str, module: str, folder: Path, sources: tuple[Path, ...], libraries: Path | None) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(libraries or "")}
    script = Path(__file__).with_name("spelling.py")
    command = [sys.executable, str(script), kind, module, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tensorrt(package, version, major, sources)`: what is used and what is wrong."""
    root = tmp_path_factory.mktemp("bindings")

    def check(package: str, version: str, major: int, sources: tuple[Path, ...] = TENSORRT_SOURCES) -> dict[str, Any]:
        if bindings.wheel(package, version) is None:
            unavailable(f"the wheel {package} {version} for this Python is not in the cache")
        if not (shutil.which("cc") or shutil.which("gcc")):
            unavailable("no C compiler for the stub libraries")
        folder = root / f"{package}-{version}"
        if not folder.exists():
            bindings.unpack(package, version, folder)
        return spelled(
            "tensorrt", "tensorrt_bindings", folder, sources, bindings.build_stub(root / f"stub{major}", major)
        )

    return check


@pytest.mark.parametrize(("package", "version", "major"), bindings.TENSORRT)
def test_tensorrt_has_every_name_that_is_used(tensorrt: Any, package: str, version: str, major: int) -> None:
    result = tensorrt(package, version, major)
    assert result["wrong"] == []
    assert set(result["uses"]) >= SEEN
    assert result["version"] == version


# Each with what the walk must answer; written as our code writes it.
MISTAKES = {
    "trt.Builder(logger).x; trt.BuilderFlagg.FP16": "BuilderFlagg does not exist",
    "x = 1 << int(trt.NetworkDefinitionCreationFlag.WEAKLY_TYPED)": "WEAKLY_TYPED does not exist",
    "builder.create_networks(1)": "Builder.create_networks does not exist",
    "profile.set_shape('x', minimum=1, opt=2, max=3)": "does not fit",
    "config.set_timing_cache(cache, True, False)": "does not fit",
    "context.set_tensor_address('x')": "does not fit",
    "config.optimization_level = 3": "IBuilderConfig.optimization_level does not exist",
    "self._vision.execute_async_v4(1)": "execute_async_v4 does not exist",
    "class M(trt.IProgressMonitor):\n    def phase_started(self, phase_name): pass": "phase_started does not exist",
    "class M(trt.IProgressMonitor):\n    def phase_finish(self): pass": "overrides",
}


@pytest.mark.parametrize("source", MISTAKES)
def test_a_misspelling_is_seen(tensorrt: Any, tmp_path: Path, source: str) -> None:
    (tmp_path / "wrong.py").write_text(source)
    package, version, major = bindings.TENSORRT[0]
    wrong = tensorrt(package, version, major, (tmp_path / "wrong.py",))["wrong"]
    assert any(MISTAKES[source] in line for line in wrong), wrong


def test_what_only_a_later_version_has_is_seen(tensorrt: Any, tmp_path: Path) -> None:
    """`get_aliased_input_tensor` came after 10.3; `device_memory_size` left with 11."""
    (tmp_path / "new.py").write_text("engine.get_aliased_input_tensor('x')\nengine.device_memory_size")
    sources = (tmp_path / "new.py",)
    oldest, newest = (tensorrt(*entry, sources)["wrong"] for entry in (bindings.TENSORRT[0], bindings.TENSORRT[-1]))
    assert [line.split(": ")[1] for line in oldest] == ["ICudaEngine.get_aliased_input_tensor does not exist"]
    assert [line.split(": ")[1] for line in newest] == ["ICudaEngine.device_memory_size does not exist"]


@pytest.mark.parametrize(("package", "version"), bindings.CUDA)
def test_cuda_python_has_every_name_that_is_used(package: str, version: str, tmp_path: Path) -> None:
    if bindings.wheel(package, version) is None:
        unavailable(f"the wheel {package} {version} for this Python is not in the cache")
    folder = bindings.unpack(package, version, tmp_path / "cuda")
    result = spelled("cuda", "cuda.bindings.runtime", folder, CUDA_SOURCES, None)
    assert result["wrong"] == []
    assert set(result["uses"]) >= {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyKind.cudaMemcpyHostToDevice"}
    (tmp_path / "wrong.py").write_text("self.call('cudaMallok', 1)\nself.call('cudaMalloc', 1, 2)")
    wrong = spelled("cuda", "cuda.bindings.runtime", folder, (tmp_path / "wrong.py",), None)["wrong"]
    assert len(wrong) == 2
