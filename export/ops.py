"""The ops a routed decoder is made of, as torch custom ops: a plain reference and a fake for tracing.

Eight ops, one name in every place (torch, ONNX, TensorRT): the five of routing, and three that every backend has its
own fast form of. Row layout throughout: heads stay packed in the last dimension, so that rows can be gathered by slot.

Letters: B batch, S rows of the step, A rows that run, N candidates, T text rows, C cache capacity, H query heads,
G key/value heads, d head size, E any row width.

| op | inputs | output |
|---|---|---|
| select | q_last [B, H*d], keys [B, S, G*d], candidates i64 [B, N], always i64 [B, T] | i64 [B, T + min(keep, N)] |
| select_pools | as select, then pools i64 [B, N], all_pools i64 [B, M] | i64 [B, T + rows kept of all pools] |
| votes | q [B, R, H*d] of the last R rows, keys [B, S, G*d] | [B, S, 1] |
| gather | x [B, S, E], slots i64 [B, A] | [B, A, E] |
| scatter | full [B, S, E], slots i64 [B, A], rows [B, A, E] | [B, S, E] |
| rms_norm | x [..., E], weight [E] | [..., E] |
| rotary | x [B, A, heads*d], cos and sin [S, d/2], slots i64 [B, A] | [B, A, heads*d] |
| attention | q [B, A, H*d], k, v [B, A, G*d], past k, past v [B, G, C, d], kv_len i32 [1] | out, present k, present v |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

Triple = tuple[Tensor, Tensor, Tensor]
SMALLEST = 1e-37  # of a score whose logarithm is taken


@custom_op("reroute::select", mutates_args=())
def select(
    q_last: Tensor,
    keys: Tensor,
    candidates: Tensor,
    always: Tensor,
    keep: int,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> Tensor:
    """The rows that run: all of `always` and the `keep` best of `candidates`, ascending.

    A candidate's score is the attention probability that the last row gives it: softmax over all S keys in fp32, one
    row per head, mean over heads (arXiv 2606.12412). Equal scores go to the candidate that comes first. With
    keep >= N, or N = 0, everything runs.
    """
    scores = last_row_scores(q_last, keys, num_heads, num_kv_heads, scale).gather(1, candidates)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.cat([always, candidates.gather(1, best)], dim=1).sort(dim=1).values


@custom_op("reroute::select_pools", mutates_args=())
def select_pools(
    q_last: Tensor,
    keys: Tensor,
    candidates: Tensor,
    always: Tensor,
    pools: Tensor,
    all_pools: Tensor,
    keep: int,
    whole: int,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> Tensor:
    """As `select`, where candidates compete within pools, and budgets may follow the size of a pool.

    A pool keeps its `keep` best candidates or, where `whole` is not 0, max(1, n * keep // whole) of them, n being the
    visual rows that the step has of this pool, also those that were removed before.

    Args:
        q_last: see `select`.
        keys: see `select`.
        candidates: see `select`.
        always: see `select`.
        pools: the pool of each candidate: 0 or more, never descending, fewer than M; the same in every batch row.
        all_pools: the pool of each of the step's visual rows.
        keep: budget, or numerator of a share.
        whole: 0, or denominator of a share.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        scale: of the scores.
    """
    scores = last_row_scores(q_last, keys, num_heads, num_kv_heads, scale).gather(1, candidates)
    kept = []
    for pool in all_pools[0].unique().tolist():
        places = torch.where(pools[0] == pool)[0]
        budget = max(1, int((all_pools[0] == pool).sum()) * keep // whole) if whole else keep
        best = scores[:, places].argsort(dim=1, descending=True, stable=True)[:, :budget]
        kept.append(candidates[:, places].gather(1, best))
    return torch.cat([always, *kept], dim=1).sort(dim=1).values


@select_pools.register_fake
def _(q_last, keys, candidates, always, pools, all_pools, keep, whole, num_heads, num_kv_heads, scale):
    return always.new_empty((always.shape[0], torch.library.get_ctx().new_dynamic_size()))


def last_row_scores(q_last: Tensor, keys: Tensor, num_heads: int, num_kv_heads: int, scale: float) -> Tensor:
    """Attention probability of the last row for each of S rows, fp32, mean over heads: [B, S]."""
    batch, rows, _ = keys.shape
    q = q_last.float().view(batch, num_kv_heads, num_heads // num_kv_heads, -1)
    k = keys.float().view(batch, rows, num_kv_heads, -1)
    probabilities = torch.softmax(torch.einsum("bghd,brgd->bghr", q, k) * scale, dim=-1)
    return probabilities.mean(dim=(1, 2))


@custom_op("reroute::votes", mutates_args=())
def votes(q: Tensor, keys: Tensor, num_heads: int, num_kv_heads: int, scale: float, largest: int) -> Tensor:
    """Logarithm of each row's score, where that is not the last row's mean over heads: [B, S, 1].

    The score is the attention probability that the last R rows give a row (each sees what is up to its own place), mean
    over these rows, then the largest over heads, or their mean where `largest` is 0. As keys of `select`, with one head
    and a query of 1, it ranks by the score itself: a softmax takes the logarithm back.

    Args:
        q: queries of the last R rows; where there are only S < R rows, the first R - S of them count nothing.
        keys: see `select`.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        scale: of the scores.
        largest: 1 for the largest over heads, 0 for the mean.
    """
    batch, rows, _ = q.shape
    total = keys.shape[1]
    own = torch.arange(rows, device=q.device) + (total - rows)
    seen = torch.arange(total, device=q.device) <= own.clamp(min=0)[:, None]
    wide = q.float().view(batch, rows, num_kv_heads, num_heads // num_kv_heads, -1)
    logits = torch.einsum("brghd,bsgd->bghrs", wide, keys.float().view(batch, total, num_kv_heads, -1)) * scale
    probabilities = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
    by_head = probabilities[:, :, :, own >= 0].mean(dim=3)
    scores = by_head.amax(dim=(1, 2)) if largest else by_head.mean(dim=(1, 2))
    return scores.clamp(min=SMALLEST).log().to(keys.dtype).unsqueeze(-1)


@votes.register_fake
def _(q, keys, num_heads, num_kv_heads, scale, largest):
    return keys.new_empty((*keys.shape[:2], 1))


@select.register_fake
def _(q_last, keys, candidates, always, keep, num_heads, num_kv_heads, scale):
    # T + min(keep, N) is left as a fresh symbol: a symbolic min() would be specialised by the exporter.
    return always.new_empty((always.shape[0], torch.library.get_ctx().new_dynamic_size()))


@custom_op("reroute::gather", mutates_args=())
def gather(x: Tensor, slots: Tensor) -> Tensor:
    """x[b, slots[b]]: the rows of a stage out of the full sequence."""
    return x.gather(1, slots[:, :, None].expand(-1, -1, x.shape[2]))


@gather.register_fake
def _(x, slots):
    return x.new_empty((*slots.shape, x.shape[2]))


@custom_op("reroute::scatter", mutates_args=())
def scatter(full: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """A copy of `full` with full[b, slots[b]] = rows[b]; every other row stays bit-identical."""
    return full.scatter(1, slots[:, :, None].expand(-1, -1, full.shape[2]), rows)


@scatter.register_fake
def _(full, slots, rows):
    return torch.empty_like(full)


@custom_op("reroute::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, statistics in fp32 (arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


@custom_op("reroute::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, num_heads: int) -> Tensor:
    """Rotary position embedding, half-split form (arXiv 2104.09864), with the table rows of `slots`.

    The slots are the position ids within the step: original positions survive routing because the table is gathered
    by original slot.
    """
    heads = x.view(*x.shape[:2], num_heads, -1)
    c, s = cos[slots].unsqueeze(2), sin[slots].unsqueeze(2)
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * c - right * s, right * c + left * s], dim=-1).view(x.shape)


@rotary.register_fake
def _(x, cos, sin, slots, num_heads):
    return torch.empty_like(x)


@custom_op("reroute::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> Triple:
    """Causal grouped-query attention over a cache of fixed capacity.

    The A new rows take cache rows kv_len - A to kv_len - 1; row i sees the cache up to its own place (lower-right
    causal). Rows from kv_len on are neither read nor written.
    """
    batch, rows, _ = q.shape
    length = int(kv_len)
    present = []
    for new, past in ((k, past_key), (v, past_value)):
        cache = past.clone()
        cache[:, :, length - rows : length] = new.view(batch, rows, num_kv_heads, -1).transpose(1, 2)
        present.append(cache)
    places = torch.arange(length - rows, length, device=q.device)
    mask = torch.arange(length, device=q.device)[None, :] <= places[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.view(batch, rows, num_heads, -1).transpose(1, 2),
        present[0][:, :, :length],
        present[1][:, :, :length],
        attn_mask=mask,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out.transpose(1, 2).reshape(q.shape), present[0], present[1]


@attention.register_fake
def _(q, k, v, past_key, past_value, kv_len, num_heads, num_kv_heads, scale):
    return torch.empty_like(q), torch.empty_like(past_key), torch.empty_like(past_value)
