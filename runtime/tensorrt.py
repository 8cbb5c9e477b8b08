"""The TensorRT backend: one engine with a prefill and a decode profile, over TensorRT's Python API and cuda-python.

Caches are allocated once and bound as past and as present of their layer at one address, so a step appends rows in
place. A decode step is one launch of a CUDA graph: the copy of its few inputs, the engine, and the copy of the token
that the graph chose; the logits stay on the device until someone asks for them. A prompt runs eagerly and also returns
the routes.

The two contexts and the vision engine never run at the same time, so they share one scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from reroute.errors import RerouteError, UserError
from reroute.runtime.backend import BackendOptions, StepOutputs, require_rows
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import StepInputs, rows_added
from reroute.runtime.positions import VisualTokens
from reroute.runtime.tensorrt_cuda import Cuda, Memory
from reroute.runtime.tensorrt_fit import require_fit
from reroute.runtime.tensorrt_graph import CapturedStep
from reroute.runtime.tensorrt_plan import (
    Block,
    plan_decoder,
    plan_vision,
    profile_of_step,
    profiles_of,
    step_arrays,
)


class DeviceOutputs(StepOutputs):
    """Outputs whose logits are brought to the host when they are read; valid until the next step."""

    def __init__(
        self, *, read: Callable[[], np.ndarray], routes: tuple[np.ndarray, ...], greedy: tuple[int, float]
    ) -> None:
        # The parent is frozen, and its `logits` is the property below.
        for name, value in (("_read", read), ("routes", routes), ("greedy", greedy)):
            object.__setattr__(self, name, value)

    @property
    def logits(self) -> np.ndarray:  # type: ignore[override]
        """float32 [1, V] of the last row."""
        return self._read()  # type: ignore[attr-defined]


class Room:
    """A block of tensors on the device with page-locked memory of the same layout beside it."""

    def __init__(self, cuda: Cuda, block: Block) -> None:
        self._cuda, self.places = cuda, block.places
        self.device, self.host = cuda.allocate(block.nbytes), cuda.allocate_host(block.nbytes)

    def address(self, name: str) -> int:
        """Device address of a tensor."""
        return self.device.address + self.places[name].offset

    def view(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Host view of a tensor's room, of its largest shape unless another is given."""
        place = self.places[name]
        return self.host.array(place.offset, place.dtype, place.shape if shape is None else shape)

    def upload(self, name: str | None = None, nbytes: int | None = None) -> None:
        """Put a copy to the device on the stream: of one tensor's first bytes, or of the whole block."""
        offset, size = self._span(name, nbytes)
        self._cuda.to_device(self.device.address + offset, self.host.address + offset, size)

    def download(self, name: str, nbytes: int | None = None) -> None:
        """Put a copy to the host on the stream."""
        offset, size = self._span(name, nbytes)
        self._cuda.to_host(self.host.address + offset, self.device.address + offset, size)

    def _span(self, name: str | None, nbytes: int | None) -> tuple[int, int]:
        if name is None:
            return 0, self.device.nbytes
        place = self.places[name]
        return place.offset, place.nbytes if nbytes is None else nbytes


