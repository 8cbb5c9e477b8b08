"""Parameters that stay in the checkpoint until they are used: a model of any size in the memory of its largest layer.

A module is built on the meta device and given its `Weight`s:

    streamed(module, weights)     a forward runs as ever: parameters come when their module runs, in float32, and go
    streamed_of(module)           for what is not a forward: a trace has parameters without data
    weights_of(module)            what the trace's initializers are, written one at a time by
                                  `reroute.export.initializers`

Buffers (rotary tables, window orders, position ids) are small constants and always there. Parameters stay in memory,
first come first served, until `RESIDENT_BYTES` are used up: small models are read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import Embedding

RESIDENT_BYTES = 1 << 30  # of float32 parameters kept, for each module
NARROW = (torch.float16, torch.bfloat16)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter as a tensor of a checkpoint.

    Attributes:
        checkpoint: where it is.
        name: canonical name of the tensor.
        transposed: the parameter is the tensor's transpose: [in, out].
        summed_frames: the tensor is a patch embedding [C, 3, frames, p, p]; the parameter adds up the frames and has
            the rest flat, [C, 3 * p * p].
    """

    checkpoint: Checkpoint
    name: str
    transposed: bool = False
    summed_frames: bool = False

    @property
    def key(self) -> tuple[str, bool, bool]:
        """Equal for equal data."""
        return self.name, self.transposed, self.summed_frames

    @property
    def dtype(self) -> torch.dtype:
        """What an export stores: 16 bits where the checkpoint has them and nothing was computed, else float32."""
        stored = self.checkpoint.dtype_of(self.name)
        return stored if stored in NARROW and not self.summed_frames else torch.float32

    def load(self) -> Tensor:
        """As float32; a transposed one is a view."""
        return self._load(torch.float32)

    def stored(self) -> Tensor:
        """As an export stores it, contiguous."""
        return self._load(self.dtype).contiguous()

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index`, int64 [n], as float32; not of a transposed weight."""
        return self.checkpoint.load_rows(self.name, index.tolist(), torch.float32)

    def _load(self, dtype: torch.dtype) -> Tensor:
        tensor = self.checkpoint.load(self.name, dtype)
        if self.summed_frames:
            tensor = tensor.sum(2).flatten(1)
        return tensor.T if self.transposed else tensor


class Streamed:
    """The parameters of one module, loaded and dropped by hooks.

    Attributes:
        weights: by parameter name.
        budget: bytes of parameters that may still stay in memory.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Weight], budget: int) -> None:
        self.module, self.weights, self.budget = module, dict(weights), budget
        self.whole_budget = budget
        self.kept: dict[str, nn.Parameter] = {}
        self.empty = dict(module.named_parameters())
        if self.empty.keys() != self.weights.keys():
            raise ValueError(f"weights and parameters differ: {sorted(self.empty.keys() ^ self.weights.keys())[:4]}")
        if stray := [name for name, buffer in module.named_buffers() if buffer.is_meta]:
            raise ValueError(f"the buffer {stray[0]} has no values")
        self.active = True
        for path, part in module.named_modules():
            names = {leaf: f"{path}.{leaf}".lstrip(".") for leaf, _ in part.named_parameters(recurse=False)}
            if names:
                part.register_forward_pre_hook(partial(self._load, names))
                part.register_forward_hook(partial(self._drop, names), always_call=True)

    def _load(self, names: Mapping[str, str], part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a module runs: its parameters; of an embedding that would not stay only the rows that are read."""
        if not self.active:
            return None
        for leaf, name in names.items():
            weight, size = self.weights[name], 4 * self.empty[name].numel()
            if name not in self.kept and isinstance(part, Embedding) and size > self.budget:
                index, places = args[0].unique(return_inverse=True)
                part._parameters[leaf] = nn.Parameter(weight.rows(index), requires_grad=False)
                return (places,)
            parameter = self.kept.get(name)
            if parameter is None:
                parameter = nn.Parameter(weight.load(), requires_grad=False)
                if size <= self.budget:
                    self.kept[name] = parameter
                    self.budget -= size
            part._parameters[leaf] = parameter
        return None

    def _drop(self, names: Mapping[str, str], part: nn.Module, *_: object) -> None:
        if self.active:
            for leaf, name in names.items():
                part._parameters[leaf] = self.empty[name]

    def release(self) -> None:
        """Let go of everything that was kept."""
        self.kept.clear()
        self.budget = self.whole_budget

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Parameters that only shapes can be asked of."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = {name: torch.empty(parameter.shape) for name, parameter in self.empty.items()}
        self.active = False
        try:
            self._set({name: nn.Parameter(fake, requires_grad=False) for name, fake in fakes.items()})
            yield
        finally:
            self.active = True
            self._set(self.empty)

    def _set(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._parameters[leaf] = parameter


def streamed(module: Module, weights: Mapping[str, Weight]) -> Module:
    """Give a module on the meta device its parameters: it then runs as if it had them. `weights` by parameter name."""
    module.streamed = Streamed(module, weights, RESIDENT_BYTES)  # type: ignore[assignment]
    return module.eval().requires_grad_(False)


def streamed_of(module: nn.Module) -> Streamed:
    """What `streamed` gave a module, or the one module within it that has the parameters."""
    return _found(module)[1]


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """The weights of a module by the names that its own parameters have."""
    path, found = _found(module)
    return {f"{path}.{name}".lstrip("."): weight for name, weight in found.weights.items()}


def _found(module: nn.Module) -> tuple[str, Streamed]:
    parts = ((path, getattr(part, "streamed", None)) for path, part in module.named_modules())
    found = [(path, value) for path, value in parts if isinstance(value, Streamed)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} holds {len(found)} streamed modules")
    return found[0]
