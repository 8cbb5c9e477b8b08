"""The paper in plain torch: a Llama-type decoder whose stages run a routed subset of the visual rows.

Reroute (arXiv 2606.12412), in the stagewise form that is exported: at a decision layer *all* visual rows compete again,
the winners and the text rows run compactly through the stage, and only the next decision puts them back into the full
sequence. Rows that wait keep their hidden state bit for bit. Removal (FastV, arXiv 2403.06764; PyramidDrop, arXiv
2410.17247) differs in one line: what competes is only what still runs.

A decision ranks by the attention of the last row in its *scoring layer*. That is the decision layer itself (`own`, the
Reroute and PyramidDrop code), or the layer before it (`previous`, FastV's code, which reads the attention that this
layer computed anyway). Rows that wait have no attention there: their keys are projected from the state they wait in.
More than one of the last rows may rank, and the largest of all heads instead of their mean (Nüwa's Qwen2.5-VL code).

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
| visual_images | int64 | [N] | image that a visual row is of, ascending from 0; only for a budget per image |
| deepstack | float | [E, B, N, D] | what is added to the visual rows after layers 0..E-1; only for models with it |

| output | shape | meaning |
|---|---|---|
| logits | [B, V] float32 | of the last row |
| routes | int64 [B, T + min(K_s, N)] for each routed stage | slots that ran |
| present | as past | the caches, updated |

With renumbered positions (PyramidDrop's code) the rows left after a removal are counted anew, and decode goes on from
there: row i of stage s stands at position `rows of stage s in the cache before this step` + i. Every stage has a rotary
table of its own, and a row's place among those that run is its index. Ranking still sees the numbers of the stage
before.

Deepstack features (Qwen3-VL; arXiv 2406.04334) belong to the image, not to a layer's computation: they are added to all
visual rows of the full sequence, also to those that wait while the layer runs without them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reroute.export import ops
from reroute.manifest import TextModel
from reroute.schedule import Schedule, Stage

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

    def add(self, full: Tensor) -> None:
        """Add `full` [B, S, D] to the rows of the step, to those that run and to those that wait."""
        self.h = self.h + (full if self.slots is self.all else ops.gather(full, self.slots))
        if self.some_wait:
            self.full = self.full + full

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


def inverse(slots: Tensor) -> Tensor:
    """Where each of 0, 1, 2, ... stands in a permutation of them: int64 [B, S]."""
    places = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape[0], -1)
    return torch.zeros_like(slots).scatter(1, slots, places)


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


class Embedding(nn.Module):
    """Rows of a table [V, D] by index."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        """int64 [...] to [..., D]."""
        return nn.functional.embedding(index, self.weight)


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

    def __init__(self, model: TextModel, biased: Collection[str]) -> None:
        super().__init__()
        size, q_size, kv_size = (
            model.hidden_size,
            model.num_heads * model.head_dim,
            model.num_kv_heads * model.head_dim,
        )
        self.model = model
        self.scale = model.head_dim**-0.5
        self.input_norm = Norm(size, model.rms_norm_eps)
        self.q_proj = Linear(size, q_size, bias="q_proj" in biased)
        self.k_proj = Linear(size, kv_size, bias="k_proj" in biased)
        self.v_proj = Linear(size, kv_size, bias="v_proj" in biased)
        self.o_proj = Linear(q_size, size, bias="o_proj" in biased)
        self.q_norm = Norm(model.head_dim, model.rms_norm_eps) if model.qk_norm else None
        self.k_norm = Norm(model.head_dim, model.rms_norm_eps) if model.qk_norm else None
        self.post_norm = Norm(size, model.rms_norm_eps)
        self.gate_proj = Linear(size, model.intermediate_size, bias="gate_proj" in biased)
        self.up_proj = Linear(size, model.intermediate_size, bias="up_proj" in biased)
        self.down_proj = Linear(model.intermediate_size, size, bias="down_proj" in biased)

    def query(self, x: Tensor, rope: Cache, slots: Tensor) -> Tensor:
        """Rotated queries [B, A, H*d] of normed rows `x` at table rows `slots`."""
        return ops.rotary(self.per_head(self.q_norm, self.q_proj(x)), *rope, slots, self.model.num_heads)

    def key(self, x: Tensor) -> Tensor:
        """Keys [B, A, G*d] of normed rows `x`, before they are rotated."""
        return self.per_head(self.k_norm, self.k_proj(x))

    def per_head(self, norm: Norm | None, x: Tensor) -> Tensor:
        """The norm of every head of `x` [B, A, heads*d], for models that have one."""
        return x if norm is None else norm(x.unflatten(-1, (-1, self.model.head_dim))).flatten(2)

    def rotate(self, key: Tensor, rope: Cache, slots: Tensor) -> Tensor:
        """Keys [B, A, G*d] rotated by the table rows `slots`."""
        return ops.rotary(key, *rope, slots, self.model.num_kv_heads)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        key: Tensor,
        rope: Cache,
        slots: Tensor,
        kv_len: Tensor,
        past: Cache,
        *,
        only_last: bool = False,
    ) -> tuple[Tensor, Cache]:
        """Run rows `h` [B, A, D], whose norm `x` and rotated keys are already there; returns rows and cache.

        `only_last` returns the last row, [B, 1, D]: the cache needs all rows, but nothing behind attention does.
        """
        m = self.model
        q = self.query(x, rope, slots)
        a, *present = ops.attention(q, key, self.v_proj(x), *past, kv_len, m.num_heads, m.num_kv_heads, self.scale)
        if only_last:
            h, a = h[:, -1:], a[:, -1:]
        h = h + self.o_proj(a)
        x = self.post_norm(h)
        h = h + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return h, (present[0], present[1])


class RoutedDecoder(nn.Module):
    """A decoder with a fixed routing schedule. Parameters are uninitialised: load them with `load_state_dict`.

    `biased` names the projections with a bias, for example q_proj.
    """

    def __init__(self, model: TextModel, schedule: Schedule, biased: Collection[str] = ()) -> None:
        super().__init__()
        if schedule.num_layers != model.num_layers:
            raise ValueError(f"schedule of {schedule.num_layers} layers for a decoder of {model.num_layers}")
        self.model, self.schedule = model, schedule
        self.embed = Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model, biased) for _ in range(model.num_layers))
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
        visual_images: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> Output:
        """One step; see the module docstring for every shape."""
        schedule = self.schedule
        own, renumbered = schedule.scoring == "own", schedule.positions == "renumbered"
        batch = input_ids.shape[0]
        text, visual = text_slots.expand(batch, -1), visual_slots.expand(batch, -1)
        tokens = torch.cat([self.embed(input_ids), visual_embeds], dim=1)
        # Not a scatter: the plugin's wants slots that ascend, and text stands on both sides of an image.
        order = inverse(torch.cat([text, visual], dim=1))
        rows = Rows(ops.gather(tokens, order), text, visual, schedule.action)
        features: list[Tensor] = []
        if deepstack is not None:
            none = torch.zeros_like(rows.h)
            features = [ops.scatter(none, visual, one) for one in deepstack]
        # The pool of each visual row of the step, where budgets are not just a number of tokens.
        pools: Tensor | None = None
        if not schedule.fixed:
            pools = torch.zeros_like(visual) if visual_images is None else visual_images.expand(batch, -1)

        def rope(stage: int) -> tuple[Cache, Tensor]:
            """Rotary table of a stage, and its rows that belong to the rows that run."""
            if renumbered:
                return (rope_cos[stage], rope_sin[stage]), indices(rows.h)
            return (rope_cos, rope_sin), rows.slots

        routes: list[Tensor] = []
        present: list[Cache] = []
        lengths = kv_len.split(1)
        # For a decision in the next layer.
        ballot: tuple[Tensor, Tensor] | None = None
        for number, stage in enumerate(schedule.stages):
            for index in range(stage.start, stage.stop):
                layer: Layer = self.layers[index]  # type: ignore[assignment]
                if ballot is not None and stage.keep is not None:
                    rows.compete()
                    rows.take(self.choose(*ballot, rows, stage, visual, pools))
                    routes.append(rows.slots)
                    ballot = None
                if index not in schedule.scoring_layers:
                    x = layer.input_norm(rows.h)
                    key = layer.rotate(layer.key(x), *rope(number))
                else:
                    ran = rows.slots if rows.some_wait else None
                    rows.compete()
                    x = layer.input_norm(rows.h)
                    raw = layer.key(x)
                    table, places = rope(number - own)
                    key = layer.rotate(raw, table, places)
                    ballot = self.ballot(layer, x, key, table, places)
                    if own:
                        ran = self.choose(*ballot, rows, stage, visual, pools)
                        ballot = None
                    if ran is not None:
                        rows.take(ran)
                        x = layer.input_norm(rows.h)  # of few rows: quicker than to gather what is there
                        key = layer.rotate(ops.gather(raw, ran), *rope(number)) if renumbered else ops.gather(key, ran)
                    if own:
                        routes.append(rows.slots)
                # Of the last layer, only the row that the logits are of is read again.
                only_last = index == schedule.num_layers - 1 and index >= len(features)
                rows.h, cache = layer(rows.h, x, key, *rope(number), lengths[number], past[index], only_last=only_last)
                present.append(cache)
                if index < len(features):
                    rows.add(features[index])
        logits = self.lm_head(self.norm(rows.h[:, -1])).float()
        return Output(logits, routes, present)

    def ballot(self, layer: Layer, x: Tensor, key: Tensor, table: Cache, places: Tensor) -> tuple[Tensor, Tensor]:
        """What a decision ranks with: the last row's query [B, H*d] and all rows' keys [B, S, G*d].

        Where scores are made otherwise, they come before (see `ops.votes`): a query of 1 and their logarithm [B, S, 1].

        Args:
            layer: the scoring layer.
            x: normed rows.
            key: their rotated keys.
            table: rotary table.
            places: its rows that belong to `x`.
        """
        if self.schedule.plain_scores:
            return layer.query(x[:, -1:], table, places[:, -1:])[:, 0], key
        model, rows = self.model, self.schedule.rows
        last = (torch.arange(rows, device=x.device) + (x.shape[1] - rows)).clamp(min=0).expand(x.shape[0], -1)
        # A decode step has a table of one row, and ONNX Runtime's rotary op takes no more rows than the table has.
        wide = (nn.functional.pad(table[0], (0, 0, 0, rows)), nn.functional.pad(table[1], (0, 0, 0, rows)))
        query = layer.query(ops.gather(x, last), wide, places.gather(1, last))
        largest = int(self.schedule.heads == "max")
        votes = ops.votes(query, key, model.num_heads, model.num_kv_heads, layer.scale, largest)
        return votes.new_ones(votes.shape[0], 1), votes

    def choose(
        self, q_last: Tensor, keys: Tensor, rows: Rows, stage: Stage, visual: Tensor, pools: Tensor | None
    ) -> Tensor:
        """The decision by a ballot, see `ops.select` and `ops.select_pools`; recorded when `decisions` is a list.

        `visual` and `pools`, int64 [B, N], are the slots of the step's visual rows and their pools; without pools all
        rows compete with each other for a fixed budget.
        """
        heads, groups, scale = self.model.num_heads, self.model.num_kv_heads, self.model.head_dim**-0.5
        if not self.schedule.plain_scores:
            heads, groups, scale = 1, 1, 1.0
        if self.decisions is not None:
            scores = ops.last_row_scores(q_last, keys, heads, groups, scale)
            self.decisions.append((rows.visual, scores.gather(1, rows.visual)))
        assert stage.keep is not None
        if pools is None:
            return ops.select(q_last, keys, rows.visual, rows.text, stage.keep, heads, groups, scale)
        left = pools
        if rows.slots is not rows.all:  # some were removed: find the pools of those left by their slots
            by_slot = torch.zeros_like(rows.all).scatter(1, visual, pools)
            left = by_slot.gather(1, rows.slots.gather(1, rows.visual))
        keep, whole = stage.share or (stage.keep, 0)
        return ops.select_pools(q_last, keys, rows.visual, rows.text, left, pools, keep, whole, heads, groups, scale)


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
