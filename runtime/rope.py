"""Rotary tables on the host: the decoder graph takes the rows of each step's positions as inputs."""

from __future__ import annotations

import numpy as np


class Rotary:
    """Cosines and sines of plain (Llama) rotary embeddings for positions 0..rows-1.

    `inv_freq = theta ** (-2i / head_dim)` and the angles are float32, as in transformers'
    `LlamaRotaryEmbedding`, so that an angle at position 4000 has the same rounding; the power, cosine and
    sine are rounded once from float64.

    Attributes:
        cos: float32 [rows, head_dim / 2].
        sin: float32 [rows, head_dim / 2].
    """

    def __init__(self, *, head_dim: int, theta: float, rows: int) -> None:
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inv_freq = np.float32(1) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)
        angles = np.arange(rows, dtype=np.float32)[:, None] * inv_freq
        self.cos = np.cos(angles.astype(np.float64)).astype(np.float32)
        self.sin = np.sin(angles.astype(np.float64)).astype(np.float32)

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the cosine and sine rows of positions start..start+count-1, float32 [count, head_dim / 2].

        Raises:
            ValueError: positions outside the table, which a capacity check should have refused.
        """
        if not 0 <= start <= start + count <= len(self.cos):
            raise ValueError(f"positions {start}..{start + count - 1} of a table of {len(self.cos)}")
        return self.cos[start : start + count], self.sin[start : start + count]
