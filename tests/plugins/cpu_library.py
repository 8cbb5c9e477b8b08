"""The C ABI of plugins_cpp/include/reroute/c_api.h for torch tensors, through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SELECT_SIZES = ("batch", "rows", "candidates", "always", "heads", "kv_heads", "head_size", "keep")


class _SelectShape(ctypes.Structure):
    _fields_ = [*((name, c_int64) for name in _SELECT_SIZES), ("scale", c_float), ("dtype", c_int32)]


class _RowsShape(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("batch", "rows", "picked", "row_bytes")]


class KernelError(Exception):
    """A kernel refused the call."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Options(NamedTuple):
    """The attributes of RerouteSelect."""

    keep: int
    heads: int
    kv_heads: int
    scale: float


class CpuLibrary:
    """select, gather and scatter with the arguments of `reroute.export.ops`."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        signatures = {
            "reroute_select_scores": (_SelectShape, 4),
            "reroute_select_choose": (_SelectShape, 4),
            "reroute_select": (_SelectShape, 5),
            "reroute_gather": (_RowsShape, 3),
            "reroute_scatter": (_RowsShape, 4),
        }
        for name, (shape, pointers) in signatures.items():
            function = getattr(self._library, name)
            function.restype = c_int32
            function.argtypes = [POINTER(shape), *[c_void_p] * pointers]
        self._library.reroute_describe.restype = c_char_p

    def _call(self, name: str, shape: ctypes.Structure, *tensors: Tensor | None) -> None:
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        code = getattr(self._library, name)(byref(shape), *addresses)
        if code != 0:
            raise KernelError(code, self._library.reroute_describe(code).decode())

    def _shape(self, q: Tensor, keys: Tensor, candidates: Tensor, always: Tensor, options: Options) -> _SelectShape:
        batch, rows, _ = keys.shape
        return _SelectShape(
            batch, rows, candidates.shape[1], always.shape[1], options.heads, options.kv_heads,
            q.shape[1] // options.heads, options.keep, options.scale, _DTYPES[q.dtype],
        )  # fmt: skip

    def scores(self, q: Tensor, keys: Tensor, candidates: Tensor, options: Options) -> Tensor:
        """Score of every candidate, fp32 [B, N]."""
        out = torch.empty(candidates.shape)
        shape = self._shape(q, keys, candidates, candidates[:, :0], options)
        self._call("reroute_select_scores", shape, q, keys, candidates, out)
        return out

    def choose(self, scores: Tensor, candidates: Tensor, always: Tensor, rows: int, keep: int) -> Tensor:
        """The slots that given scores choose."""
        shape = _SelectShape(scores.shape[0], rows, candidates.shape[1], always.shape[1], 1, 1, 1, keep, 1.0, 0)
        out = torch.empty(scores.shape[0], always.shape[1] + min(keep, candidates.shape[1]), dtype=torch.int64)
        self._call("reroute_select_choose", shape, scores, candidates, always, out)
        return out

    def select(self, q: Tensor, keys: Tensor, candidates: Tensor, always: Tensor, options: Options) -> Tensor:
        """RerouteSelect."""
        length = always.shape[1] + min(options.keep, candidates.shape[1])
        out = torch.empty(keys.shape[0], length, dtype=torch.int64)
        shape = self._shape(q, keys, candidates, always, options)
        self._call("reroute_select", shape, q, keys, candidates, always, out)
        return out

    def gather(self, x: Tensor, slots: Tensor) -> Tensor:
        """RerouteGather."""
        out = x.new_empty(*slots.shape, x.shape[2])
        self._call("reroute_gather", self._rows(x, slots), x, slots, out)
        return out

    def scatter(self, full: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        """RerouteScatter."""
        out = torch.empty_like(full)
        self._call("reroute_scatter", self._rows(full, slots), full, slots, rows, out)
        return out

    @staticmethod
    def _rows(x: Tensor, slots: Tensor) -> _RowsShape:
        return _RowsShape(x.shape[0], x.shape[1], slots.shape[1], x.shape[2] * x.element_size())
