"""The weights of an export: read one at a time, and written anew for a backend, never all in memory.

    graph, weights = load_graph(export / "decoder.onnx")     float32 declared, whatever the export stores
    weights.read("layers.0.q_proj.weight")                   one of them as float32
    weights.write(graph, bundle / "decoder.onnx.data")       all, in the types that `graph` now declares

A pass over the graph (to fp16, quantisation) changes declared types and adds or removes initializers; what is
written follows from the names and types that the graph has at the end. Files are read by seek and read: mapped pages
would count as memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reroute.engines.widen import BFLOAT, FLOAT, HALF, NARROW, widen
from reroute.errors import RerouteError, UserError

EXTERNAL = onnx.TensorProto.EXTERNAL
SMALLEST = 1024  # bytes; what is smaller stays in the graph
PAGE = 4096  # large tensors start at a page, so that an engine can map the file
ALIGNMENT = 64
_LARGE = 1 << 16
_BLOCK = 1 << 22  # elements converted at once
Made = Mapping[str, Callable[[], np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where an initializer's data are.

    Attributes:
        kind: ONNX's data type in the file.
        dims: shape, of the transposed form where `transposed`.
        path: file, or None where `data` has it.
        offset: of the first byte.
        length: bytes.
        data: of small initializers.
        transposed: whether the file holds the transposed matrix.
    """

    kind: int
    dims: tuple[int, ...]
    path: Path | None
    offset: int
    length: int
    data: bytes = b""
    transposed: bool = False


def load_graph(path: Path) -> tuple[onnx.ModelProto, Weights]:
    """A neutral graph with its weights declared float32 (see `reroute.engines.widen`), and where their data are."""
    model = onnx.load(path, load_external_data=False)
    weights = Weights(model, path.parent)
    for name, source in widen(model).items():
        stored = weights.stored[source]
        weights.stored[name] = replace(stored, dims=stored.dims[::-1], transposed=True)
    return model, weights


