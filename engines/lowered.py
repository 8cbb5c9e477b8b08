"""TensorRT, the half that needs no TensorRT: an export becomes a *lowered* folder, complete for a build on the device.

    convert    fp16 graphs and weights, unless fp32 is asked for (half.py)
    lower      the target's dialect, native or in plugin form (lower.py)
    finish     batch and cache capacities fixed, the next token chosen by the graph (finish.py)
    check      rules of the target's TensorRT version (rules/), onnx's checker, types
    write      graphs, weights, `build_engine.py`, and a manifest of kind "lowered" with the optimisation profiles

The folder is what `reroute build --onnx-only` leaves, and `build_engine.py` in it needs nothing but TensorRT.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx

from reroute.cost import plan_for
from reroute.engines import finish, half, rules
from reroute.engines.lower import lower, plugin_nodes, with_functions
from reroute.engines.targets import GIB, LoweringOptions, Target, target_named
from reroute.engines.weights import load_graph
from reroute.errors import RerouteError, UserError
from reroute.manifest import Lowering, Manifest, Part, Span, file_table

BUILD_SCRIPT = "build_engine.py"
# Visual rows that a decode step binds: none. Every layer between the inputs and the caches sees a length of zero there.
# Should a TensorRT version refuse that, this is the place to change.
DECODE_VISUAL_ROWS = 0


def lower_export(
    export_dir: Path, manifest: Manifest, folder: Path, options: LoweringOptions, tell: Callable[[str], None]
) -> Manifest:
    """Write the lowered folder of a verified export into `folder`, which exists, and return its manifest.

    Raises:
        UserError: the engine cannot fit the machine, a weight does not fit fp16, or a graph breaks a rule.
    """
    target = target_named(options.target)
    estimates = require_memory(manifest, options, target)
    graphs = {part.file for part in manifest.parts.values()}
    data = {f"{file}.data" for file in graphs}
    narrow = options.dtype == "float16"
    for name in manifest.files:
        if name not in graphs | data:
            shutil.copyfile(export_dir / name, folder / name)
    sizes = finish.fixed_sizes(manifest)
    rows = manifest.capacity.max_text + _visual_rows(manifest)
    parts: dict[str, Part] = {}
    plugins: dict[str, int] = {}
    for name, part in manifest.parts.items():
        tell(f"lowering the {name} to {target.dialect}, {options.form} form, {options.dtype}")
        neutral, weights = load_graph(export_dir / part.file)
        if narrow:
            (half.decoder_to_half if name == "decoder" else half.vision_to_half)(neutral)
        weights.write(neutral, folder / f"{part.file}.data")
        graph = lower(neutral, target.dialect, form=options.form)
        finish.freeze(graph, sizes)
        if name == "decoder":
            finish.choose_next_token(graph)
            plugins = plugin_nodes(graph)
        whole = with_functions(graph, neutral, target.dialect)
        found = rules.findings(graph, target.tensorrt, rows=rows, functions=whole.functions)
        rules.require(name, found, target.tensorrt)
        parts[name] = finish.engine_part(name, part, sizes, half=narrow)
        onnx.save(graph, folder / part.file)
        validate(folder / part.file, parts[name], whole)
    shutil.copyfile(Path(__file__).with_name(BUILD_SCRIPT), folder / BUILD_SCRIPT)
    lowering = Lowering(
        target=options.target,
        dialect=target.dialect,
        form=options.form,
        tensorrt_min=target.version,
        plugin_nodes=plugins,
        profiles=profiles(manifest, parts),
    )
    lowered = replace(
        manifest,
        kind="lowered",
        backend="tensorrt",
        dtype=options.dtype,
        parts=parts,
        files=file_table(folder),
        estimates={**manifest.estimates, **estimates},
        check=None,
        lowering=lowering,
    )
    lowered.save(folder)
    tell(f"both graphs pass the rules of TensorRT {target.version}")
    return lowered


def require_fixed_shapes(manifest: Manifest) -> None:
    """Refuse what needs other inputs, ops or graphs than the plugin and the backend have. Raises UserError."""
    model, schedule = manifest.model, manifest.schedule
    for has, what in (
        (bool(model.vision.grids), "a vision tower with one graph for each grid"),
        (model.text.deepstack > 0, "features that are added after decoder layers (deepstack)"),
        (not schedule.fixed, "budgets that are shares, or for each image"),
        (not schedule.plain_scores, "scores of several rows, or the largest of all heads"),
    ):
        if has:
            raise UserError(
                f"this export has {what}, which is not lowered for TensorRT yet",
                hint="build it for ONNX Runtime: `reroute build DIR --backend ort`",
            )


def profiles(manifest: Manifest, parts: dict[str, Part]) -> dict[str, dict[str, dict[str, Span]]]:
    """Optimisation profiles of each part, in the engine's order: one for the vision graph, prefill and decode.

    Prefill is tuned for one image with 64 text tokens and takes every step up to the capacity, also text alone. Decode
    is one text token, whose shapes are all fixed: that is what a CUDA graph can capture.
    """
    capacity = manifest.capacity
    text, visual = min(64, capacity.max_text), manifest.schedule.entering(manifest.model.vision.tokens_per_image)
    most = _visual_rows(manifest)
    steps = {
        "prefill": [{"T": t, "N": n, "S": t + n} for t, n in ((1, 0), (text, visual), (capacity.max_text, most))],
        "decode": [{"T": 1, "N": DECODE_VISUAL_ROWS, "S": 1 + DECODE_VISUAL_ROWS}] * 3,
    }
    images = {"images": [{"M": 1}, {"M": 1}, {"M": capacity.max_images}]}
    return {
        name: {
            profile: {
                tensor.name: Span(
                    **dict(zip(("min", "opt", "max"), (_sized(tensor.shape, s) for s in at), strict=True))
                )
                for tensor in part.inputs
                if any(isinstance(size, str) for size in tensor.shape)
            }
            for profile, at in (steps if name == "decoder" else images).items()
        }
        for name, part in parts.items()
    }


def require_memory(manifest: Manifest, options: LoweringOptions, target: Target) -> dict[str, float]:
    """Estimates of the engine's plan, with what running and building take. Raises UserError if that cannot fit.

    Running: weights, caches and the workspace of the longest prompt. Building: the ONNX weights and the engine's own
    copy of them besides that workspace; the builder's own memory is not known, so this is a lower bound.
    """
    model, capacity = manifest.model, manifest.capacity
    figures = plan_for(model, manifest.schedule, capacity, dtype=options.dtype, num_text=min(64, capacity.max_text))
    longest = plan_for(
        model,
        manifest.schedule,
        capacity,
        dtype=options.dtype,
        num_text=capacity.max_text,
        num_visual=capacity.max_images * model.vision.tokens_per_image,
    )
    # Attention is fused in the `trt` dialect; the estimate counts its scores, as the primitive form has them.
    build = 2 * longest.weight_bytes + longest.workspace_bytes
    memory = options.memory_bytes or target.memory_bytes
    for what, needed in (("running", longest.peak_bytes), ("building", build)):
        if needed > memory:
            raise UserError(
                f"{what} the engine needs about {needed / GIB:.1f} GiB, {_machine(options, target)} {memory / GIB:.1f}",
                hint="choose float16, a smaller --max-text or --max-images at export, or fewer visual tokens",
            )
    extra = {"engine_run_bytes": float(longest.peak_bytes), "engine_build_bytes": float(build)}
    return {**figures.estimates(), **extra}


def validate(path: Path, part: Part, whole: onnx.ModelProto) -> None:
    """onnx's checker and strict type inference on a written graph, and its I/O table. Raises RerouteError.

    Args:
        path: the graph, with its weights beside it.
        part: the I/O table that the manifest promises.
        whole: the same graph with the functions of its plugin nodes, for the type inference.
    """
    onnx.checker.check_model(str(path))
    onnx.shape_inference.infer_shapes(whole, check_type=True, strict_mode=True)
    kinds = {name: onnx.TensorProto.DataType.Value(text) for name, text in _TYPES.items()}
    for values, tensors in ((whole.graph.input, part.inputs), (whole.graph.output, part.outputs)):
        have = [(value.name, value.type.tensor_type.elem_type) for value in values]
        want = [(tensor.name, kinds[tensor.dtype]) for tensor in tensors]
        if have != want:
            wrong = sorted({name for name, _ in set(have) ^ set(want)})
            raise RerouteError(f"{path.name} and its table differ in {', '.join(wrong[:4])}", hint="export again")


_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int32": "INT32"}


def _visual_rows(manifest: Manifest) -> int:
    return manifest.capacity.max_images * manifest.schedule.entering(manifest.model.vision.tokens_per_image)


def _sized(shape: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in shape)


def _machine(options: LoweringOptions, target: Target) -> str:
    return f"the largest machine of the target {options.target} has" if not options.memory_bytes else "there are"
