"""Weights as ONNX Runtime's quantised operators read them, in numpy: one matrix in, packed arrays out.

Letters: K rows in, N columns out of a matrix [K, N]; B blocks of a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_COLUMNS = 1024  # converted at once, which bounds the memory of a large matrix


@dataclass(frozen=True, kw_only=True)
class Columns8:
    """Signed int8 with a scale for each column.

    Attributes:
        values: int8 [K, N].
        scales: float32 [N].
    """

    values: np.ndarray
    scales: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Unsigned 8 or 4 bits around a middle of 128 or 8, with a scale for each block of a column (MatMulNBits).

    Attributes:
        values: uint8 [N, B, block * bits / 8]; of 4 bits, two in a byte, the earlier one in the low half. The last
            block is filled up with the middle.
        scales: float32 [N * B].
    """

    values: np.ndarray
    scales: np.ndarray


def columns8(weight: np.ndarray) -> Columns8:
    """Quantise float32 [K, N] to -127..127, symmetrically, with the largest magnitude of a column at 127."""
    values = np.empty(weight.shape, np.int8)
    scales = np.empty(weight.shape[1], np.float32)
    for start in range(0, weight.shape[1], _COLUMNS):
        part = weight[:, start : start + _COLUMNS]
        scale = _no_zeros(np.abs(part).max(axis=0) / 127)
        values[:, start : start + _COLUMNS] = np.rint(part / scale)
        scales[start : start + _COLUMNS] = scale
    return Columns8(values=values, scales=scales)


def blocked_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape of what `blocked8` or `blocked4` makes of a matrix: blocks of 16 columns, and their bytes."""
    return -(-columns // 16), -(-rows // 4) * 64 + 64 if bits == 8 else -(-rows // 64) * 576


def blocked8(weight: np.ndarray) -> np.ndarray:
    """`columns8` as plugins_cpp/include/reroute/rows8.h reads it: uint8 [ceil(N / 16), ceil(K / 4) * 64 + 64].

    Each 64 bytes are 16 columns of 4 rows around 128, the rows of a column together; the last 64 are the scales. K and
    N are filled up with the middle.
    """
    plain = columns8(weight)
    rows, columns = weight.shape
    tall, wide = -(-rows // 4), -(-columns // 16)
    values = np.full((tall * 4, wide * 16), 128, np.uint8)
    values[:rows, :columns] = plain.values.view(np.uint8) ^ 128  # + 128
    scales = np.zeros(wide * 16, np.float32)
    scales[:columns] = plain.scales
    made = np.empty(blocked_shape(rows, columns, 8), np.uint8)
    made[:, :-64] = values.reshape(tall, 4, wide, 16).transpose(2, 0, 3, 1).reshape(wide, -1)
    made[:, -64:] = scales.view(np.uint8).reshape(wide, 64)
    return made


def blocked4(weight: np.ndarray) -> np.ndarray:
    """`blocks` of 4 bits and 64 rows as plugins_cpp/include/reroute/rows8.h reads them: uint8 [ceil(N / 16), B * 576].

    A block holds 16 columns of 64 rows: 8 times 64 bytes, whose low halves are 4 rows and whose high halves the next 4,
    then the scales.
    """
    plain = blocks(weight, bits=4, block=64)
    columns, count = plain.values.shape[:2]
    wide = -(-columns // 16)
    halves = np.full((wide * 16, count, 64), 8, np.uint8)
    halves[:columns, :, 0::2], halves[:columns, :, 1::2] = plain.values & 15, plain.values >> 4
    scales = np.zeros((wide * 16, count), np.float32)
    scales[:columns] = plain.scales.reshape(columns, count)
    rows = halves.reshape(wide, 16, count, 8, 2, 4)
    pairs = (rows[..., 0, :] | rows[..., 1, :] << 4).transpose(0, 2, 3, 1, 4).reshape(wide, count, 512)
    steps = np.ascontiguousarray(scales.reshape(wide, 16, count).transpose(0, 2, 1)).view(np.uint8)
    return np.concatenate([pairs, steps], axis=-1).reshape(wide, -1)


def blocks(weight: np.ndarray, *, bits: int, block: int) -> Blocks:
    """Quantise float32 [K, N] in blocks along K.

    8 bits: -127..127, the largest magnitude of a block at 127. 4 bits: -8..7, the value of largest magnitude at -8,
    so that all sixteen levels are used (the rule of ggml's Q4_0).
    """
    rows, columns = weight.shape
    count = -(-rows // block)
    values = np.empty((columns, count, block * bits // 8), np.uint8)
    scales = np.empty((columns, count), np.float32)
    for start in range(0, columns, _COLUMNS):
        part = weight[:, start : start + _COLUMNS].T
        cut = np.zeros((len(part), count * block), np.float32)
        cut[:, :rows] = part
        cut = cut.reshape(len(part), count, block)
        if bits == 4:
            place = np.abs(cut).argmax(axis=-1, keepdims=True)
            scale = _no_zeros(np.take_along_axis(cut, place, axis=-1)[..., 0] / -8)
            level = np.clip(np.rint(cut / scale[..., None]), -8, 7).astype(np.int8) + 8
            packed = level[..., 0::2] | (level[..., 1::2] << 4)
        else:
            scale = _no_zeros(np.abs(cut).max(axis=-1) / 127)
            packed = np.rint(cut / scale[..., None]).astype(np.int16) + 128
        values[start : start + _COLUMNS] = packed.astype(np.uint8)
        scales[start : start + _COLUMNS] = scale
    return Blocks(values=values, scales=scales.reshape(-1))


def _no_zeros(scale: np.ndarray) -> np.ndarray:
    """A block or column of zeros has any scale."""
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)
