"""The paper in plain torch: a Llama-type decoder whose stages run a routed subset of the visual rows.

Reroute (arXiv 2606.12412), in the stagewise form that is exported: at a decision layer *all* visual rows compete again,
the winners and the text rows run compactly through the stage, and only the next decision puts them back into the full
sequence. Rows that wait keep their hidden state bit for bit. Removal (PyramidDrop, arXiv 2410.17247, with original
positions) differs in one line: what competes is only what still runs.

One graph serves prefill (N > 0), later turns, text-only prompts and decode (N = 0, T = 1), because every budget acts as
min(K, N). Inputs and outputs of `RoutedDecoder.forward`; B batch, T text rows, N visual rows, S = T + N, D hidden size:

| input | dtype | shape | meaning |
|---|---|---|---|
| input_ids | int64 | [B, T] | text tokens of this step, no image placeholders; T >= 1 |
| visual_embeds | float | [B, N, D] | projected visual tokens |
| text_slots, visual_slots | int64 | [T], [N] | places in this step: ascending, disjoint, complete; the last is text |
| rope_cos, rope_sin | float | [S, d/2] | rotary rows of this step's positions |
| kv_len | int32 | [stages] | valid cache rows of each stage after this step |
| past | float | [B, G, C_stage, d] | key and value cache of each layer, fixed capacity |

| output | shape | meaning |
|---|---|---|
| logits | [B, V] float32 | of the last row |
| routes | int64 [B, T + min(K_s, N)] for each routed stage | slots that ran |
| present | as past | the caches, updated |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reroute.export import ops
from reroute.manifest import TextModel
from reroute.routing import Schedule

Cache = tuple[Tensor, Tensor]


class Output(NamedTuple):
    """Outputs of one step; see the module docstring."""

    logits: Tensor
    routes: list[Tensor]
    present: list[Cache]


class Linear(nn.Module):
    """x @ weight + bias with the weight stored [in, out]: what ONNX MatMul reads, so nothing is transposed later."""

    def __init__(self, rows: int, columns: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(columns), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return ops.rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer, in parts, so that a decision can reuse the norm and the keys it scored with."""

    def __init__(self, model: TextModel, *, attention_bias: bool, mlp_bias: bool) -> None:
        super().__init__()
        size, q_size, kv_size = (
            model.hidden_size,
            model.num_heads * model.head_dim,
            model.num_kv_heads * model.head_dim,
        )
        self.model = model
        self.scale = model.head_dim**-0.5
        self.input_norm = Norm(size, model.rms_norm_eps)
        self.q_proj = Linear(size, q_size, bias=attention_bias)
        self.k_proj = Linear(size, kv_size, bias=attention_bias)
        self.v_proj = Linear(size, kv_size, bias=attention_bias)
        self.o_proj = Linear(q_size, size, bias=attention_bias)
        self.post_norm = Norm(size, model.rms_norm_eps)
        self.gate_proj = Linear(size, model.intermediate_size, bias=mlp_bias)
        self.up_proj = Linear(size, model.intermediate_size, bias=mlp_bias)
        self.down_proj = Linear(model.intermediate_size, size, bias=mlp_bias)

    def query(self, x: Tensor, rope: Cache, slots: Tensor) -> Tensor:
        """Rotated queries [B, A, H*d] of normed rows `x` at `slots`."""
        return ops.rotary(self.q_proj(x), *rope, slots, self.model.num_heads)

    def key(self, x: Tensor, rope: Cache, slots: Tensor) -> Tensor:
        """Rotated keys [B, A, G*d] of normed rows `x` at `slots`."""
        return ops.rotary(self.k_proj(x), *rope, slots, self.model.num_kv_heads)

    def forward(
        self, h: Tensor, x: Tensor, key: Tensor, rope: Cache, slots: Tensor, kv_len: Tensor, past: Cache
    ) -> tuple[Tensor, Cache]:
        """Run rows `h` [B, A, D], whose norm `x` and rotated keys are already there; returns rows and cache."""
        m = self.model
        q = self.query(x, rope, slots)
        a, *present = ops.attention(q, key, self.v_proj(x), *past, kv_len, m.num_heads, m.num_kv_heads, self.scale)
        h = h + self.o_proj(a)
        x = self.post_norm(h)
        h = h + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return h, (present[0], present[1])