class Weights:
    """The initializers of a graph as an export stores them, by name.

    Attributes:
        stored: where each is.
        file: name of the data file.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.stored = {tensor.name: _stored(tensor, folder) for tensor in model.graph.initializer}
        files = {stored.path.name for stored in self.stored.values() if stored.path is not None}
        if len(files) > 1:
            raise RerouteError(f"a graph has its weights in {len(files)} files", hint="export again")
        self.file = files.pop() if files else ""

    def read(self, name: str) -> np.ndarray:
        """One initializer: floats as float32 whatever is stored, anything else as it is. Raises RerouteError."""
        stored = self.stored[name]
        return _whole(stored, FLOAT if stored.kind in (HALF, BFLOAT) else stored.kind, name)

    def write(self, model: onnx.ModelProto, target: Path, made: Made | None = None) -> None:
        """Write the data of all initializers of `model` to the new file `target`; see `DataFile.take`."""
        with DataFile(target) as file:
            file.take(model, self, made)


class DataFile:
    """A new file of weights that one or several graphs refer to; what they share is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[object, ...], tuple[int, int]] = {}

    def __enter__(self) -> DataFile:
        self.stream = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def take(self, model: onnx.ModelProto, weights: Weights, made: Made | None = None) -> None:
        """Write the initializers' data in the types that `model` declares, and let it refer to them.

        Args:
            model: lies beside the file when it is saved. Initializers that `weights` does not know have their data in
                the graph, or in `made`.
            weights: of the graph that `model` came from.
            made: initializers that are computed now, one at a time: arrays of the declared type and shape.

        Raises:
            UserError: a weight that the declared type cannot hold.
        """
        for tensor in model.graph.initializer:
            name, kind = tensor.name, tensor.data_type
            if made and name in made:
                array = np.ascontiguousarray(made[name]())
                self._put(tensor, [array], array.nbytes)
            elif name not in weights.stored:
                if tensor.data_location != EXTERNAL and tensor.ByteSize() >= SMALLEST:
                    array = numpy_helper.to_array(tensor)
                    self._put(tensor, [np.ascontiguousarray(array)], array.nbytes)
            else:
                stored = weights.stored[name]
                # What is of 16 bits was made wide in the graph, even where it is to be as it was stored.
                same = stored.kind == kind and kind not in NARROW
                if stored.path is None and same and stored.length < SMALLEST:
                    continue
                length = math.prod(stored.dims) * _dtype(kind).itemsize
                key = (stored.path, stored.offset, stored.data, stored.transposed, kind)
                self._put(tensor, _blocks(stored, kind, name), length, key)

    def _put(
        self,
        tensor: onnx.TensorProto,
        blocks: Iterable[np.ndarray],
        length: int,
        key: tuple[object, ...] | None = None,
    ) -> None:
        """Write data, unless `key` was written before, and make `tensor` refer to it; small ones go into it."""
        name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
        place: tuple[int, int] | None = None
        data = b""
        if length < SMALLEST:
            data = b"".join(block.tobytes() for block in blocks)
        elif key is None or (place := self.places.get(key)) is None:
            align = PAGE if length >= _LARGE else ALIGNMENT
            end = self.stream.tell()
            place = (-(-end // align) * align, length)
            self.stream.write(bytes(place[0] - end))
            for block in blocks:
                self.stream.write(block.reshape(-1).view(np.uint8).data)
            if self.stream.tell() != sum(place):
                raise RerouteError(f"the weight {name} is not of its shape {dims}", hint="export again")
            if key is not None:
                self.places[key] = place
        tensor.Clear()
        tensor.name, tensor.data_type = name, kind
        tensor.dims.extend(dims)
        if place is None:
            tensor.raw_data = data
            return
        tensor.data_location = EXTERNAL
        for entry, value in (("location", self.path.name), ("offset", place[0]), ("length", length)):
            tensor.external_data.add(key=entry, value=str(value))


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """float32 as float16. Raises UserError for what it cannot hold."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"the weight {name} has a value of {np.abs(array).max():.4g}, fp16 ends at 65504",
            hint="build with --dtype float32",
        )
    return half


def _stored(tensor: onnx.TensorProto, folder: Path) -> Stored:
    dims = tuple(tensor.dims)
    if tensor.data_location != EXTERNAL:
        data = numpy_helper.to_array(tensor).tobytes()
        return Stored(kind=tensor.data_type, dims=dims, path=None, offset=0, length=len(data), data=data)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder / entries["location"], int(entries.get("offset", 0))
    return Stored(kind=tensor.data_type, dims=dims, path=path, offset=offset, length=int(entries["length"]))


def _blocks(stored: Stored, kind: int, name: str) -> Iterator[np.ndarray]:
    """The data, row-major, as arrays of the type `kind`, in parts where nothing is transposed."""
    if stored.transposed:
        yield np.ascontiguousarray(_whole(stored, kind, name))
        return
    for block in _file_blocks(stored):
        yield _convert(block, stored.kind, kind, name)


def _whole(stored: Stored, kind: int, name: str) -> np.ndarray:
    """All data as one array of the type `kind`; a transposed one is a view."""
    array = np.empty(stored.dims[::-1] if stored.transposed else stored.dims, _dtype(kind))
    flat, at = array.reshape(-1), 0
    for block in _file_blocks(stored):
        flat[at : at + block.size] = _convert(block, stored.kind, kind, name)
        at += block.size
    return array.T if stored.transposed else array


def _file_blocks(stored: Stored) -> Iterator[np.ndarray]:
    """The data in the order and type of the file. Raises RerouteError for a file that ends too early."""
    dtype = _dtype(stored.kind)
    if stored.path is None:
        yield np.frombuffer(stored.data, dtype)
        return
    with stored.path.open("rb", buffering=0) as stream:
        stream.seek(stored.offset)
        left = stored.length // dtype.itemsize
        while left:
            buffer = np.empty(min(left, _BLOCK), dtype)
            view, filled = buffer.view(np.uint8).data, 0
            while filled < len(view):
                count = stream.readinto(view[filled:])
                if not count:
                    raise RerouteError(f"{stored.path.name} ends too early", hint="export again")
                filled += count
            yield buffer
            left -= buffer.size


def _convert(array: np.ndarray, kind: int, wanted: int, name: str) -> np.ndarray:
    if kind == wanted:
        return array
    wide = array
    if kind == BFLOAT:
        wide = (array.astype(np.uint32) << 16).view(np.float32)
    elif kind == HALF:
        wide = array.astype(np.float32)
    elif kind != FLOAT:
        raise RerouteError(f"the weight {name} of type {kind} cannot become {wanted}", hint="export again")
    if wanted == FLOAT:
        return wide
    if wanted == HALF:
        return to_half(wide, name)
    raise RerouteError(f"the weight {name} of type {kind} cannot become {wanted}", hint="export again")


def _dtype(kind: int) -> np.dtype:
    """As numpy has it; bfloat16 as its bits."""
    return np.dtype(np.uint16) if kind == BFLOAT else np.dtype(helper.tensor_dtype_to_np_dtype(kind))
