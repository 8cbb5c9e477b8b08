"""TensorRT and cuda-python without a GPU: the same names, with ONNX Runtime in the place of engines.

`install` puts two modules into `sys.modules`. Device memory is ordinary memory at real addresses, filled with 0xFF
before it is given out, so that what is read before it is written shows as NaN. Nothing on the stream runs before
`cudaStreamSynchronize`, so a result that is read too early, or an input that is changed too early, is wrong here as
it would be there. An attribute that TensorRT does not have is an AttributeError here too; whether TensorRT has what
this module has is checked against the real bindings (`tests/engines/test_bindings.py`).
"""

from __future__ import annotations

import ctypes
import enum
import io
import json
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from reroute.engines import build_engine
from reroute.engines.dialects import PLUGIN_OPS, trt

VERSION = "10.16.1.11"
CAPABILITY = (8, 7)
DEVICE = "Fake Orin"


class Error(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815


class FakeCuda:
    """One device. `log` has the name of every call; `launches` counts graph launches."""

    def __init__(self) -> None:
        self.memory: dict[int, tuple[Any, int, str]] = {}
        self.queue: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.log: list[str] = []
        self.fail_capture = False
        self.devices = 1

    def enqueue(self, work: Callable[[], object]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def sized(self, address: int, nbytes: int, kind: str) -> bool:
        """Whether a range lies in one live allocation of that kind."""
        return any(
            own == kind and start <= address and address + nbytes <= start + size
            for start, (_, size, own) in self.memory.items()
        )

    def module(self) -> types.ModuleType:
        module = types.ModuleType("cuda.bindings.runtime")
        module.cudaMemcpyKind, module.cudaStreamCaptureMode = CopyKind, CaptureMode  # type: ignore[attr-defined]
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(module, name, self._logged(name))
        return module

    def _logged(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.log.append(name)
            return getattr(self, name)(*args)

        return call

    def _new(self, nbytes: int, kind: str) -> tuple[Error, int]:
        buffer = (ctypes.c_byte * (nbytes + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(address, 0xFF, nbytes)
        self.memory[address] = (buffer, nbytes, kind)
        return Error.cudaSuccess, address

    def cudaSetDevice(self, device: int) -> tuple[Error]:  # noqa: N802
        return (Error.cudaSuccess if device < self.devices else Error.cudaErrorInvalidValue,)

    def cudaStreamCreate(self) -> tuple[Error, int]:  # noqa: N802
        return Error.cudaSuccess, 7

    def cudaGetDeviceProperties(self, device: int) -> tuple[Error, Any]:  # noqa: N802
        del device
        major, minor = CAPABILITY
        return Error.cudaSuccess, types.SimpleNamespace(major=major, minor=minor, name=DEVICE.encode() + b"\0")

    def cudaMalloc(self, nbytes: int) -> tuple[Error, int]:  # noqa: N802
        return self._new(nbytes, "device")

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Error, int]:  # noqa: N802
        assert flags == 0
        return self._new(nbytes, "host")

    def cudaFree(self, address: int) -> tuple[Error]:  # noqa: N802
        assert self.memory.pop(address)[2] == "device"
        return (Error.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> tuple[Error]:  # noqa: N802
        assert self.memory.pop(address)[2] == "host"
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Error]:  # noqa: N802
        assert stream == 7
        assert self.sized(address, nbytes, "device")
        self.enqueue(lambda: ctypes.memset(address, value, nbytes))
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> tuple[Error]:
        assert stream == 7
        up = kind is CopyKind.cudaMemcpyHostToDevice
        assert self.sized(source, nbytes, "host" if up else "device")
        assert self.sized(target, nbytes, "device" if up else "host")
        self.enqueue(lambda: ctypes.memmove(target, source, nbytes))
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:  # noqa: N802
        assert stream == 7
        assert self.recording is None, "a captured stream cannot be waited for"
        while self.queue:
            self.queue.pop(0)()
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:  # noqa: N802
        assert (stream, mode) == (7, CaptureMode.cudaStreamCaptureModeThreadLocal)
        self.recording = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:  # noqa: N802
        assert stream == 7
        recorded, self.recording = self.recording, None
        if self.fail_capture:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:  # noqa: N802
        assert flags == 0
        return Error.cudaSuccess, tuple(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:  # noqa: N802
        del graph
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Error]:  # noqa: N802
        assert stream == 7
        for work in graph:
            self.enqueue(work)
        return (Error.cudaSuccess,)


class FakeTensorRT:
    """The parts of the module `tensorrt` that this project uses.

    Attributes:
        drop_plugins: pretend that a parser took functions instead of plugins.
        refuse: file names that do not parse.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.libraries: list[str] = []
        self.drop_plugins = False
        self.refuse: set[str] = set()
        self.configs: list[Config] = []
        self.contexts: list[Context] = []

    def module(self) -> types.ModuleType:
        module: Any = types.ModuleType("tensorrt")
        owner = self
        module.__version__ = VERSION
        module.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
        module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
        module.ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", {"DETAILED": 2})
        module.MemoryPoolType = enum.IntEnum("MemoryPoolType", {"WORKSPACE": 0})
        module.HardwareCompatibilityLevel = enum.IntEnum("HardwareCompatibilityLevel", {"AMPERE_PLUS": 1})
        module.LayerInformationFormat = enum.IntEnum("LayerInformationFormat", {"JSON": 1})
        module.ExecutionContextAllocationStrategy = Strategy
        module.LayerType = LayerKind
        module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        module.get_plugin_registry = lambda: Registry(owner)
        module.Builder = lambda logger: Builder(owner)
        module.OnnxParser = lambda network, logger: Parser(owner, network)
        module.Runtime = lambda logger: Runtime(owner)
        return module


class Strategy(enum.IntEnum):
    USER_MANAGED = 2


class LayerKind(enum.IntEnum):
    MATRIX_MULTIPLY = 1
    PLUGIN_V3 = 2


class Registry:
    __slots__ = ("_owner",)

    def __init__(self, owner: FakeTensorRT) -> None:
        self._owner = owner

    def load_library(self, plugin_path: str) -> object | None:
        if Path(plugin_path).read_bytes() != b"plugin" or self._owner.libraries:
            return None
        self._owner.libraries.append(plugin_path)
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:
        known = self._owner.libraries and type in PLUGIN_OPS and (version, plugin_namespace) == ("1", "")
        return object() if known else None


class Network:
    __slots__ = ("kinds", "model", "num_layers")

    def get_layer(self, index: int) -> Any:
        return types.SimpleNamespace(type=self.kinds[index])


class Parser:
    __slots__ = ("_network", "_owner", "num_errors")

    def __init__(self, owner: FakeTensorRT, network: Network) -> None:
        self._owner, self._network, self.num_errors = owner, network, 0

    def parse_from_file(self, model: str) -> bool:
        if Path(model).name in self._owner.refuse:
            self.num_errors = 1
            return False
        graph = onnx.load(model)
        assert not graph.functions
        kinds = [node.op_type in PLUGIN_OPS and not self._owner.drop_plugins for node in graph.graph.node]
        self._network.kinds = [LayerKind.PLUGIN_V3 if own else LayerKind.MATRIX_MULTIPLY for own in kinds]
        self._network.num_layers = len(kinds)
        self._network.model = graph
        return True

    def get_error(self, index: int) -> Any:
        assert index == 0
        return types.SimpleNamespace(
            node_name=lambda: "node_7", node_operator=lambda: "TopK", desc=lambda: "K must be positive"
        )


class Profile:
    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(0 <= low <= mid <= high for low, mid, high in zip(min, opt, max, strict=True))
        self.spans[input] = (min, opt, max)


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"."


class Config:
    __slots__ = (
        "builder_optimization_level",
        "cache",
        "hardware_compatibility_level",
        "pools",
        "profiles",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.pools: dict[int, int] = {}
        self.progress_monitor: Any = None

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: int, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return cache.data != b"another device"


class Builder:
    __slots__ = ("_owner",)

    def __init__(self, owner: FakeTensorRT) -> None:
        self._owner = owner

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << 1, "not strongly typed"
        return Network()

    def create_builder_config(self) -> Config:
        self._owner.configs.append(Config())
        return self._owner.configs[-1]

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        config.progress_monitor.phase_start("Building engine", None, 2)
        assert config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        model = onnx.ModelProto()
        model.CopyFrom(network.model)
        ops = sorted({node.op_type for node in model.graph.node if node.op_type in PLUGIN_OPS})
        model.functions.extend(_function(op, model) for op in ops)
        meta = {
            "version": VERSION,
            "profiles": [profile.spans for profile in config.profiles],
            "plugins": [node.output[0] for node in model.graph.node if node.op_type in PLUGIN_OPS],
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in (
                ("meta", json.dumps(meta).encode()),
                ("model", model.SerializeToString(deterministic=True)),
            ):
                archive.writestr(zipfile.ZipInfo(name), data)  # without the time
        return buffer.getvalue()


class Runtime:
    __slots__ = ("_owner",)

    def __init__(self, owner: FakeTensorRT) -> None:
        self._owner = owner

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        try:
            with zipfile.ZipFile(io.BytesIO(serialized_engine)) as archive:
                return Engine(self._owner, json.loads(archive.read("meta")), archive.read("model"))
        except zipfile.BadZipFile:
            return None


class Engine:
    __slots__ = ("_meta", "_names", "_owner", "device_memory_size_v2", "num_io_tensors", "num_optimization_profiles",
                 "session")  # fmt: skip

    def __init__(self, owner: FakeTensorRT, meta: dict[str, Any], model: bytes) -> None:
        self._owner, self._meta = owner, meta
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(meta["profiles"])
        self.device_memory_size_v2 = 4096

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def create_execution_context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        self._owner.contexts.append(Context(self._owner.cuda, self, self._meta["profiles"]))
        return self._owner.contexts[-1]

    def create_engine_inspector(self) -> Any:
        layers = [{"Name": name, "LayerType": "PluginV3"} for name in self._meta["plugins"]]
        # Each profile has its own layers, named after it from the second on.
        layers += [{**layer, "Name": f"{layer['Name']} [profile 1]"} for layer in layers]
        text = json.dumps({"Layers": [*layers, {"Name": "gemm", "LayerType": "gemm"}]})
        return types.SimpleNamespace(get_engine_information=lambda format: text)


class Context:
    __slots__ = ("_cuda", "_engine", "_profiles", "addresses", "index", "memory", "runs", "shapes")

    def __init__(self, cuda: FakeCuda, engine: Engine, profiles: list[dict[str, Any]]) -> None:
        self._cuda, self._engine, self._profiles = cuda, engine, profiles
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            value.name: tuple(value.shape)
            for value in engine.session.get_inputs()
            if all(isinstance(size, int) for size in value.shape)
        }
        self.index, self.memory, self.runs = -1, (0, 0), 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        assert self._cuda.sized(memory, size, "device")
        self.memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 7
        self.index = profile_index
        return 0 <= profile_index < len(self._profiles)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory
        assert name in self._engine._names
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        span = self._profiles[self.index].get(name)
        if span is None:
            return self.shapes.get(name) == tuple(shape)
        low, _, high = span
        inside = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        if inside:
            self.shapes[name] = tuple(shape)
        return inside

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Snapshot shapes and addresses now, run when the stream comes to it."""
        assert stream_handle == 7
        assert self.memory[0]
        inputs = self._engine.session.get_inputs()
        if any(value.name not in self.shapes or value.name not in self.addresses for value in inputs):
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self._cuda.enqueue(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.runs += 1
        feed = {
            value.name: self._array(addresses[value.name], value.type, shapes[value.name]).copy()
            for value in self._engine.session.get_inputs()
        }
        names = [value.name for value in self._engine.session.get_outputs()]
        for value, array in zip(self._engine.session.get_outputs(), self._engine.session.run(names, feed), strict=True):
            made = np.asarray(array)
            self._array(addresses[value.name], value.type, made.shape)[...] = made

    def _array(self, address: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8",
                          "tensor(int32)": "i4"}[kind])  # fmt: skip
        count = int(np.prod(shape, dtype=np.int64))
        assert self._cuda.sized(address, count * dtype.itemsize, "device")
        if not count:
            return np.zeros(shape, dtype)
        buffer = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
        return np.frombuffer(memoryview(buffer), dtype=dtype).reshape(shape)


def _function(name: str, model: onnx.ModelProto) -> onnx.FunctionProto:
    """What the plugin computes, as a function of standard operators."""
    from reroute.export import onnx_ops

    bodies = {function.name: function for function in onnx_ops.functions()}
    bodies["RerouteSelect"] = onnx.parser.parse_function(trt.SELECT)
    function = bodies[name]
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    for entry in function.opset_import:
        entry.version = opset if entry.domain == "" else entry.version
    return function


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTensorRT, FakeCuda]:
    """Put both modules where `import_module` finds them, and a driver for the build."""
    cuda = FakeCuda()
    tensorrt = FakeTensorRT(cuda)
    package = types.ModuleType("cuda")
    bindings = types.ModuleType("cuda.bindings")
    modules = {
        "tensorrt": tensorrt.module(),
        "cuda": package,
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": cuda.module(),
    }
    for name, module in modules.items():
        monkeypatch.setitem(__import__("sys").modules, name, module)
    major, minor = CAPABILITY
    device = build_engine.Device(f"{major}.{minor}", DEVICE, 64 * 2**30)
    monkeypatch.setattr(build_engine, "cuda_device", lambda: device)
    return tensorrt, cuda
