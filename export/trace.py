"""From torch modules to ONNX files: trace, simplify, name the inputs and outputs, write the weights beside the graph.

The files are deterministic: no stack traces, no paths, no times; weights in graph order in one external file.
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
from reroute.manifest import Model, Part, Tensor
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
    two, one = {0: _AUTO, 1: _AUTO}, {0: _AUTO}
    caches = [({0: _AUTO, 2: _AUTO}, {0: _AUTO, 2: _AUTO}) for _ in range(text.num_layers)]
    by_row = {1: _AUTO} if renumbered else one
    model = _export(decoder, args, (two, two, one, one, by_row, by_row, None, caches))
    _name(model.graph.inputs, [(tensor.name, tensor.shape) for tensor in decoder_inputs(decoder)])
    _name(model.graph.outputs, [(tensor.name, tensor.shape) for tensor in decoder_outputs(decoder)])
    model.graph.name = "decoder"
    for function in onnx_ops.functions():
        local = ir.from_proto(function)
        if any(node.domain == onnx_ops.DOMAIN and node.op_type == local.name for node in model.graph):
            model.functions[local.identifier()] = local
    return model


def trace_vision(tower: torch.nn.Module, model: Model, schedule: Schedule) -> ir.Model:
    """The vision graph: pixel_values [M, 3, H, W] to visual_embeds [M, N, D], and their places where it prunes."""
    height, width = model.image.crop_height, model.image.crop_width
    graph = _export(tower, (torch.zeros(2, 3, height, width),), ({0: _AUTO},))
    _name(graph.graph.inputs, [(tensor.name, tensor.shape) for tensor in vision_inputs(model)])
    _name(graph.graph.outputs, [(tensor.name, tensor.shape) for tensor in vision_outputs(model, schedule)])
    graph.graph.name = "vision"
    return graph


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
    return step + _caches(decoder, "past_key_values")


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


def vision_inputs(model: Model) -> list[Tensor]:
    """The I/O table of the vision graph: inputs."""
    shape = ("M", 3, model.image.crop_height, model.image.crop_width)
    return [Tensor(name="pixel_values", dtype="float32", shape=shape)]


def vision_outputs(model: Model, schedule: Schedule) -> list[Tensor]:
    """The I/O table of the vision graph: outputs."""
    tokens = schedule.entering(model.vision.tokens_per_image)
    embeds = Tensor(name="visual_embeds", dtype="float32", shape=("M", tokens, model.text.hidden_size))
    places = Tensor(name="visual_places", dtype="int64", shape=("M", tokens))
    return [embeds] if schedule.nuwa is None else [embeds, places]


def save(model: ir.Model, folder: Path, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Part:
    """Write `name`.onnx and `name`.onnx.data into `folder`; returns the manifest's entry."""
    ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
    return Part(file=f"{name}.onnx", inputs=tuple(inputs), outputs=tuple(outputs))


def _export(module: torch.nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ir.Model:
    with _quiet(), torch.no_grad():
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
    optimizer.optimize(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
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
    """The exporter talks about torchvision and its own deprecations; nothing in it is for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
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