class RoutedDecoder(nn.Module):
    """A decoder with a fixed routing schedule. Parameters are uninitialised: load them with `load_state_dict`."""

    def __init__(
        self, model: TextModel, schedule: Schedule, *, attention_bias: bool = False, mlp_bias: bool = False
    ) -> None:
        super().__init__()
        if schedule.num_layers != model.num_layers:
            raise ValueError(f"schedule of {schedule.num_layers} layers for a decoder of {model.num_layers}")
        self.model, self.schedule = model, schedule
        self.embed = nn.Parameter(torch.empty(model.vocab_size, model.hidden_size), requires_grad=False)
        layers = (Layer(model, attention_bias=attention_bias, mlp_bias=mlp_bias) for _ in range(model.num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(model.hidden_size, model.rms_norm_eps)
        self.lm_head = Linear(model.hidden_size, model.vocab_size)
        # A list here is given what each decision ranked: (candidates [B, N], their scores [B, N]).
        self.decisions: list[tuple[Tensor, Tensor]] | None = None

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        text_slots: Tensor,
        visual_slots: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        kv_len: Tensor,
        past: list[Cache],
    ) -> Output:
        """One step; see the module docstring for every shape."""
        rope = (rope_cos, rope_sin)
        batch = input_ids.shape[0]
        text, visual = text_slots.expand(batch, -1), visual_slots.expand(batch, -1)

        # Every row of the step in sequence order. `slots` says where each of the rows `h` stands in it.
        order = torch.cat([text, visual], dim=1)
        rows = torch.cat([torch.nn.functional.embedding(input_ids, self.embed), visual_embeds], dim=1)
        h = full = ops.scatter(rows, order, rows)
        slots = everything = torch.arange(order.shape[1], device=order.device).expand(batch, -1)

        routes: list[Tensor] = []
        present: list[Cache] = []
        lengths = kv_len.split(1)
        for number, stage in enumerate(self.schedule.stages):
            for index in range(stage.start, stage.stop):
                layer: Layer = self.layers[index]  # type: ignore[assignment]
                if stage.keep is not None and index == stage.start:
                    if self.schedule.action == "reroute":
                        # All rows compete again: what ran goes back to its place, what waited is still there.
                        h = full = ops.scatter(full, slots, h)
                        slots = everything
                    x = layer.input_norm(h)
                    key = layer.key(x, rope, slots)
                    q_last = layer.query(x[:, -1:], rope, slots[:, -1:])
                    chosen = self.choose(q_last[:, 0], key, visual, text, stage.keep)
                    h, x, key = (ops.gather(rows, chosen) for rows in (h, x, key))
                    if self.schedule.action == "reroute":
                        slots = chosen
                    else:
                        slots = slots.gather(1, chosen)
                        text, visual = places_after(chosen, text)
                    routes.append(slots)
                else:
                    x = layer.input_norm(h)
                    key = layer.key(x, rope, slots)
                h, cache = layer(h, x, key, rope, slots, lengths[number], past[index])
                present.append(cache)
        logits = self.lm_head(self.norm(h[:, -1])).float()
        return Output(logits, routes, present)

    def choose(self, q_last: Tensor, keys: Tensor, candidates: Tensor, always: Tensor, keep: int) -> Tensor:
        """The decision, see `reroute.export.ops.select`; recorded when `decisions` is a list."""
        heads, groups, scale = self.model.num_heads, self.model.num_kv_heads, self.model.head_dim**-0.5
        if self.decisions is not None:
            scores = ops.last_row_scores(q_last, keys, heads, groups, scale)
            self.decisions.append((candidates, scores.gather(1, candidates)))
        return ops.select(q_last, keys, candidates, always, keep, heads, groups, scale)


def places_after(chosen: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Where the text rows and the kept visual rows stand once only `chosen` is left (removal).

    Args:
        chosen: int64 [B, A], ascending rows of the sequence before; contains all of `text`.
        text: int64 [B, T], ascending text rows of the sequence before.

    Returns:
        Text rows [B, T] and visual rows [B, A - T] of the sequence after, ascending.
    """
    places = torch.arange(chosen.shape[1], device=chosen.device)
    text_after = (chosen[:, None, :] < text[:, :, None]).sum(-1)
    is_text = (places[None, None, :] == text_after[:, :, None]).any(1)
    # Text sorts below zero and so comes first; the rest are the visual rows, in order.
    keys = torch.where(is_text, places - chosen.shape[1], places).sort(dim=1).values
    return text_after, keys[:, text.shape[1] :]
