"""The algorithms, stated once more and on their own: per layer, over full S x S matrices, in float64 numpy.

Written from the papers' text (arXiv 2606.12412, 2410.17247), not from the product: no stages, no compact rows, no cache
reuse, no torch. One prompt of one batch row; slow on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Result:
    """What the algorithm did.

    Attributes:
        hidden: [S, D] hidden states after the last layer; rows that did not run keep what they had.
        ran: for each layer, the ascending slots that ran.
        scores: for each decision layer, the score of every row, [S].
        keys: for each layer, the rotated keys of the rows that ran, [A, H_kv, d].
        values: for each layer, their values.
        positions: for each layer, the rotary position of the next token.
    """

    hidden: np.ndarray
    ran: list[np.ndarray] = field(default_factory=list)
    scores: dict[int, np.ndarray] = field(default_factory=dict)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    waited: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


def independent_forward(
    weights: dict[str, np.ndarray],
    h: np.ndarray,
    *,
    is_visual: np.ndarray,
    decisions: dict[int, int],
    action: str,
    num_layers: int,
    heads: int,
    kv_heads: int,
    eps: float,
    theta: float,
    scoring: str = "own",
    renumbered: bool = False,
    positions: np.ndarray | None = None,
    last_rows: int = 1,
    largest_head: bool = False,
) -> Result:
    """Run the decoder layers on `h` [S, D]. `decisions` maps a layer to its budget. Weights are [out, in], HF names.

    `positions` [S] are the rotary positions of the rows, by default 0, 1, 2, ... The score is the mean over the last
    `last_rows` rows of what competes, then over heads, or their largest.
    """
    h = h.astype(np.float64).copy()
    rows = np.arange(len(h))
    alive = rows
    running = rows
    at = (rows if positions is None else positions).copy()
    before = h
    result = Result(hidden=h)
    for layer in range(num_layers):
        w = of_layer(weights, layer)
        if layer in decisions:
            pool = rows if action == "reroute" else alive
            # FastV's code looks at the layer before, and at what went into it.
            judge, seen = (w, h) if scoring == "own" else (of_layer(weights, layer - 1), before)
            x = norm(seen[pool], judge["input_layernorm.weight"], eps)
            q = rope(split(x @ judge["self_attn.q_proj.weight"].T, heads), at[pool], theta)
            k = rope(split(x @ judge["self_attn.k_proj.weight"].T, kv_heads), at[pool], theta)
            probabilities = attention_probabilities(q, k, causal=True)  # [heads, P, P]
            score = np.full(len(h), -np.inf)
            by_head = probabilities[:, -last_rows:].mean(axis=1)
            score[pool] = by_head.max(axis=0) if largest_head else by_head.mean(axis=0)
            result.scores[layer] = score
            visual = pool[is_visual[pool]]
            ranked = sorted(visual.tolist(), key=lambda slot, s=score: (-s[slot], slot))
            best = ranked[: decisions[layer]]
            running = np.asarray(sorted([*pool[~is_visual[pool]].tolist(), *best]))
            alive = running
            if renumbered:
                at[running] = np.arange(len(running))
        before = h.copy()
        x = norm(h[running], w["input_layernorm.weight"], eps)
        q = rope(split(x @ w["self_attn.q_proj.weight"].T, heads), at[running], theta)
        k = rope(split(x @ w["self_attn.k_proj.weight"].T, kv_heads), at[running], theta)
        v = split(x @ w["self_attn.v_proj.weight"].T, kv_heads)
        p = attention_probabilities(q, k, causal=True)
        mixed = np.einsum("hqk,khd->qhd", p, np.repeat(v, heads // kv_heads, axis=1))
        y = h[running] + mixed.reshape(len(running), -1) @ w["self_attn.o_proj.weight"].T
        z = norm(y, w["post_attention_layernorm.weight"], eps)
        gate = z @ w["mlp.gate_proj.weight"].T
        y = y + (gate / (1 + np.exp(-gate)) * (z @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        h[running] = y
        result.ran.append(running)
        result.keys.append(k)
        result.values.append(v)
        result.positions.append(int(at[running[-1]]) + 1)
        result.waited.append((np.setdiff1d(rows, running), before, h.copy()))
    return result


def independent_decode(
    weights: dict[str, np.ndarray], result: Result, h: np.ndarray, *, heads: int, eps: float, theta: float
) -> np.ndarray:
    """Run one more token `h` [1, D] through all layers and into the caches of `result`. Returns its logits [V]."""
    h = h.astype(np.float64)
    for layer, (keys, values, position) in enumerate(zip(result.keys, result.values, result.positions, strict=True)):
        w = of_layer(weights, layer)
        kv_heads = keys.shape[1]
        x = norm(h, w["input_layernorm.weight"], eps)
        q = rope(split(x @ w["self_attn.q_proj.weight"].T, heads), np.asarray([position]), theta)
        k = rope(split(x @ w["self_attn.k_proj.weight"].T, kv_heads), np.asarray([position]), theta)
        v = split(x @ w["self_attn.v_proj.weight"].T, kv_heads)
        result.keys[layer], result.values[layer] = np.concatenate([keys, k]), np.concatenate([values, v])
        result.positions[layer] = position + 1
        p = attention_probabilities(q, result.keys[layer], causal=False)
        mixed = np.einsum("hqk,khd->qhd", p, np.repeat(result.values[layer], heads // kv_heads, axis=1))
        h = h + mixed.reshape(1, -1) @ w["self_attn.o_proj.weight"].T
        z = norm(h, w["post_attention_layernorm.weight"], eps)
        gate = z @ w["mlp.gate_proj.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * (z @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(h, weights["norm.weight"], eps)[0] @ weights["lm_head.weight"].T


def of_layer(weights: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    return {key.split(f"layers.{layer}.")[1]: value for key, value in weights.items() if f"layers.{layer}." in key}


def last_logits(weights: dict[str, np.ndarray], result: Result, eps: float) -> np.ndarray:
    """Logits [V] of the last row."""
    return norm(result.hidden[-1:], weights["norm.weight"], eps)[0] @ weights["lm_head.weight"].T


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1)


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotate pairs (i, i + d/2) of [A, heads, d] as complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention_probabilities(q: np.ndarray, k: np.ndarray, *, causal: bool) -> np.ndarray:
    """[heads, Q, K] softmax of q k / sqrt(d), one full matrix."""
    heads, groups = q.shape[1], k.shape[1]
    products = np.einsum("qhd,khd->hqk", q, np.repeat(k, heads // groups, axis=1)) / np.sqrt(q.shape[-1])
    if causal:
        products = np.where(np.tri(len(q), len(k), dtype=bool), products, -np.inf)
    products = np.exp(products - products.max(axis=-1, keepdims=True))
    return products / products.sum(axis=-1, keepdims=True)
