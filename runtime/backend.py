"""What a session needs of an engine, and the table of engines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from reroute.errors import UserError, nearest
from reroute.manifest import TextModel
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import StepInputs
from reroute.runtime.positions import VisualTokens
from reroute.schedule import Schedule

# Backend of a manifest -> module and class. Modules are imported when a bundle of theirs is opened.
BACKENDS: dict[str, str] = {
    "ort": "reroute.runtime.ort:OrtBackend",
    "tensorrt": "reroute.runtime.tensorrt:TensorRTBackend",
}
PROVIDERS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How to run a bundle; nothing here changes what it answers.

    Attributes:
        threads: CPU threads of one operator; None lets the engine decide.
        provider: where ONNX Runtime runs: "cpu", "cuda", or "tensorrt" with CUDA behind it. A TensorRT bundle has no
        choice.
        spinning: threads wait in a busy loop between runs too, not only within one. Off by default: it gains a little
            when nothing else runs, and takes whole cores from everything else between two steps.
        batch: rows of `StepInputs`; a session uses 1.
    """

    threads: int | None = None
    provider: str = "cpu"
    spinning: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}", hint="give 1 or more, or leave it out")
        if self.provider not in PROVIDERS:
            raise UserError(f"unknown provider {self.provider!r}", hint=nearest(self.provider, PROVIDERS))


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """What a step gives back.

    Attributes:
        logits: float32 [B, V] of the last row; valid until the next step.
        routes: for each routed stage s = 1..stages-1, int64 [B, T + min(K_s, N)]: the ascending slots of
            this step that ran there. Empty for a dense bundle and for steps of one text token, which run
            everywhere.
        greedy: the likeliest token of row 0 and its log probability, where the engine itself chose it: `logits` may
            then still be on the device, and are fetched when they are read.
    """

    logits: np.ndarray
    routes: tuple[np.ndarray, ...]
    greedy: tuple[int, float] | None = None


class Backend(Protocol):
    """One loaded bundle with its caches. Not for use from several threads."""

    @property
    def lengths(self) -> np.ndarray:
        """Valid cache rows per stage so far, int32 [stages]."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches at their capacity, of the tier in use."""
        ...

    def encode(self, pixel_values: np.ndarray) -> VisualTokens:
        """Visual tokens of images float32 [M, 3, H, W], all of one of the manifest's grids."""
        ...

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Run the decoder and append to the caches. When it raises, `lengths` are what they were before.

        Raises:
            ValueError: the step needs more cache rows than are left.
        """
        ...

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer's valid rows, [B, H_kv, rows, head_dim]; views where possible."""
        ...

    def load(self, caches: Sequence[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray) -> None:
        """Replace all rows by earlier ones, as `cache` gave them at batch 1; nothing runs.

        Args:
            caches: keys and values of each layer, [1, H_kv, rows, head_dim] in the caches' dtype.
            lengths: int32 [stages], the rows of each stage's layers.

        Raises:
            ValueError: other shapes or dtypes than the caches', or more rows than they hold. No rows are valid then.
        """
        ...

    def reset(self) -> None:
        """Forget all rows."""
        ...

    def use(self, tier: str) -> None:
        """Forget all rows, and run another tier of the bundle from now on. Raises UserError for a name that is none."""
        ...

    def describe(self) -> dict[str, str]:
        """Engine, version, device and threads, for reports."""
        ...


def open_backend(bundle: Bundle, options: BackendOptions | None = None) -> Backend:
    """Load the engine that `bundle` was built for, in the tier that its manifest is of.

    Raises:
        UserError: a backend that this Reroute does not have.
    """
    name = bundle.manifest.backend
    if name not in BACKENDS:
        raise UserError(
            f"{bundle.path} was built for the backend {name!r}, which this Reroute cannot run",
            hint=nearest(name, BACKENDS),
        )
    module, _, kind = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), kind)(bundle, options or BackendOptions())


def require_rows(
    caches: Sequence[tuple[np.ndarray, np.ndarray]],
    lengths: np.ndarray,
    *,
    capacity: np.ndarray,
    schedule: Schedule,
    text: TextModel,
    dtype: np.dtype | type,
) -> None:
    """Compare rows to `Backend.load` with the caches. Raises ValueError."""
    if len(caches) != text.num_layers or len(lengths) != len(capacity):
        raise ValueError(f"{len(caches)} layers in {len(lengths)} stages, not {text.num_layers} in {len(capacity)}")
    if (lengths > capacity).any():
        raise ValueError(f"{lengths.tolist()} cache rows of {capacity.tolist()}")
    for layer, pair in enumerate(caches):
        want = (1, text.num_kv_heads, int(lengths[schedule.stage_of_layer(layer)]), text.head_dim)
        for array in pair:
            if array.shape != want or array.dtype != dtype:
                raise ValueError(f"rows of layer {layer} are {array.dtype} {array.shape}, not {np.dtype(dtype)} {want}")
