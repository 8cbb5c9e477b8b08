"""CUDA as the TensorRT backend needs it: memory, copies, one stream and one graph, over cuda-python.

Every call of `cuda.bindings.runtime` returns a tuple that starts with an error code; here it becomes an exception.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

import numpy as np

from reroute.errors import UserError


class CudaError(RuntimeError):
    """A CUDA call failed."""


class Memory:
    """A piece of device memory, or of page-locked host memory; freed with the object.

    Attributes:
        address: where it starts.
        nbytes: its size.
    """

    def __init__(self, cuda: Cuda, nbytes: int, *, host: bool) -> None:
        self._cuda, self._host, self.nbytes = cuda, host, nbytes
        self.address = 0  # for __del__, should the allocation fail
        self.address = int(cuda.call("cudaHostAlloc", nbytes, 0) if host else cuda.call("cudaMalloc", nbytes))

    def __del__(self) -> None:
        if self.address:
            self._cuda.call("cudaFreeHost" if self._host else "cudaFree", self.address)

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A numpy view of host memory; it must not outlive this object."""
        if not self._host:
            raise ValueError("device memory has no view on the host")
        count = int(np.prod(shape, dtype=np.int64))
        if offset + count * dtype.itemsize > self.nbytes:
            raise ValueError(f"a view of {shape} {dtype} at {offset} in {self.nbytes} bytes")
        if not count:
            return np.zeros(shape, dtype)
        buffer = (ctypes.c_byte * (count * dtype.itemsize)).from_address(self.address + offset)
        return np.frombuffer(memoryview(buffer), dtype=dtype).reshape(shape)


class Cuda:
    """One device and one stream."""

    def __init__(self) -> None:
        """Open device 0. Raises UserError without cuda-python or without a GPU."""
        try:
            self._runtime: Any = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise UserError(
                f"the bundle needs cuda-python, which cannot be imported: {error}",
                hint='pip install "reroute[tensorrt]"; on JetPack 6 pip install "cuda-python>=12.6.1,<13"',
            ) from error
        self._to_device = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._to_host = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        try:
            self.call("cudaSetDevice", 0)
            self.stream: Any = self.call("cudaStreamCreate")
        except CudaError as error:
            raise UserError(f"there is no usable GPU: {error}", hint="`reroute doctor` says what is seen") from error

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the CUDA runtime; returns what it returns behind the error code."""
        code, *values = getattr(self._runtime, name)(*args)
        if int(code):
            raise CudaError(f"{name}: {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else tuple(values)

    def device(self) -> tuple[str, str]:
        """Compute capability, "8.7", and name of the device."""
        properties = self.call("cudaGetDeviceProperties", 0)
        return f"{properties.major}.{properties.minor}", properties.name.decode().rstrip("\0")

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, zeroed."""
        memory = Memory(self, nbytes, host=False)
        self.call("cudaMemsetAsync", memory.address, 0, nbytes, self.stream)
        return memory

    def allocate_host(self, nbytes: int) -> Memory:
        """Page-locked host memory, which copies and graphs need."""
        return Memory(self, nbytes, host=True)

    def to_device(self, target: int, source: int, nbytes: int) -> None:
        """Copy on the stream from host memory that stays as it is until the stream has passed."""
        if nbytes:
            self.call("cudaMemcpyAsync", target, source, nbytes, self._to_device, self.stream)

    def to_host(self, target: int, source: int, nbytes: int) -> None:
        """Copy on the stream into host memory."""
        if nbytes:
            self.call("cudaMemcpyAsync", target, source, nbytes, self._to_host, self.stream)

    def wait(self) -> None:
        """Until everything on the stream is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """From here to `end_capture` the stream records instead of running."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """What was recorded, ready for `launch`."""
        graph = self.call("cudaStreamEndCapture", self.stream)
        ready = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return ready

    def launch(self, graph: Any) -> None:
        """Run a recorded graph on the stream."""
        self.call("cudaGraphLaunch", graph, self.stream)