class TensorRTBackend:
    """A bundle in TensorRT; see `reroute.runtime.backend.Backend` for the methods."""

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        """Compare the engine with this machine, load it, and allocate everything that a session needs.

        Raises:
            UserError: TensorRT or cuda-python is missing, the engine is of another machine or version, or a batch.
        """
        if options.batch != 1:
            raise UserError(f"a TensorRT engine runs one dialogue, not {options.batch}", hint="use batch=1")
        self._trt = _import_tensorrt()
        self._cuda = cuda = Cuda()
        self._manifest = manifest = bundle.manifest
        if manifest.engine is None:
            raise UserError(f"{bundle.path} does not say where its engine was built", hint="build the bundle again")
        capability, self._device = cuda.device()
        require_fit(
            manifest.engine,
            tensorrt=self._trt.__version__,
            compute_capability=capability,
            device=self._device,
        )
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._load_plugin(bundle)
        self._runtime = self._trt.Runtime(self._logger)  # has to outlive the engines
        engines = {name: self._load(bundle, name) for name in ("vision", "decoder")}
        self._scratch = cuda.allocate(max(int(engine.device_memory_size_v2) for engine in engines.values()) or 256)

        plan = plan_decoder(manifest)
        self._results = Room(cuda, plan.results)
        self._steps = {profile: Room(cuda, block) for profile, block in plan.steps.items()}
        self._places = plan.caches
        self._caches: dict[str, Memory] = {name: cuda.allocate(place.nbytes) for name, place in plan.caches.items()}
        self._contexts: dict[str, Any] = {
            profile: self._context(engines["decoder"], index)
            for index, profile in enumerate(profiles_of(manifest, "decoder"))
        }
        for profile, context in self._contexts.items():
            self._bind_decoder(context, self._steps[profile])

        block, self._images_at_once = plan_vision(manifest)
        self._vision_room = Room(cuda, block)
        self._vision = self._context(engines["vision"], 0)
        for name in block.places:
            self._vision.set_tensor_address(name, self._vision_room.address(name))
        self._engines = engines

        self._lengths = np.zeros(len(manifest.schedule.stages), dtype=np.int32)
        self._capacity = np.asarray(manifest.cache_rows, dtype=np.int64)
        self._decode = CapturedStep(cuda, self._enqueue_decode)
        for name, place in self._steps["decode"].places.items():
            self._set_shape(self._contexts["decode"], name, place.shape)
        cuda.wait()

    @property
    def lengths(self) -> np.ndarray:
        """Valid cache rows of each stage so far, int32 [stages]."""
        return self._lengths.copy()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches at their capacity."""
        return sum(memory.nbytes for memory in self._caches.values())

    def encode(self, pixel_values: np.ndarray) -> VisualTokens:
        """Visual tokens of images float32 [M, 3, H, W], as many at a time as the engine's profile takes."""
        parts = [
            self._encode(pixel_values[start : start + self._images_at_once])
            for start in range(0, len(pixel_values), self._images_at_once)
        ]
        places = [part.places for part in parts if part.places is not None]
        return VisualTokens(
            embeds=np.concatenate([part.embeds for part in parts]), places=np.concatenate(places) if places else None
        )

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder and append to the caches; `lengths` advance only when the run succeeded.

        Raises:
            ValueError: the step needs more cache rows than are left, or is longer than the engine's profile.
        """
        num_text, num_visual = len(inputs.text_slots), len(inputs.visual_slots)
        added = rows_added(self._manifest.schedule, num_text=num_text, num_visual=num_visual)
        kv_len = self._lengths + added
        if (kv_len > self._capacity).any():
            raise ValueError(f"the step needs {kv_len.tolist()} cache rows of {self._capacity.tolist()}")
        profile = profile_of_step(inputs)
        room = self._steps[profile]
        arrays = step_arrays(inputs, kv_len.astype(np.int32))
        for name, array in arrays.items():
            if any(size > most for size, most in zip(array.shape, room.places[name].shape, strict=True)):
                raise ValueError(f"{name} is {array.shape}, the engine takes {room.places[name].shape} at most")
            room.view(name, array.shape)[...] = array
        routes: tuple[np.ndarray, ...] = ()
        if profile == "decode":
            self._decode.run()
            self._cuda.wait()
        else:
            routes = self._prefill(arrays, added[1:])
        self._lengths[:] = kv_len
        greedy = (int(self._results.view("next_token")[0]), float(self._results.view("next_logprob")[0]))
        return DeviceOutputs(read=self._read_logits, routes=routes, greedy=greedy)

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer's valid rows, [1, H_kv, rows, head_dim], copied to the host."""
        rows = self._lengths[self._manifest.schedule.stage_of_layer(layer)]
        key, value = (self._read_cache(f"{layer}.{kind}")[:, :, :rows] for kind in ("key", "value"))
        return key, value

    def load(self, caches: Sequence[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray) -> None:
        """Copy earlier rows into the caches on the device.

        Raises:
            ValueError: see `Backend.load`.
        """
        text, schedule = self._manifest.model.text, self._manifest.schedule
        dtype = self._places["0.key"].dtype
        require_rows(caches, lengths, capacity=self._capacity, schedule=schedule, text=text, dtype=dtype)
        self._lengths[:] = 0
        for layer, pair in enumerate(caches):
            for kind, rows in zip(("key", "value"), pair, strict=True):
                self._write_cache(f"{layer}.{kind}", rows)
        self._lengths[:] = lengths

    def reset(self) -> None:
        """Forget all rows: what lies behind `lengths` is never read."""
        self._lengths[:] = 0

    def use(self, tier: str) -> None:
        """Budgets are part of a TensorRT engine: it has no tiers, and every name is refused with UserError."""
        self._manifest.at(tier)

    def describe(self) -> dict[str, str]:
        """Engine, version, device, and whether decode runs as a CUDA graph."""
        decode = self._decode.state + (f" ({self._decode.reason})" if self._decode.reason else "")
        return {
            "engine": "TensorRT",
            "version": self._trt.__version__,
            "device": self._device,
            "decode": decode,
            "scratch_bytes": str(self._scratch.nbytes),
        }

    def _prefill(self, arrays: dict[str, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run a prompt; `rows` are those that run in each routed stage, whose slots are returned."""
        context, room = self._contexts["prefill"], self._steps["prefill"]
        for name, array in arrays.items():
            self._set_shape(context, name, array.shape)
            room.upload(name, array.nbytes)
        self._execute(context)
        names = [f"routes.{stage}" for stage in range(1, len(rows) + 1)]
        for name, count in zip(names, rows, strict=True):
            self._results.download(name, int(count) * 8)
        self._download_choice()
        self._cuda.wait()
        return tuple(self._results.view(name, (1, int(count))).copy() for name, count in zip(names, rows, strict=True))

    def _enqueue_decode(self) -> None:
        self._steps["decode"].upload()
        self._execute(self._contexts["decode"])
        self._download_choice()

    def _download_choice(self) -> None:
        self._results.download("next_token")
        self._results.download("next_logprob")

    def _read_logits(self) -> np.ndarray:
        self._results.download("logits")
        self._cuda.wait()
        return self._results.view("logits")

    def _read_cache(self, name: str) -> np.ndarray:
        place, memory = self._places[name], self._caches[name]
        host = self._cuda.allocate_host(memory.nbytes)
        self._cuda.to_host(host.address, memory.address, memory.nbytes)
        self._cuda.wait()
        return host.array(0, place.dtype, place.shape).copy()

    def _write_cache(self, name: str, rows: np.ndarray) -> None:
        # The whole cache in one copy, because the rows of each head lie apart; what is behind them is never read.
        place, memory = self._places[name], self._caches[name]
        host = self._cuda.allocate_host(memory.nbytes)
        view = host.array(0, place.dtype, place.shape)
        view[:, :, : rows.shape[2]] = rows
        view[:, :, rows.shape[2] :] = 0
        self._cuda.to_device(memory.address, host.address, memory.nbytes)
        self._cuda.wait()

    def _encode(self, pixel_values: np.ndarray) -> VisualTokens:
        room, count = self._vision_room, len(pixel_values)
        room.view("pixel_values", pixel_values.shape)[...] = pixel_values
        self._set_shape(self._vision, "pixel_values", pixel_values.shape)
        room.upload("pixel_values", pixel_values.nbytes)
        self._execute(self._vision)
        names = [name for name in room.places if name != "pixel_values"]
        for name in names:
            room.download(name)
        self._cuda.wait()
        made = {name: room.view(name)[:count].copy() for name in names}
        return VisualTokens(embeds=made["visual_embeds"], places=made.get("visual_places"))

    def _load_plugin(self, bundle: Bundle) -> None:
        lowering = self._manifest.lowering
        wanted = lowering.plugin_nodes if lowering is not None else {}
        registry = self._trt.get_plugin_registry()
        # A library is loaded once for a process: a second session finds the creators there.
        if all(registry.get_creator(name, "1", "") is not None for name in wanted):
            return
        built = self._manifest.engine
        path = bundle.path / built.plugin_file if built is not None and built.plugin_file else None
        if path is None or registry.load_library(str(path)) is None:
            raise UserError(
                f"TensorRT {self._trt.__version__} does not load the plugin library of {bundle.path}",
                hint="build the bundle again with --plugin LIBRARY of this machine",
            )

    def _load(self, bundle: Bundle, name: str) -> Any:
        engine = self._runtime.deserialize_cuda_engine(bundle.part(name).read_bytes())
        if engine is None:
            raise UserError(
                f"TensorRT {self._trt.__version__} does not load the {name} engine, though it was built for this "
                "version and GPU; its log is above",
                hint="build the bundle again; if it stays, report it",
            )
        return engine

    def _context(self, engine: Any, profile: int) -> Any:
        context = engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise RerouteError("TensorRT made no execution context; its log is above", hint="is there memory left?")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        if not context.set_optimization_profile_async(profile, int(self._cuda.stream)):
            raise RerouteError(f"TensorRT refuses the profile {profile}", hint="build the bundle again")
        self._cuda.wait()
        return context

    def _bind_decoder(self, context: Any, room: Room) -> None:
        for owner in (room, self._results):
            for name in owner.places:
                context.set_tensor_address(name, owner.address(name))
        for name, memory in self._caches.items():
            context.set_tensor_address(f"past_key_values.{name}", memory.address)
            context.set_tensor_address(f"present.{name}", memory.address)

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, tuple(int(size) for size in shape)):
            raise RerouteError(f"TensorRT refuses {name} of {shape}", hint="its log is above; report it")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._cuda.stream)):
            raise RerouteError("TensorRT could not run the step; its log is above", hint="report it")


def _import_tensorrt() -> Any:
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise UserError(
            f"the bundle needs TensorRT, which cannot be imported: {error}",
            hint='on a Jetson it comes with JetPack; elsewhere pip install "reroute[tensorrt]"',
        ) from error
