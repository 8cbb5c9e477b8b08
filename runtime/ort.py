"""The ONNX Runtime backend.

Every cache is allocated once at its capacity and bound as past and as present of its layer, so that a step
appends rows in place. Decode steps have fixed shapes: their inputs are bound once as well, and a step only
writes a few numbers into them. Prompt steps bind their inputs anew and also return the routes.

Tiers of a bundle share this memory. A cache has room for the largest tier; that of a smaller one is its beginning, as
a tensor of its own capacity. To change the tier is to bind those tensors and to write other budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from reroute.errors import UserError
from reroute.manifest import Grid, Manifest
from reroute.runtime.backend import BackendOptions, StepOutputs, require_rows
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import StepInputs, rows_added
from reroute.runtime.positions import VisualTokens

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# What a provider is called in ONNX Runtime, in the order of preference: each takes the nodes that it knows.
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}


class OrtBackend:
    """A bundle in ONNX Runtime; see `reroute.runtime.backend.Backend` for the methods."""

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        """Load both graphs and allocate the caches.

        Raises:
            UserError: onnxruntime is missing or too old for the graphs, or the provider is not in this build
                of it.
        """
        self._ort = _import_onnxruntime()
        self._options = options
        self._manifest = bundle.manifest  # in the tier in use
        self._providers = self._pick_providers(options.provider)
        # The other grids' graphs are loaded when an image needs them.
        self._bundle = bundle
        self._vision: dict[str, Any] = {}
        self._vision_graph(self._manifest.model.vision.grid)
        self._decoder = self._load(bundle.part("decoder"), bundle.kernels)
        types = {i.name: i.type for i in self._decoder.get_inputs()}
        self._dtype = _DTYPES[types["visual_embeds"]]
        text, batch, stages = self._manifest.model.text, options.batch, self._manifest.schedule.stages

        self._lengths = np.zeros(len(stages), dtype=np.int32)
        self._kv_len = np.zeros(len(stages), dtype=np.int32)
        # What a bundle with tiers has as one more input: (keep, whole) of each decision.
        self._budgets = np.zeros((len(stages) - 1, 2), dtype=np.int64) if self._manifest.tiers else None
        self._logits = np.zeros((batch, text.vocab_size), dtype=np.float32)
        self._logits_value = self._ort.OrtValue.ortvalue_from_numpy(self._logits)
        # By cache name, "{layer}.key", flat and for the largest tier. On the CPU a value shares its array's memory.
        self._rooms: dict[str, tuple[np.ndarray, Any]] = {}
        most = [max(rows) for rows in zip(*(tier.cache_rows for tier in self._manifest.all_tiers), strict=True)]
        for layer in range(text.num_layers):
            rows = most[self._manifest.schedule.stage_of_layer(layer)]
            for kind in ("key", "value"):
                room = np.zeros(batch * text.num_kv_heads * rows * text.head_dim, dtype=self._dtype)
                value = self._ort.OrtValue.ortvalue_from_numpy(room, _DEVICES[options.provider], 0)
                self._rooms[f"{layer}.{kind}"] = (room, value)

        renumbered = self._manifest.schedule.positions == "renumbered"
        table = (len(stages), 1, text.head_dim // 2) if renumbered else (1, text.head_dim // 2)
        self._token = StepInputs(
            input_ids=np.zeros((batch, 1), dtype=np.int64),
            visual_embeds=np.zeros((batch, 0, text.hidden_size), dtype=self._dtype),
            text_slots=np.zeros(1, dtype=np.int64),
            visual_slots=np.zeros(0, dtype=np.int64),
            rope_cos=np.zeros(table, dtype=np.float32),
            rope_sin=np.zeros(table, dtype=np.float32),
            visual_images=np.zeros(0, dtype=np.int64) if self._manifest.schedule.pool == "image" else None,
            deepstack=np.zeros((text.deepstack, batch, 0, text.hidden_size), self._dtype) if text.deepstack else None,
        )
        self._bound: dict[Any, dict[str, np.ndarray]] = {}
        self._prompt_binding, self._token_binding = self._decoder.io_binding(), self._decoder.io_binding()
        for binding in (self._prompt_binding, self._token_binding):
            binding.bind_ortvalue_output("logits", self._logits_value)
        self._enter(self._manifest)

    @property
    def lengths(self) -> np.ndarray:
        """Valid cache rows of each stage so far, int32 [stages]."""
        return self._lengths.copy()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches at their capacity, of the tier in use."""
        itemsize = np.dtype(self._dtype).itemsize
        return sum(itemsize * math.prod(self._cache_shape(name)) for name in self._rooms)

    def encode(self, pixel_values: np.ndarray) -> VisualTokens:
        """Visual tokens of images float32 [M, 3, H, W] of one grid."""
        model = self._manifest.model
        grid = model.grid_of(*pixel_values.shape[2:])
        graph = self._vision_graph(grid)
        names = [output.name.removeprefix("visual_") for output in graph.get_outputs()]
        made = dict(zip(names, graph.run(None, {"pixel_values": pixel_values}), strict=True))
        return VisualTokens(grids=(grid,) * len(pixel_values) if model.vision.grids else None, **made)

    def _vision_graph(self, grid: Grid) -> Any:
        name = self._manifest.model.vision_part(grid)
        if name not in self._vision:
            self._vision[name] = self._load(self._bundle.part(name))
        return self._vision[name]

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder and append to the caches; `lengths` advance only when the run succeeded.

        Raises:
            UserError: a later prompt of several tokens in a batch, which ONNX Runtime does not run.
            ValueError: the step needs more cache rows than are left.
        """
        num_text, num_visual = len(inputs.text_slots), len(inputs.visual_slots)
        schedule = self._manifest.schedule
        kv_len = self._lengths + rows_added(
            schedule, num_text=num_text, num_visual=num_visual, images=inputs.visual_images
        )
        if (kv_len > self._capacity).any():
            raise ValueError(f"the step needs {kv_len.tolist()} cache rows of {self._capacity.tolist()}")
        if self._options.batch > 1 and num_text + num_visual > 1 and self._lengths.any():
            raise UserError(
                f"a later prompt cannot run in a batch of {self._options.batch}: ONNX Runtime's attention takes "
                "several new rows over a filled cache for one prompt only",
                hint="reset first, decode token by token, or run the dialogues one after the other with batch=1",
            )
        self._kv_len[:] = kv_len
        if num_text == 1 and num_visual == 0:
            self._token.input_ids[:] = inputs.input_ids
            self._token.rope_cos[:] = inputs.rope_cos
            self._token.rope_sin[:] = inputs.rope_sin
            if self._options.provider != "cpu":  # there an input is copied when it is bound
                self._bind_step(self._token_binding, self._token)
            self._decoder.run_with_iobinding(self._token_binding)
            routes = ()
        else:
            self._bind_step(self._prompt_binding, inputs)
            for stage in range(1, len(schedule.stages)):
                # Their length depends on the step: bound anew, they are allocated by the run.
                self._prompt_binding.bind_output(f"routes.{stage}", "cpu")
            self._decoder.run_with_iobinding(self._prompt_binding)
            outputs = self._prompt_binding.get_outputs()
            routes = tuple(value.numpy().copy() for value in outputs[len(outputs) - len(schedule.stages) + 1 :])
        self._lengths[:] = kv_len
        return StepOutputs(logits=self._logits, routes=routes)

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer's valid rows, [B, H_kv, rows, head_dim]: views (copies with cuda)."""
        rows = self._lengths[self._manifest.schedule.stage_of_layer(layer)]
        key, value = (self._cache(f"{layer}.{kind}")[:, :, :rows] for kind in ("key", "value"))
        return key, value

    def load(self, caches: Sequence[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray) -> None:
        """Write earlier rows into the caches, in place.

        Raises:
            ValueError: see `Backend.load`.
        """
        text, schedule = self._manifest.model.text, self._manifest.schedule
        require_rows(caches, lengths, capacity=self._capacity, schedule=schedule, text=text, dtype=self._dtype)
        self._lengths[:] = 0
        for layer, pair in enumerate(caches):
            for kind, rows in zip(("key", "value"), pair, strict=True):
                self._write(f"{layer}.{kind}", rows)
        self._lengths[:] = lengths

    def _write(self, name: str, rows: np.ndarray) -> None:
        """Put [1, H_kv, rows, head_dim] at the start of a cache, for every row of a batch."""
        room, value = self._rooms[name]
        shape = self._cache_shape(name)
        room[: math.prod(shape)].reshape(shape)[:, :, : rows.shape[2]] = rows
        if self._options.provider != "cpu":  # there the array is only the place to gather rows for the copy
            value.update_inplace(room)

    def reset(self) -> None:
        """Forget all rows: what lies behind `lengths` is never read."""
        self._lengths[:] = 0

    def use(self, tier: str) -> None:
        """Forget all rows, and run another tier of the bundle; nothing is loaded or allocated. Raises UserError."""
        manifest = self._manifest.at(tier)
        self.reset()
        if manifest is not self._manifest:
            self._enter(manifest)

    def _enter(self, manifest: Manifest) -> None:
        """Bind the caches and budgets of a manifest's tier."""
        self._manifest = manifest
        self._capacity = np.asarray(manifest.cache_rows, dtype=np.int64)
        if self._budgets is not None:
            self._budgets[:] = manifest.schedule.portions
        for binding in (self._prompt_binding, self._token_binding):
            for name, (_, value) in self._rooms.items():
                place = (_DEVICES[self._options.provider], 0, self._dtype, self._cache_shape(name), value.data_ptr())
                binding.bind_input(f"past_key_values.{name}", *place)
                binding.bind_output(f"present.{name}", *place)
        self._bind_step(self._token_binding, self._token)

    def _cache_shape(self, name: str) -> tuple[int, int, int, int]:
        """[B, H_kv, C, head_dim] of a cache in the tier in use."""
        text, schedule = self._manifest.model.text, self._manifest.schedule
        rows = self._manifest.cache_rows[schedule.stage_of_layer(int(name.partition(".")[0]))]
        return self._options.batch, text.num_kv_heads, rows, text.head_dim

    def _cache(self, name: str) -> np.ndarray:
        """A cache of the tier in use: a view (a copy with cuda)."""
        room, value = self._rooms[name]
        shape = self._cache_shape(name)
        flat = room if self._options.provider == "cpu" else value.numpy()
        return flat[: math.prod(shape)].reshape(shape)

    def describe(self) -> dict[str, str]:
        """Engine, version, provider and threads."""
        return {
            "engine": "ONNX Runtime",
            "version": self._ort.__version__,
            "provider": self._providers[0],
            "threads": str(self._options.threads or "default"),
            "spinning": "always" if self._options.spinning else "within a run",
        }

    def _pick_providers(self, name: str) -> list[str]:
        wanted, available = list(_PROVIDERS[name]), self._ort.get_available_providers()
        if missing := [provider for provider in wanted if provider not in available]:
            raise UserError(
                f"this onnxruntime has no {missing[0]}, only {', '.join(available)}",
                hint='install the GPU build instead of the CPU one: pip install "reroute[ort-gpu]"',
            )
        return wanted

    def _session_options(self) -> Any:
        """What every graph is loaded with.

        Prepacking stays on: the weights are mapped from their file, and as a matrix is packed its mapped pages are let
        go, so that weights are in memory once. Without it they are the mapped pages, no fewer, and a step is slower.
        """
        options = self._ort.SessionOptions()
        # Within a run threads wait for the next operator in a busy loop, which is faster than to be woken for each;
        # at its end they stop, so that a session that does nothing takes no core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", str(int(not self._options.spinning)))
        if self._options.threads is not None:
            options.intra_op_num_threads = self._options.threads
        # A pattern lets a run of the same shapes take all its memory as one block. The second prompt of a length would
        # get such a block beside what the arena already holds, and keep it; a decode step gains nothing from it.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        return options

    def _load(self, path: Path, kernels: Path | None = None) -> Any:
        options = self._session_options()
        if kernels is not None:
            self._register(options, kernels)
        try:
            session = self._ort.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise UserError(
                f"ONNX Runtime {self._ort.__version__} cannot load {path.name}: {error}",
                hint="build the bundle again, or install the onnxruntime that its manifest names",
            ) from error
        # ONNX Runtime falls back without an error when a provider's libraries do not load.
        if (first := session.get_providers()[0]) != self._providers[0]:
            raise UserError(
                f"ONNX Runtime could not start {self._providers[0]} and would run on {first}",
                hint="its CUDA, cuDNN or TensorRT libraries are missing or of another version; its log names them",
            )
        return session

    def _register(self, options: Any, kernels: Path) -> None:
        """Let a graph use the operators of a library. Raises UserError."""
        try:
            options.register_custom_ops_library(str(kernels.resolve()))
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise UserError(
                f"ONNX Runtime {self._ort.__version__} cannot load {kernels.name}: {error}",
                hint="build the bundle on this machine, with a library that was built here, or without --kernels",
            ) from error

    def _bind_step(self, binding: Any, inputs: StepInputs) -> None:
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.arrays().items()}
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input("kv_len", self._kv_len)
        if self._budgets is not None:
            binding.bind_cpu_input("budgets", self._budgets)
        self._bound[binding] = arrays  # a bound input is the array's own memory


def _import_onnxruntime() -> Any:
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            f"the bundle needs ONNX Runtime, which cannot be imported: {error}",
            hint='pip install "reroute[ort]" (or "reroute[ort-gpu]")',
        ) from error
