"""The plan's arithmetic: FLOPs, KV cache and memory of one routed prompt, without running anything.

Conventions, so that the numbers can be checked by hand:

* A multiply-add is 2 FLOPs. Norms, rotary, softmax, activations and gathers are not counted.
* Causal attention is counted as the half that is needed: R rows make R (R + 1) / 2 query-key pairs, and a
  pair costs 4 * head_dim FLOPs a head (2 for the score, 2 for the weighted value). The vision tower's
  attention is full.
* A decision's overhead is what its scoring layer would not do anyway: the K projection of the candidates that do
  not run there, the query of the last row (of the last `Schedule.rows`), and that query's scores against every
  candidate. Candidates are all S rows for reroute, and the rows still alive for removal. The scoring layer is the
  decision layer itself, or the one before it (`Schedule.scoring`).
* `lm_head` runs on the last row only, for the routed and for the dense model alike.
* The vision tower is counted in `reroute.tower_cost`.
* The prompt is one step with `num_visual` visual tokens out of the tower; every budget acts as a minimum.

Sources: algorithms as in Reroute, arXiv 2606.12412.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from reroute.errors import UserError, nearest
from reroute.manifest import Capacity, Grid, Model, TextModel
from reroute.routing import RoutingSpec, Target
from reroute.schedule import Schedule, Stage
from reroute.tower_cost import extra_tower_parameters, vision_flops, vision_workspace_bytes

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of the schedule for one prompt. FLOPs and bytes are of all layers of the stage together.

    Attributes:
        start: first layer.
        stop: one past the last layer.
        budget: visual rows kept by the decision at `start`, None before the first decision.
        rows: text and visual rows that run in each layer.
        candidates: rows that the decision ranks or carries, text included; `rows` where nothing is decided.
        cache_rows: capacity of each layer's cache.
        linear_flops: projections and MLP.
        attention_flops: causal attention.
        scoring_flops: the decision's overhead.
        kv_bytes: cache rows that the prompt fills.
    """

    start: int
    stop: int
    budget: int | None
    rows: int
    candidates: int
    cache_rows: int
    linear_flops: int
    attention_flops: int
    scoring_flops: int
    kv_bytes: int

    @property
    def flops(self) -> int:
        """All FLOPs of the stage."""
        return self.linear_flops + self.attention_flops + self.scoring_flops


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """What routing does to a prompt with one image of a certain grid; see `Plan` for the figures."""

    grid: Grid
    num_visual: int
    budgets: tuple[int, ...]
    average_visual_tokens: float
    decoder_ratio: float
    kv_ratio: float
    vision_flops: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one prompt costs under a schedule, next to the dense model. Bytes and FLOPs are exact integers.

    `peak_bytes` is an estimate: weights + caches at capacity + workspace (see `decoder_workspace_bytes` and
    `vision_workspace_bytes`; they add up because the two graphs do not share an arena). Constants of the
    engine library and of Python are not in it.

    Where images have several shapes, the figures are those of the largest, and `grids` has the others.
    """

    schedule: Schedule
    num_text: int
    num_visual: int
    average_visual_tokens: float
    stages: tuple[StagePlan, ...]
    lm_head_flops: int
    vision_flops: int
    dense_decoder_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    cache_bytes: int
    dense_cache_bytes: int
    weight_bytes: int
    workspace_bytes: int
    grids: tuple[GridPlan, ...] = ()

    @property
    def decoder_flops(self) -> int:
        """Prefill FLOPs of the routed decoder, scoring and lm_head included."""
        return sum(stage.flops for stage in self.stages) + self.lm_head_flops

    @property
    def decoder_ratio(self) -> float:
        """Routed decoder FLOPs as a share of the dense decoder's."""
        return self.decoder_flops / self.dense_decoder_flops

    @property
    def total_ratio(self) -> float:
        """The same with the vision tower, which routing does not touch, on both sides."""
        return (self.decoder_flops + self.vision_flops) / (self.dense_decoder_flops + self.vision_flops)

    @property
    def kv_ratio(self) -> float:
        """KV bytes of the prompt as a share of the dense model's."""
        return self.kv_bytes / self.dense_kv_bytes

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory: weights, caches at capacity and workspace."""
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes

    def estimates(self) -> dict[str, float]:
        """The figures that the manifest records, each with its unit in the name."""
        figures = {
            "num_text": self.num_text,
            "num_visual": self.num_visual,
            "decoder_flops": self.decoder_flops,
            "dense_decoder_flops": self.dense_decoder_flops,
            "scoring_flops": sum(stage.scoring_flops for stage in self.stages),
            "vision_flops": self.vision_flops,
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "cache_bytes": self.cache_bytes,
            "dense_cache_bytes": self.dense_cache_bytes,
            "weight_bytes": self.weight_bytes,
            "workspace_bytes": self.workspace_bytes,
            "peak_bytes": self.peak_bytes,
        }
        return {name: float(value) for name, value in figures.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the fields, the stages, and the figures that follow from them."""
        names = ("decoder_flops", "decoder_ratio", "total_ratio", "kv_ratio", "peak_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def plan_for(
    model: Model,
    schedule: Schedule,
    capacity: Capacity,
    *,
    dtype: str = "float32",
    num_text: int = 64,
    num_visual: int | None = None,
    grid: Grid | None = None,
) -> Plan:
    """Cost of a prompt of `num_text` text and `num_visual` visual tokens (default: one image).

    Args:
        model: shapes and parameter counts; every value of `model.num_parameters` is summed.
        schedule: resolved routing; it must cover the model's layers.
        capacity: fixed sizes of a session.
        dtype: dtype of weights, activations and caches.
        num_text: text rows of the prompt, at least 1.
        num_visual: visual rows of the prompt; 0 is a text-only prompt.
        grid: of the images; default: the model's first, and then the plan has a line for each of the model's grids.

    Raises:
        UserError: an unknown dtype, a schedule of another depth, or an empty prompt.
    """
    text, vision = model.text, model.vision
    if dtype not in DTYPE_BYTES:
        raise UserError(f"no byte size for dtype {dtype!r}", hint=nearest(dtype, DTYPE_BYTES))
    if schedule.num_layers != text.num_layers:
        raise UserError(
            f"the schedule covers {schedule.num_layers} layers, the decoder has {text.num_layers}",
            hint="resolve the routing spec for this model",
        )
    shape = grid or vision.grid
    per_image = shape[0] * shape[1] if vision.grids else vision.tokens_per_image
    several = vision.grids if grid is None and num_visual is None else ()
    num_visual = per_image if num_visual is None else num_visual
    if num_text < 1 or num_visual < 0:
        raise UserError(
            f"a prompt has at least 1 text token and 0 visual ones, got {num_text} and {num_visual}",
            hint="the last text row is the query of every decision",
        )
    size = DTYPE_BYTES[dtype]
    row_bytes = kv_bytes_per_row(text, size)
    cache_rows = capacity.cache_rows(schedule, vision.tokens_per_image)
    images = -(-num_visual // per_image)
    entering = min(num_visual, images * schedule.entering(per_image))
    counts = [entering // images] * images if images and entering % images == 0 else [entering]
    visual_rows = schedule.visual_rows(counts)
    stages = _stage_plans(text, schedule, num_text, entering, visual_rows, row_bytes, cache_rows)
    total, layers = num_text + num_visual, text.num_layers
    lm_head = 2 * text.hidden_size * text.vocab_size
    dense_capacity = capacity.max_text + capacity.max_images * vision.tokens_per_image
    workspace = decoder_workspace_bytes(text, stages, num_text + entering, size) + vision_workspace_bytes(vision, size)
    return Plan(
        schedule=schedule,
        num_text=num_text,
        num_visual=num_visual,
        average_visual_tokens=_average(schedule, visual_rows),
        stages=stages,
        lm_head_flops=lm_head,
        vision_flops=images
        * vision_flops(
            vision, text.hidden_size, None if schedule.nuwa is None else schedule.entering(per_image), shape
        ),
        dense_decoder_flops=layers * (linear_flops(text, total) + attention_flops(text, total)) + lm_head,
        kv_bytes=sum(stage.kv_bytes for stage in stages),
        dense_kv_bytes=layers * total * row_bytes,
        cache_bytes=sum((stage.stop - stage.start) * stage.cache_rows * row_bytes for stage in stages),
        dense_cache_bytes=layers * dense_capacity * row_bytes,
        weight_bytes=stored_parameters(model, schedule) * size,
        workspace_bytes=workspace,
        grids=tuple(_grid_plan(model, schedule, capacity, num_text, one) for one in several),
    )


def _grid_plan(model: Model, schedule: Schedule, capacity: Capacity, num_text: int, grid: Grid) -> GridPlan:
    plan = plan_for(model, schedule, capacity, num_text=num_text, grid=grid)
    return GridPlan(
        grid=grid,
        num_visual=plan.num_visual,
        budgets=schedule.visual_rows([schedule.entering(plan.num_visual)])[1:],
        average_visual_tokens=plan.average_visual_tokens,
        decoder_ratio=plan.decoder_ratio,
        kv_ratio=plan.kv_ratio,
        vision_flops=plan.vision_flops,
    )


def resolve(spec: RoutingSpec, model: Model) -> Schedule:
    """The schedule of a spec for a model, targets in FLOPs and KV bytes included.

    Those are the plan's figures of one image and 64 text tokens in float32: prefill FLOPs of the decoder with scoring,
    and the KV rows that the prompt fills.

    Raises:
        UserError: see `RoutingSpec.resolve`.
    """
    return spec.resolve(
        num_layers=model.text.num_layers,
        num_visual=model.vision.tokens_per_image,
        measure=partial(measure, model),
        sizes_vary=bool(model.vision.grids),
    )


def measure(model: Model, target: Target, schedule: Schedule) -> tuple[int, int]:
    """Cost of a schedule and of the dense decoder in what only the model knows: FLOPs or KV bytes."""
    # With its grid named, the plan does not go on to the model's other grids; a solver asks for many plans.
    plan = plan_for(model, schedule, Capacity(), grid=model.vision.grid)
    if target == "flops":
        return plan.decoder_flops, plan.dense_decoder_flops
    return plan.kv_bytes, plan.dense_kv_bytes


def kv_bytes_per_row(text: TextModel, dtype_bytes: int) -> int:
    """Bytes that one token adds to the cache of one layer: key and value of every KV head."""
    return 2 * text.num_kv_heads * text.head_dim * dtype_bytes


def linear_flops(text: TextModel, rows: int) -> int:
    """Projections (q, k, v, o) and the gated MLP of one layer on `rows` rows."""
    attention = text.hidden_size * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    return 2 * rows * (attention + 3 * text.hidden_size * text.intermediate_size)


def attention_flops(text: TextModel, rows: int) -> int:
    """Causal attention of one layer on `rows` rows: rows (rows + 1) / 2 pairs, 4 * head_dim FLOPs a head."""
    return 2 * text.num_heads * text.head_dim * rows * (rows + 1)


def scoring_flops(text: TextModel, candidates: int, rows: int, queries: int = 1) -> int:
    """Overhead of one decision that ranks `candidates` rows of which `rows` run in the scoring layer by the attention
    of `queries` rows.
    """
    keys = 2 * (candidates - rows) * text.hidden_size * text.num_kv_heads * text.head_dim
    query = 2 * text.hidden_size * text.num_heads * text.head_dim
    return keys + queries * (query + 2 * candidates * text.num_heads * text.head_dim)


def stored_parameters(model: Model, schedule: Schedule) -> int:
    """Parameters that the graphs hold. A tied embedding is there twice: rows to look up, and transposed to multiply."""
    twice = model.text.vocab_size * model.text.hidden_size if model.text.tie_word_embeddings else 0
    return sum(model.num_parameters.values()) + twice + extra_tower_parameters(model.vision, schedule)


def decoder_workspace_bytes(text: TextModel, stages: tuple[StagePlan, ...], total: int, dtype_bytes: int) -> int:
    """Largest live set of a layer at the widest stage, plus the float32 logits of the last row.

    With R rows of the widest stage that has layers, S rows of the full sequence, D, I, H, H_kv and head size
    d: always the full sequence that deferred rows wait in (S D), the stage's rows and their norm (2 R D);
    then the larger of attention (R d (2 H + 2 H_kv) for q, k, v and the output, and 4 H R R bytes of float32
    probabilities, as an engine without a fused kernel holds them) and the MLP (3 R I for gate, up and their
    product).
    """
    rows = max(stage.rows for stage in stages if stage.stop > stage.start)
    stream = (total + 2 * rows) * text.hidden_size * dtype_bytes
    heads = rows * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads) * dtype_bytes
    attention = heads + 4 * text.num_heads * rows * rows
    mlp = 3 * rows * text.intermediate_size * dtype_bytes
    return stream + max(attention, mlp) + 4 * text.vocab_size


def _stage_plans(
    text: TextModel,
    schedule: Schedule,
    num_text: int,
    num_visual: int,
    visual_rows: tuple[int, ...],
    row_bytes: int,
    cache_rows: tuple[int, ...],
) -> tuple[StagePlan, ...]:
    alive = before = num_text + num_visual
    plans: list[StagePlan] = []
    for stage, visual, capacity in zip(schedule.stages, visual_rows, cache_rows, strict=True):
        rows = num_text + visual
        scored = rows if schedule.scoring == "own" else before
        plans.append(_stage_plan(text, stage, rows, alive, scored, row_bytes, capacity, schedule.rows))
        before = rows
        if schedule.action == "removal":
            alive = rows
    return tuple(plans)


def _average(schedule: Schedule, visual_rows: tuple[int, ...]) -> float:
    """Visual rows per layer of a prompt whose stages run `visual_rows`."""
    pairs = zip(schedule.stages, visual_rows, strict=True)
    return sum(stage.num_layers * rows for stage, rows in pairs) / schedule.num_layers


def _stage_plan(
    text: TextModel, stage: Stage, rows: int, alive: int, scored: int, row_bytes: int, capacity: int, queries: int
) -> StagePlan:
    """`scored` rows run in the layer that scores the stage's decision, by the attention of `queries` rows."""
    decides = stage.keep is not None
    return StagePlan(
        start=stage.start,
        stop=stage.stop,
        budget=stage.keep,
        rows=rows,
        candidates=alive if decides else rows,
        cache_rows=capacity,
        linear_flops=stage.num_layers * linear_flops(text, rows),
        attention_flops=stage.num_layers * attention_flops(text, rows),
        scoring_flops=scoring_flops(text, alive, scored, queries) if decides else 0,
        kv_bytes=stage.num_layers * rows * row_bytes,
    )
