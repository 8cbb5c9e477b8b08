"""Which buffers a TensorRT engine is bound to, and how large: worked out from the manifest alone, so it is tested
without a GPU.

Two execution contexts share one engine, one set of caches and one scratch memory. Each has its own block of step
inputs: prefill's is sized for the longest step, decode's for one token. A block is one piece of memory, so that the
inputs of a decode step are one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reroute.errors import UserError
from reroute.manifest import Manifest, Part, Tensor
from reroute.runtime.layout import StepInputs

ALIGNMENT = 256  # bytes; what TensorRT asks of device memory, and no less than any dtype needs


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor's room in a block.

    Attributes:
        offset: bytes from the start of the block, a multiple of `ALIGNMENT`.
        dtype: of the tensor.
        shape: the largest it can have.
    """

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes at the largest shape."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tensors in one piece of memory."""

    places: dict[str, Place]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block; never 0, since even an empty tensor needs an address."""
        return max((place.offset + aligned(place.nbytes) for place in self.places.values()), default=ALIGNMENT)


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """All bindings of the decoder.

    Attributes:
        steps: step inputs by profile, "prefill" and "decode".
        results: logits, next token, routes: one block that both profiles write.
        caches: past and present of one name are the same memory: bytes by cache name, "{layer}.key".
    """

    steps: dict[str, Block]
    results: Block
    caches: dict[str, Place]


def plan_decoder(manifest: Manifest) -> DecoderPlan:
    """Buffers of the decoder engine of a bundle. Raises UserError for a bundle without profiles."""
    part, spans = manifest.parts["decoder"], profiles_of(manifest, "decoder")
    steps = {
        profile: block({tensor: _largest(tensor, spans[profile]) for tensor in _step_inputs(part)})
        for profile in ("prefill", "decode")
    }
    most = {name: span.max for name, span in spans["prefill"].items()}
    text, visual = most["text_slots"][0], most["visual_slots"][0]
    rows = [text + stage.visual_rows(visual) for stage in manifest.schedule.stages]
    results = {
        tensor: _known(tensor, {f"A{stage}": count for stage, count in enumerate(rows)})
        for tensor in part.outputs
        if not tensor.name.startswith("present.")
    }
    caches = {
        tensor.name.removeprefix("past_key_values."): Place(
            offset=0, dtype=np.dtype(tensor.dtype), shape=_known(tensor, {})
        )
        for tensor in part.inputs
        if tensor.name.startswith("past_key_values.")
    }
    return DecoderPlan(steps=steps, results=block(results), caches=caches)


def plan_vision(manifest: Manifest) -> tuple[Block, int]:
    """Inputs and outputs of the vision engine in one block, and how many images it takes at once."""
    part, spans = manifest.parts["vision"], profiles_of(manifest, "vision")["images"]
    images = spans["pixel_values"].max[0]
    tensors = (*part.inputs, *part.outputs)
    return block({tensor: _known(tensor, {"M": images}) for tensor in tensors}), images


def profiles_of(manifest: Manifest, part: str) -> Mapping:
    """Profiles of a part by name. Raises UserError."""
    if manifest.lowering is None or part not in manifest.lowering.profiles:
        raise UserError("the manifest has no optimisation profiles", hint="build the bundle again")
    return manifest.lowering.profiles[part]


def block(shapes: Mapping[Tensor, tuple[int, ...]]) -> Block:
    """Lay tensors out one after the other."""
    places: dict[str, Place] = {}
    offset = 0
    for tensor, shape in shapes.items():
        places[tensor.name] = Place(offset=offset, dtype=np.dtype(tensor.dtype), shape=shape)
        offset += aligned(places[tensor.name].nbytes)
    return Block(places=places)


def aligned(size: int) -> int:
    """`size` rounded up, and at least one unit: an empty tensor has an address too."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


def step_arrays(inputs: StepInputs, kv_len: np.ndarray) -> dict[str, np.ndarray]:
    """The step's inputs by the engine's names."""
    return {**inputs.arrays(), "kv_len": kv_len}


def profile_of_step(inputs: StepInputs) -> str:
    """One text token is "decode", every other step is "prefill"."""
    return "decode" if len(inputs.text_slots) == 1 and not len(inputs.visual_slots) else "prefill"


def _step_inputs(part: Part) -> list[Tensor]:
    return [tensor for tensor in part.inputs if not tensor.name.startswith("past_key_values.")]


def _largest(tensor: Tensor, spans: Mapping) -> tuple[int, ...]:
    return tuple(spans[tensor.name].max) if tensor.name in spans else _known(tensor, {})


def _known(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = tuple(sizes.get(size, -1) if isinstance(size, str) else size for size in tensor.shape)
    if -1 in shape:
        raise UserError(f"{tensor.name} has a size that the manifest does not give", hint="build the bundle again")
    return shape
