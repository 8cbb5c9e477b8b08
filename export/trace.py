"""From torch modules to ONNX files: trace, simplify, name the inputs and outputs, write the weights beside the graph.

The files are deterministic: no stack traces, no paths, no times; weights in graph order in one external file. No weight
is read while a graph is traced, and one at a time when the file is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from reroute.export import onnx_ops
from reroute.export.decoder import RoutedDecoder
from reroute.export.initializers import DataFile, bind, unbind
from reroute.export.weights import streamed_of, weights_of
from reroute.manifest import Grid, Model, Part, Tensor
from reroute.schedule import Schedule

Shape = tuple[int | str, ...]
_AUTO = torch.export.Dim.AUTO
# Sizes of the example step. All distinct, none 0 or 1: what is equal or 0 or 1 here would be specialised.
_BATCH, _TEXT = 2, 7


def trace_decoder(decoder: RoutedDecoder) -> ir.Model:
    """One graph for prefill, decode, text-only steps and later turns; I/O as in `reroute.export.decoder`.

    The graph calls the ops of `reroute.export.onnx_ops` and carries their bodies as local functions.
    """
    schedule, text = decoder.schedule, decoder.model
    visual = max([*schedule.budgets, 11]) + 6
    rows = _TEXT + visual
    capacity = [rows + 10 + 2 * i for i in range(len(schedule.stages))]
    stage_of = [schedule.stage_of_layer(layer) for layer in range(text.num_layers)]

    def cache(layer: int) -> torch.Tensor:
        return torch.zeros(_BATCH, text.num_kv_heads, capacity[stage_of[layer]], text.head_dim)

    half = text.head_dim // 2
    renumbered = schedule.positions == "renumbered"
    table = (len(schedule.stages), rows, half) if renumbered else (rows, half)
    args = (
        torch.zeros(_BATCH, _TEXT, dtype=torch.int64),
        torch.zeros(_BATCH, visual, text.hidden_size),
        torch.cat([torch.arange(2), torch.arange(2 + visual, rows)]),
        torch.arange(2, 2 + visual),
        torch.ones(table),
        torch.zeros(table),
        torch.tensor([_TEXT + stage.visual_rows(visual) for stage in schedule.stages], dtype=torch.int32),
        [(cache(layer), cache(layer)) for layer in range(text.num_layers)],
    )
    images = torch.arange(visual) // 2 if schedule.pool == "image" else None
    stack = torch.zeros(text.deepstack, _BATCH, visual, text.hidden_size) if text.deepstack else None
    two, one = {0: _AUTO, 1: _AUTO}, {0: _AUTO}
    caches = [({0: _AUTO, 2: _AUTO}, {0: _AUTO, 2: _AUTO}) for _ in range(text.num_layers)]
    by_row = {1: _AUTO} if renumbered else one
    optional = (None if images is None else one, None if stack is None else {1: _AUTO, 2: _AUTO})
    dynamic = (two, two, one, one, by_row, by_row, None, caches, *optional)
    model = _export(decoder, (*args, images, stack), dynamic)
    _name(model.graph.inputs, [(tensor.name, tensor.shape) for tensor in decoder_inputs(decoder)])
    _name(model.graph.outputs, [(tensor.name, tensor.shape) for tensor in decoder_outputs(decoder)])
    model.graph.name = "decoder"
    _add_bodies(model)
    return model


def trace_vision(tower: torch.nn.Module, model: Model, schedule: Schedule, grid: Grid | None = None) -> ir.Model:
    """The vision graph of a grid (default: the model's first).

    From pixel_values [M, 3, H, W] to visual_embeds [M, N, D] and what else the tower gives.
    """
    grid = grid or model.vision.grid
    graph = _export(tower, (torch.zeros(2, 3, *model.pixels(grid)),), ({0: _AUTO},))
    _name(graph.graph.inputs, [(tensor.name, tensor.shape) for tensor in vision_inputs(model, grid)])
    _name(graph.graph.outputs, [(tensor.name, tensor.shape) for tensor in vision_outputs(model, schedule, grid)])
    graph.graph.name = "vision"
    _add_bodies(graph)
    return graph


def _add_bodies(model: ir.Model) -> None:
    """Give a graph the bodies of our ops that it calls."""
    for function in onnx_ops.functions():
        local = ir.from_proto(function)
        if any(node.domain == onnx_ops.DOMAIN and node.op_type == local.name for node in model.graph):
            model.functions[local.identifier()] = local


def decoder_inputs(decoder: RoutedDecoder) -> list[Tensor]:
    """The I/O table of the decoder graph: inputs in order."""
    text = decoder.model
    half, schedule = text.head_dim // 2, decoder.schedule
    table = (len(schedule.stages), "S", half) if schedule.positions == "renumbered" else ("S", half)
    step = [
        Tensor(name="input_ids", dtype="int64", shape=("B", "T")),
        Tensor(name="visual_embeds", dtype="float32", shape=("B", "N", text.hidden_size)),
        Tensor(name="text_slots", dtype="int64", shape=("T",)),
        Tensor(name="visual_slots", dtype="int64", shape=("N",)),
        Tensor(name="rope_cos", dtype="float32", shape=table),
        Tensor(name="rope_sin", dtype="float32", shape=table),
        Tensor(name="kv_len", dtype="int32", shape=(len(decoder.schedule.stages),)),
    ]
    images = Tensor(name="visual_images", dtype="int64", shape=("N",))
    stack = Tensor(name="deepstack", dtype="float32", shape=(text.deepstack, "B", "N", text.hidden_size))
    optional = [images] * (schedule.pool == "image") + [stack] * (text.deepstack > 0)
    return [*step, *_caches(decoder, "past_key_values"), *optional]


def decoder_outputs(decoder: RoutedDecoder) -> list[Tensor]:
    """The I/O table of the decoder graph: outputs in order."""
    logits = Tensor(name="logits", dtype="float32", shape=("B", decoder.model.vocab_size))
    routes = [
        Tensor(name=f"routes.{stage}", dtype="int64", shape=("B", f"A{stage}"))
        for stage in range(1, len(decoder.schedule.stages))
    ]
    return [logits, *routes, *_caches(decoder, "present")]


def _caches(decoder: RoutedDecoder, prefix: str) -> list[Tensor]:
    text, schedule = decoder.model, decoder.schedule
    return [
        Tensor(
            name=f"{prefix}.{layer}.{part}",
            dtype="float32",
            shape=("B", text.num_kv_heads, f"C{schedule.stage_of_layer(layer)}", text.head_dim),
        )
        for layer in range(text.num_layers)
        for part in ("key", "value")
    ]


def vision_inputs(model: Model, grid: Grid) -> list[Tensor]:
    """The I/O table of a vision graph: inputs."""
    return [Tensor(name="pixel_values", dtype="float32", shape=("M", 3, *model.pixels(grid)))]


def vision_outputs(model: Model, schedule: Schedule, grid: Grid) -> list[Tensor]:
    """The I/O table of a vision graph: outputs."""
    made = grid[0] * grid[1] if model.vision.grids else model.vision.tokens_per_image
    tokens, size = schedule.entering(made), model.text.hidden_size
    outputs = [Tensor(name="visual_embeds", dtype="float32", shape=("M", tokens, size))]
    if schedule.nuwa is not None:
        outputs.append(Tensor(name="visual_places", dtype="int64", shape=("M", tokens)))
    if model.text.deepstack:
        shape = (model.text.deepstack, "M", tokens, size)
        outputs.append(Tensor(name="visual_deepstack", dtype="float32", shape=shape))
    return outputs


def save(model: ir.Model, folder: Path, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Part:
    """Write `name`.onnx and `name`.onnx.data into `folder`; returns the manifest's entry."""
    DataFile(folder / f"{name}.onnx.data").take(model)
    ir.save(model, folder / f"{name}.onnx")
    return Part(file=f"{name}.onnx", inputs=tuple(inputs), outputs=tuple(outputs))


def save_vision(tower: torch.nn.Module, model: Model, schedule: Schedule, folder: Path) -> dict[str, Part]:
    """Trace and write the vision graph of every grid; the manifest's entries by part name.

    Several graphs share one file of weights, vision.onnx.data: what is equal in two of them is stored once.
    """
    weights = DataFile(folder / "vision.onnx.data")
    parts: dict[str, Part] = {}
    for grid in model.vision.all_grids:
        graph, name = trace_vision(tower, model, schedule, grid), model.vision_part(grid)
        inputs, outputs = vision_inputs(model, grid), vision_outputs(model, schedule, grid)
        if not model.vision.grids:
            return {name: save(graph, folder, name, inputs, outputs)}
        weights.take(graph)
        ir.save(graph, folder / f"{name}.onnx")
        parts[name] = Part(file=f"{name}.onnx", inputs=tuple(inputs), outputs=tuple(outputs))
    return parts


def _export(module: torch.nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ir.Model:
    weights = weights_of(module)
    with _quiet(), torch.no_grad(), streamed_of(module).tracing():
        program = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
        result = torch.onnx.export(
            program,
            custom_translation_table=onnx_ops.translation_table(),
            opset_version=onnx_ops.OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if result is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model: ir.Model = result.model
    unbind(model.graph, weights)
    with _quiet():
        optimizer.optimize(model)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
    bind(model.graph, weights)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "reroute", None
    return model


def _name(values: Sequence[ir.Value], table: Sequence[tuple[str, Shape]]) -> None:
    if len(values) != len(table):
        raise RuntimeError(f"the graph has {len(values)} inputs or outputs, the table {len(table)}")
    for value, (name, shape) in zip(values, table, strict=True):
        value.name = name
        value.shape = ir.Shape(shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks about torchvision and its own deprecations, passes about weights without a value."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
