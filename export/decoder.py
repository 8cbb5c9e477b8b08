"""The paper in plain torch: a Llama-type decoder whose stages run a routed subset of the visual rows.

Reroute (arXiv 2606.12412), in the stagewise form that is exported: at a decision layer *all* visual rows compete again,
the winners and the text rows run compactly through the stage, and only the next decision puts them back into the full
sequence. Rows that wait keep their hidden state bit for bit. Removal (FastV, arXiv 2403.06764; PyramidDrop, arXiv
2410.17247) differs in one line: what competes is only what still runs.

A decision ranks by the attention of the last row in its *scoring layer*. That is the decision layer itself (`own`, the
Reroute and PyramidDrop code), or the layer before it (`previous`, FastV's code, which reads the attention that this
layer computed anyway). Rows that wait have no attention there: their keys are projected from the state they wait in.

One graph serves prefill (N > 0), later turns, text-only prompts and decode (N = 0, T = 1), because every budget acts as
min(K, N). Inputs and outputs of `RoutedDecoder.forward`; B batch, T text rows, N visual rows, S = T + N, D hidden size:

| input | dtype | shape | meaning |
|---|---|---|---|
| input_ids | int64 | [B, T] | text tokens of this step, no image placeholders; T >= 1 |
| visual_embeds | float | [B, N, D] | projected visual tokens |
| text_slots, visual_slots | int64 | [T], [N] | places in this step: ascending, disjoint, complete; the last is text |
| rope_cos, rope_sin | float | [S, d/2] | rotary rows of this step's slots; renumbered: [stages, S, d/2], see below |
| kv_len | int32 | [stages] | valid cache rows of each stage after this step |
| past | float | [B, G, C_stage, d] | key and value cache of each layer, fixed capacity |

| output | shape | meaning |
|---|---|---|
| logits | [B, V] float32 | of the last row |
| routes | int64 [B, T + min(K_s, N)] for each routed stage | slots that ran |
| present | as past | the caches, updated |

With renumbered positions (PyramidDrop's code) the rows left after a removal are counted anew, and decode goes on from
there: row i of stage s stands at position `rows of stage s in the cache before this step` + i. Every stage has a rotary
table of its own, and a row's place among those that run is its index. Ranking still sees the numbers of the stage
before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reroute.export import ops
from reroute.manifest import TextModel
from reroute.schedule import Schedule

Cache = tuple[Tensor, Tensor]


class Output(NamedTuple):
    """Outputs of one step; see the module docstring."""

    logits: Tensor
    routes: list[Tensor]
    present: list[Cache]


class Rows:
    """The rows of a step while it runs: which of them run, and where they stand.

    Attributes:
        h: [B, A, D], the rows that run.
        slots: int64 [B, A], their places in the step, ascending.
        text, visual: int64 [B, T] and [B, N], the rows of `h` that always run and those that compete, at the time of
            `compete`.
        some_wait: whether there are rows that do not run and may come back.
    """

    def __init__(self, h: Tensor, text: Tensor, visual: Tensor, action: str) -> None:
        self.h, self.text, self.visual = h, text, visual
        self.full = h
        self.slots = self.all = indices(h)
        self.recoverable, self.some_wait = action == "reroute", False

    def compete(self) -> None:
        """All rows that may still run take part: what ran goes back to its place, what waited is still there."""
        if self.some_wait:
            self.h = ops.scatter(self.full, self.slots, self.h)
        self.slots, self.some_wait = self.all if self.recoverable else self.slots, False

    def take(self, chosen: Tensor) -> None:
        """Run only the rows `chosen`, int64 [B, A], of those that compete."""
        if self.recoverable:
            self.full, self.slots, self.some_wait = self.h, chosen, True
        else:
            self.slots = self.slots.gather(1, chosen)
            self.text, self.visual = places_after(chosen, self.text)
        self.h = ops.gather(self.h, chosen)


def indices(h: Tensor) -> Tensor:
    """0, 1, 2, ... for the rows of each batch item of `h` [B, A, D]: int64 [B, A]."""
    return torch.arange(h.shape[1], device=h.device).expand(h.shape[0], -1)


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
        """Rotated queries [B, A, H*d] of normed rows `x` at table rows `slots`."""
        return ops.rotary(self.q_proj(x), *rope, slots, self.model.num_heads)

    def rotate(self, key: Tensor, rope: Cache, slots: Tensor) -> Tensor:
        """Projected keys [B, A, G*d] rotated by the table rows `slots`."""
        return ops.rotary(key, *rope, slots, self.model.num_kv_heads)

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
        schedule = self.schedule
        own, renumbered = schedule.scoring == "own", schedule.positions == "renumbered"
        batch = input_ids.shape[0]
        text, visual = text_slots.expand(batch, -1), visual_slots.expand(batch, -1)
        tokens = torch.cat([torch.nn.functional.embedding(input_ids, self.embed), visual_embeds], dim=1)
        rows = Rows(ops.scatter(tokens, torch.cat([text, visual], dim=1), tokens), text, visual, schedule.action)

        def rope(stage: int) -> tuple[Cache, Tensor]:
            """Rotary table of a stage, and its rows that belong to the rows that run."""
            if renumbered:
                return (rope_cos[stage], rope_sin[stage]), indices(rows.h)
            return (rope_cos, rope_sin), rows.slots

        routes: list[Tensor] = []
        present: list[Cache] = []
        lengths = kv_len.split(1)
        # The last row's query and the candidates' keys, for a decision in the next layer.
        ballot: tuple[Tensor, Tensor] | None = None
        for number, stage in enumerate(schedule.stages):
            for index in range(stage.start, stage.stop):
                layer: Layer = self.layers[index]  # type: ignore[assignment]
                if ballot is not None and stage.keep is not None:
                    rows.compete()
                    rows.take(self.choose(*ballot, rows, stage.keep))
                    routes.append(rows.slots)
                    ballot = None
                if index not in schedule.scoring_layers:
                    x = layer.input_norm(rows.h)
                    key = layer.rotate(layer.k_proj(x), *rope(number))
                else:
                    ran = rows.slots if rows.some_wait else None
                    rows.compete()
                    x = layer.input_norm(rows.h)
                    raw = layer.k_proj(x)
                    table, places = rope(number - own)
                    key = layer.rotate(raw, table, places)
                    query = layer.query(x[:, -1:], table, places[:, -1:])[:, 0]
                    if own:
                        assert stage.keep is not None
                        ran = self.choose(query, key, rows, stage.keep)
                    else:
                        ballot = (query, key)
                    if ran is not None:
                        rows.take(ran)
                        x = ops.gather(x, ran)
                        key = layer.rotate(ops.gather(raw, ran), *rope(number)) if renumbered else ops.gather(key, ran)
                    if own:
                        routes.append(rows.slots)
                rows.h, cache = layer(rows.h, x, key, *rope(number), lengths[number], past[index])
                present.append(cache)
        logits = self.lm_head(self.norm(rows.h[:, -1])).float()
        return Output(logits, routes, present)

    def choose(self, q_last: Tensor, keys: Tensor, rows: Rows, keep: int) -> Tensor:
        """The decision, see `reroute.export.ops.select`; recorded when `decisions` is a list."""
        heads, groups, scale = self.model.num_heads, self.model.num_kv_heads, self.model.head_dim**-0.5
        if self.decisions is not None:
            scores = ops.last_row_scores(q_last, keys, heads, groups, scale)
            self.decisions.append((rows.visual, scores.gather(1, rows.visual)))
        return ops.select(q_last, keys, rows.visual, rows.text, keep, heads, groups, scale)


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
