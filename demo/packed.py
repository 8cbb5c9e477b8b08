"""Training forward in plain torch over the weights of a ``LlavaForConditionalGeneration``.

All questions about an image share one visual prefix. A question's rows see the prefix and the rows of their own
slot, and their positions start right after the prefix, so every question has exactly the hidden states it would
have alone in the transformers model (``tests/demo`` holds the comparison), at a fraction of the cost.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as fn
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .model import MEAN, STD, VISUAL_TOKENS
from .tokenizer import BOS, encode_words

PREFIX_TEXT = 2  # "<s>" and "user:" come before the image
_USER = encode_words("user:")[0]


def clip_layer(x: Tensor, w: tuple[Tensor, ...], heads: int) -> Tensor:
    """One CLIP encoder layer on [B, N, D]; ``w`` in the order of ``clip_weights``."""
    (n1w, n1b, qw, qb, kw, kb, vw, vb, ow, ob, n2w, n2b, f1w, f1b, f2w, f2b) = w
    b, n, d = x.shape
    h = fn.layer_norm(x, (d,), n1w, n1b, 1e-5)
    q, k, v = (fn.linear(h, a, c).view(b, n, heads, -1).transpose(1, 2) for a, c in ((qw, qb), (kw, kb), (vw, vb)))
    a = attend(q, [(k, v, None)])
    x = x + fn.linear(a.transpose(1, 2).reshape(b, n, d), ow, ob)
    h = fn.linear(fn.layer_norm(x, (d,), n2w, n2b, 1e-5), f1w, f1b)
    return x + fn.linear(h * torch.sigmoid(1.702 * h), f2w, f2b)


def clip_weights(layer: Any) -> tuple[Tensor, ...]:
    """Weights and biases of a CLIP layer in the order ``clip_layer`` takes them."""
    a, m = layer.self_attn, layer.mlp
    parts = (layer.layer_norm1, a.q_proj, a.k_proj, a.v_proj, a.out_proj, layer.layer_norm2, m.fc1, m.fc2)
    return tuple(t for p in parts for t in (p.weight, p.bias))


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32."""
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, S, d] by [B or 1, 1, S, d] tables, halves paired as Llama does."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attend(q: Tensor, parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Softmax attention of [B, H, R, d] queries over several groups of keys, as one softmax over all of them.

    A part is (keys, values, additive mask). Keys of shape [B, H, K, d] serve all rows; keys of shape
    [B, H, Q, T, d] serve the T rows of slot Q only. Written out because the CPU's fused kernel costs several times
    as much at this head size, and cannot skip the blocks that other slots' keys would be.
    """
    scale = q.shape[-1] ** -0.5
    scores = []
    for k, _, mask in parts:
        rows = q.reshape(*k.shape[:-2], -1, q.shape[-1]) if k.ndim == 5 else q
        s = (rows @ k.transpose(-1, -2)).float() * scale
        scores.append(s if mask is None else s + mask)
    top = torch.stack([s.detach().amax(-1).flatten(2).view(q.shape[:3]) for s in scores]).amax(0)
    total, out = torch.zeros(()), torch.zeros(())
    for s, (_, v, _) in zip(scores, parts, strict=True):
        e = torch.exp(s - top.view(s.shape[:-1])[..., None])
        total = total + e.sum(-1).view(q.shape[:3])
        out = out + (e.to(v.dtype) @ v).view(q.shape).float()
    return (out / total[..., None]).to(q.dtype)


def causal(rows: int, keys: int, like: Tensor) -> Tensor:
    """Additive mask [rows, keys] of the last ``rows`` of ``keys`` positions."""
    ones = torch.ones(rows, keys, dtype=torch.bool, device=like.device)
    return torch.zeros(rows, keys, device=like.device).masked_fill(ones.triu(keys - rows + 1), float("-inf"))


def llama_layer(
    x: Tensor, w: tuple[Tensor, ...], cos: Tensor, sin: Tensor, prefix: int, length: int, dim: int, last: bool
) -> Tensor:
    """One decoder layer on [B, prefix + rows, D], whose rows are slots of ``length`` tokens.

    With ``last`` only the question rows are computed and returned: nothing reads the prefix after the last layer.
    """
    n1, qw, kw, vw, ow, n2, gate, up, down = w
    b, s, _ = x.shape
    h = rms(x, n1)
    k = rotate(fn.linear(h, kw).view(b, s, -1, dim).transpose(1, 2), cos, sin)
    v = fn.linear(h, vw).view(b, s, -1, dim).transpose(1, 2)
    if last:
        h, x, cos, sin = h[:, prefix:], x[:, prefix:], cos[:, :, prefix:], sin[:, :, prefix:]
    q = rotate(fn.linear(h, qw).view(b, h.shape[1], -1, dim).transpose(1, 2), cos, sin)
    q, k = q.to(v.dtype), k.to(v.dtype)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    heads = q.shape[1]
    own_k, own_v = (t[:, :, prefix:].reshape(b, heads, -1, length, dim) for t in (k, v))
    front_k, front_v = k[:, :, :prefix], v[:, :, :prefix]
    split = 0 if last else prefix
    pieces = []
    # The prefix in blocks of rows, each over the keys up to its end: half of the square is never computed.
    step = max(-(-prefix // 3), 128)
    for i in range(0, split, step):
        end = min(i + step, prefix)
        pieces.append(attend(q[:, :, i:end], [(front_k[:, :, :end], front_v[:, :, :end], causal(end - i, end, q))]))
    own = (own_k, own_v, causal(length, length, q))
    pieces.append(attend(q[:, :, split:], [(front_k, front_v, None), own]))
    a = torch.cat(pieces, 2)
    x = x + fn.linear(a.transpose(1, 2).reshape(b, x.shape[1], -1), ow)
    h = rms(x, n2)
    return x + fn.linear(fn.silu(fn.linear(h, gate)) * fn.linear(h, up), down)


def looked_at(
    x: Tensor, w: tuple[Tensor, ...], cos: Tensor, sin: Tensor, prefix: int, length: int, dim: int, own: Tensor
) -> Tensor:
    """Attention probability, mean over heads, that each question row gives to its object's visual tokens.

    ``own`` [B, rows, K] marks those tokens; the result is [B, rows]. Rows of the same slot are left out of the
    softmax, so that the probability is among the prefix only.
    """
    n1, qw, kw = w[:3]
    b, rows = x.shape[0], x.shape[1] - prefix
    h = rms(x, n1)
    k = fn.linear(h[:, :prefix], kw).view(b, prefix, -1, dim).transpose(1, 2)
    q = fn.linear(h[:, prefix:], qw).view(b, rows, -1, dim).transpose(1, 2)
    k, q = rotate(k, cos[:, :, :prefix], sin[:, :, :prefix]), rotate(q, cos[:, :, prefix:], sin[:, :, prefix:])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    p = torch.softmax((q.bfloat16() @ k.bfloat16().transpose(-1, -2)).float() * dim**-0.5, -1)
    return (p[..., PREFIX_TEXT:] * own[:, None]).sum(-1).mean(1)


def llama_weights(layer: Any) -> tuple[Tensor, ...]:
    """Weights of a Llama layer in the order ``llama_layer`` takes them."""
    a, m = layer.self_attn, layer.mlp
    parts = (layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.o_proj)
    parts += (layer.post_attention_layernorm, m.gate_proj, m.up_proj, m.down_proj)
    return tuple(p.weight for p in parts)


class Packed:
    """The two halves of the forward; ``compiled`` wraps one layer of each kind in ``torch.compile``."""

    def __init__(self, model: LlavaForConditionalGeneration, compiled: bool = False) -> None:
        torch._dynamo.config.cache_size_limit = 64  # one compilation for each number of rows
        self.model: Any = model  # transformers types its submodules as Tensor | Module
        wrap = partial(torch.compile, dynamic=False) if compiled else (lambda f: f)
        self.clip_layer, self.llama_layer, self.looked_at = wrap(clip_layer), wrap(llama_layer), wrap(looked_at)

    def visual(self, pixels: Tensor) -> Tensor:
        """Projected visual tokens [B, 576, D] of uint8 pixels [B, 192, 192, 3]."""
        return self.project(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """The tower's features of the patches, [B, 576, D], at the layer that LLaVA reads."""
        tower = self.model.model.vision_tower
        mean, std = (torch.tensor(c, device=pixels.device) for c in (MEAN, STD))
        x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        e = tower.embeddings
        # The patch embedding as a matrix product: a stride-8 convolution is slow in bf16 on a CPU.
        p = e.patch_size
        b, c, side, _ = x.shape
        g = side // p
        x = x.reshape(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)
        x = fn.linear(x, e.patch_embedding.weight.flatten(1))
        x = torch.cat((e.class_embedding.to(x.dtype).expand(b, 1, -1), x), 1) + e.position_embedding.weight
        n = tower.pre_layrnorm
        x = fn.layer_norm(x.float(), x.shape[-1:], n.weight, n.bias, n.eps)
        for layer in tower.encoder.layers[:-1]:
            x = self.clip_layer(x, clip_weights(layer), layer.self_attn.num_heads)
        return x[:, 1:]

    def project(self, x: Tensor) -> Tensor:
        """The multimodal projector, [B, N, D]."""
        p = self.model.model.multi_modal_projector
        return fn.linear(fn.gelu(fn.linear(x, p.linear_1.weight, p.linear_1.bias)), p.linear_2.weight, p.linear_2.bias)

    def answers(
        self,
        visual: Tensor,
        keep: Tensor,
        ids: Tensor,
        watch: tuple[int, ...] = (),
        own: Tensor | None = None,
        stages: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, Q, T, V] of packed questions ``ids`` [B, Q, T] about the visual tokens ``keep`` [B, K].

        For the layers ``watch`` also what ``looked_at`` gives for the tokens ``own`` [B, Q * T, K], and the question
        rows [B, Q * T, D] that go into that layer. ``stages`` maps a layer to the rows of ``keep`` [B, k] that run
        from it on, until the next such layer: the other visual rows wait there, unchanged and unseen. What
        ``looked_at`` looks at is all of them, the waiting ones too.
        """
        lm, config = self.model.model.language_model, self.model.config.text_config
        b, count, length = ids.shape
        dim = config.head_dim
        start = lm.embed_tokens.weight[[BOS, _USER]].expand(b, -1, -1)
        seen = full = torch.gather(visual, 1, keep[..., None].expand(-1, -1, visual.shape[-1])).float()
        x = torch.cat((start, seen, lm.embed_tokens(ids.flatten(1))), 1)
        prefix, running = PREFIX_TEXT + keep.shape[1], None
        cos, sin = all_cos, all_sin = self.tables(keep, count, length, dim)
        watched: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(lm.layers):
            final = i == len(lm.layers) - 1
            watching, change = own is not None and i in watch, stages is not None and i in stages
            if watching or change:
                front, seen, back = x.split((PREFIX_TEXT, prefix - PREFIX_TEXT, count * length), 1)
                full = seen if running is None else full.scatter(1, running[..., None].expand_as(seen), seen)
                if own is not None and watching:
                    every = torch.cat((front, full, back), 1)
                    end = PREFIX_TEXT + keep.shape[1]
                    mass = self.looked_at(every, llama_weights(layer), all_cos, all_sin, end, length, dim, own)
                    watched.append((mass, back))
                if stages is not None and change:
                    running = stages[i]
                    seen = full.gather(1, running[..., None].expand(-1, -1, full.shape[-1]))
                    x = torch.cat((front, seen, back), 1)
                    prefix = PREFIX_TEXT + running.shape[1]
                    cos, sin = self.tables(keep.gather(1, running), count, length, dim)
            x = self.llama_layer(x, llama_weights(layer), cos, sin, prefix, length, dim, final)
        logits = fn.linear(rms(x, lm.norm.weight), self.model.lm_head.weight)
        return logits.view(b, count, length, -1), watched

    @staticmethod
    def tables(keep: Tensor, count: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
        """Rotary tables [B or 1, 1, S, dim] of the original positions."""
        dev = keep.device
        every = keep.shape[1] == VISUAL_TOKENS
        keep = keep[:1] if every else keep
        b = keep.shape[0]
        front = torch.arange(PREFIX_TEXT, device=dev).expand(b, -1)
        back = (PREFIX_TEXT + VISUAL_TOKENS + torch.arange(length, device=dev)).repeat(count).expand(b, -1)
        pos = torch.cat((front, PREFIX_TEXT + keep, back), 1).float()
        freq = 10000.0 ** (-torch.arange(0, dim, 2, device=dev).float() / dim)
        angle = (pos[..., None] * freq).repeat(1, 1, 2)[:, None]
        return angle.cos(), angle.sin()
