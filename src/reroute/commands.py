"""What the commands do: each takes parsed arguments and returns an exit code. `run` is in `dialogue`.

The stages are imported inside the command that needs them, so that `doctor` and `inspect` of a bundle work on
a machine that has only the runtime.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroute import report
from reroute.cost import Plan, plan_for, resolve
from reroute.errors import EXIT_FAILURE, EXIT_GATE, EXIT_OK, UserError
from reroute.folders import check_output
from reroute.manifest import FILE_NAME, Capacity, Manifest, Model
from reroute.routing import RoutingSpec

if TYPE_CHECKING:
    from reroute.engines import Compared, Evaluate, TensorRTOptions


def export(args: argparse.Namespace) -> int:
    """Print the plan; unless it is a dry run, write graphs, manifest and reference."""
    output: Path | None = None if args.dry_run else args.output
    if output is None and not args.dry_run:
        raise UserError("export needs -o DIR", hint="or --dry-run, which writes nothing")
    from reroute.tiers import parse_tiers, plans_of, resolve_tiers

    specs = parse_tiers(args.routing, args.tiers)
    spec = next(iter(specs.values()), None) or RoutingSpec.parse(args.routing)
    from reroute.export import check_capacity, export_checkpoint, read_model
    from reroute.export.grids import parse_grids

    grids = parse_grids(args.grids) if args.grids is not None else ()
    if output is not None:
        check_output(output, force=args.force)
    capacity = Capacity(max_text=args.max_text, max_images=args.max_images)
    model = read_model(args.checkpoint, grids)
    check_capacity(capacity, model)
    tiers = plans_of(resolve_tiers(specs, model, capacity), model, capacity, min(64, capacity.max_text))
    plan = next(iter(tiers.values()), None) or make_plan(model, spec, capacity)
    result: dict[str, Any] = {"routing": spec.text, "plan": plan.to_dict()}
    if tiers:
        result["tiers"] = {name: {"routing": specs[name].text, "plan": one.to_dict()} for name, one in tiers.items()}
    if not args.json:
        report.print_plan(plan, spec.text, sys.stdout)
        if tiers:
            report.print_tiers({name: (specs[name].text, one) for name, one in tiers.items()}, sys.stdout)
        sys.stdout.flush()
    if output is not None:
        manifest = export_checkpoint(
            args.checkpoint,
            output,
            routing=args.routing,
            tiers=args.tiers,
            capacity=capacity,
            grids=grids,
            reference_tokens=args.reference_tokens,
            force=args.force,
            progress=progress,
        )
        result["manifest"] = json.loads(manifest.to_json())
        progress(f"exported to {output} ({_folder_size(manifest)}); next: reroute build {output}")
    if args.json:
        print_json(result)
    return EXIT_OK


def build(args: argparse.Namespace) -> int:
    """Lower an export to a bundle."""
    _need_folder(args.export_dir, "export")
    from reroute.engines import build as build_bundle

    tensorrt = _tensorrt_options(args)
    folder = args.export_dir.resolve()
    suffix = f"{args.backend}-lowered" if args.onnx_only else args.backend
    if args.profile != "fp32":
        suffix = f"{suffix}-{args.profile.replace(':', '-')}"
    output = args.output or folder.parent / f"{folder.name}-{suffix}"
    manifest = build_bundle(
        args.export_dir,
        output,
        backend=args.backend,
        check=not args.no_check,
        force=args.force,
        progress=progress,
        tensorrt=tensorrt,
        profile=args.profile,
        kernels=args.kernels,
        evaluate=_evaluation(args),
    )
    if manifest.kind == "lowered":
        plugin = " --plugin LIBRARY" if manifest.lowering and manifest.lowering.plugin_nodes else ""
        progress(f"lowered to {output} ({_folder_size(manifest)})")
        progress(f"next, on the device: python3 {output.name}/build_engine.py {output.name} -o BUNDLE{plugin}")
        return EXIT_OK
    progress(f"built {output} ({_folder_size(manifest)}), check: {_verdict(manifest)}")
    progress(f"next: reroute run {output} --image FILE --prompt TEXT")
    return EXIT_OK


def _evaluation(args: argparse.Namespace) -> Evaluate | None:
    """How `build --evaluate` compares two bundles; None without it.

    Raises UserError for questions that there are not, and for options of questions that nobody would ask.
    """
    from reroute.evaluation.command import DATA_OPTIONS, SCENE_OPTIONS, SCENES, question_set

    if not args.evaluate:
        given = [name for name in (*SCENE_OPTIONS, *DATA_OPTIONS) if getattr(args, name) is not None]
        if given or args.set != SCENES:
            name = given[0].replace("_", "-") if given else "set"
            raise UserError(f"--{name} has no meaning without --evaluate", hint="add --evaluate, or leave it out")
        return None
    from reroute.evaluation.fidelity import fidelity
    from reroute.runtime import Session

    if args.set == SCENES:
        # Enough for the gate, and not the held-out scenes, which are for scores.
        for name, value in (("grounding", 200), ("vqa", 200), ("split", "validation")):
            if getattr(args, name) is None:
                setattr(args, name, value)
    questions = question_set(args, Manifest.load(args.export_dir).model.boxes)

    def compare(base: Path, bundle: Path) -> Compared:
        first, second = (partial(Session.open, path, verify=False) for path in (base, bundle))
        with report.progress(len(questions), "questions") as advance:
            return fidelity(first, second, questions, advance=advance)

    return compare


def _tensorrt_options(args: argparse.Namespace) -> TensorRTOptions | None:
    """Options of a TensorRT build; None for another backend, which takes none of them. Raises UserError."""
    names = ("target", "onnx_only", "form", "dtype", "plugin", "memory_gib", "timing_cache", "workspace_mib")
    if args.backend != "tensorrt":
        if given := [name for name in names if getattr(args, name)]:
            raise UserError(
                f"--{given[0].replace('_', '-')} has no meaning for the backend {args.backend}",
                hint="add --backend tensorrt",
            )
        return None
    from reroute.engines import TensorRTOptions
    from reroute.engines.build_engine import Options
    from reroute.engines.targets import GIB, TARGETS, LoweringOptions

    if args.target is None:
        raise UserError("a TensorRT engine needs a target", hint=f"add --target T; supported: {', '.join(TARGETS)}")
    form = args.form or ("plugin" if args.plugin else "native")
    lowering = LoweringOptions(
        target=args.target,
        form=form,
        dtype=args.dtype or "float16",
        memory_bytes=args.memory_gib * GIB if args.memory_gib else None,
    )
    engine = Options(
        plugin=args.plugin if form == "plugin" else None,
        timing_cache=args.timing_cache,
        workspace_mib=args.workspace_mib or 0,
    )
    return TensorRTOptions(lowering=lowering, only_lower=args.onnx_only, engine=engine)


def check(args: argparse.Namespace) -> int:
    """Compare a bundle with the reference."""
    _need_folder(args.bundle, "bundle")
    from reroute.check import check_bundle
    from reroute.runtime.backend import BackendOptions

    result = check_bundle(
        args.bundle,
        checkpoint=args.checkpoint,
        image=args.image,
        prompt=args.prompt,
        tokens=args.tokens,
        tier=args.tier,
        options=BackendOptions(provider=args.provider),
    )
    if args.json:
        print_json(result.to_dict())
    else:
        report.print_check(result, sys.stdout)
    return EXIT_OK if result.passed else EXIT_GATE


def inspect(args: argparse.Namespace) -> int:
    """Describe a checkpoint, an export or a bundle."""
    _need_folder(args.path, "checkpoint, export or bundle")
    if (args.path / FILE_NAME).is_file():
        manifest = Manifest.load(args.path)
        if args.json:
            print_json(json.loads(manifest.to_json()))
        else:
            _print_manifest(manifest, args.path)
        return EXIT_OK
    if not (args.path / "config.json").is_file():
        raise UserError(
            f"{args.path} holds neither {FILE_NAME} nor config.json",
            hint="give a checkpoint directory, an export or a bundle",
        )
    from reroute.export import read_model

    model = read_model(args.path)
    if args.json:
        print_json({"kind": "checkpoint", "model": dataclasses.asdict(model)})
    else:
        report.print_pairs(_model_facts(model), sys.stdout, title=f"{args.path}: checkpoint")
    return EXIT_OK


def doctor(args: argparse.Namespace) -> int:
    """Say what this machine can do; 1 when the runtime is not usable."""
    from reroute.doctor import diagnose

    diagnosis = diagnose()
    if args.json:
        print_json(diagnosis.to_dict())
    else:
        out = sys.stdout
        report.print_pairs(diagnosis.machine.items(), out, title="machine")
        packages = [(name, version or "not installed") for name, version in diagnosis.packages.items()]
        packages.append(("onnxruntime providers", ", ".join(diagnosis.providers) or "none"))
        report.print_pairs(packages, out, title="packages")
        usable = [
            (f"reroute {u.command}", "usable" if u.ok else f"needs {', '.join(u.missing)}: {u.install}")
            for u in diagnosis.commands
        ]
        report.print_pairs(usable, out, title="commands")
        if diagnosis.notes:
            report.print_pairs([("-", line) for line in diagnosis.notes], out, title="engine libraries")
        report.print_pairs([("-", line) for line in diagnosis.not_proven], out, title="not proven on the project's CI")
    return EXIT_OK if diagnosis.runtime_usable else EXIT_FAILURE


def make_plan(model: Model, spec: RoutingSpec, capacity: Capacity, dtype: str = "float32") -> Plan:
    """The plan of one image and 64 text tokens, or as many as the capacity has."""
    schedule = resolve(spec, model)
    return plan_for(model, schedule, capacity, dtype=dtype, num_text=min(64, capacity.max_text))


def progress(line: str) -> None:
    """One line of log."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_manifest(manifest: Manifest, path: Path) -> None:
    out = sys.stdout
    sizes = zip(manifest.schedule.stages, manifest.cache_rows, strict=True)
    facts = [
        *_model_facts(manifest.model),
        ("checkpoint sha256", manifest.checkpoint_sha256[:12]),
        ("backend", manifest.backend),
        ("dtype", manifest.dtype),
        *([("profile", manifest.profile)] if manifest.profile != "fp32" else []),
        *([("kernels", manifest.kernels)] if manifest.kernels else []),
        ("routing", manifest.routing),
        ("decisions", report.describe(manifest.schedule)),
        ("visual tokens per layer", f"{manifest.average_visual_tokens:.1f} (measured average)"),
        ("capacity", f"{manifest.capacity.max_text} text tokens, {manifest.capacity.max_images} images"),
        ("check", _verdict(manifest)),
        *_engine_facts(manifest),
    ]
    report.print_pairs(facts, out, title=f"{path}: {manifest.kind}")
    most = manifest.model.vision.tokens_per_image
    stages = [
        (_layers(stage.start, stage.stop), "all" if stage.keep is None or stage.keep > most else stage.keep, rows)
        for stage, rows in sizes
    ]
    report.print_table(("layers", "visual kept", "cache rows"), stages, out, title="stages")
    if manifest.tiers:
        report.print_table(report.TIER_COLUMNS, _tier_rows(manifest), out, title="tiers, the first by default", text=2)
    files = [(name, report.format_bytes(file.bytes), file.sha256[:12]) for name, file in manifest.files.items()]
    report.print_table(("file", "size", "sha256"), files, out, title="files")
    tensors = [
        (part, way, tensor.name, tensor.dtype, "[" + ", ".join(map(str, tensor.shape)) + "]")
        for part, graph in manifest.parts.items()
        for way, tensors in (("in", graph.inputs), ("out", graph.outputs))
        for tensor in tensors
    ]
    report.print_table(("part", "", "tensor", "dtype", "shape"), tensors, out, title="inputs and outputs", text=5)
    report.print_pairs(manifest.versions.items(), out, title="made with")


def _tier_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """What the manifest records of each tier's plan."""
    rows = []
    for name, tier in manifest.tiers.items():
        plan = plan_for(manifest.model, tier.schedule, manifest.capacity, dtype=manifest.dtype)
        rows.append(report.tier_row(name, tier.routing, plan))
    return rows


def _verdict(manifest: Manifest) -> str:
    if manifest.check is None:
        return "not checked"
    return f"{'passed' if manifest.check.get('passed') else 'FAILED'} (reference: {manifest.check.get('reference')})"


def _engine_facts(manifest: Manifest) -> list[tuple[str, object]]:
    """What a TensorRT bundle was lowered for and where it was built."""
    facts: list[tuple[str, object]] = []
    if (lowering := manifest.lowering) is not None:
        plugins = ", ".join(f"{count} {name}" for name, count in lowering.plugin_nodes.items())
        form = f"{lowering.form} form" + (f" ({plugins})" if plugins else "")
        facts.append(("lowered for", f"{lowering.target}, TensorRT {lowering.tensorrt_min} or later, {form}"))
    if (engine := manifest.engine) is not None:
        where = f"{engine.device} (compute capability {engine.compute_capability}), {engine.platform}"
        facts.append(("engine", f"TensorRT {engine.tensorrt} for {where}"))
    return facts


def _model_facts(model: Model) -> list[tuple[str, object]]:
    text, vision = model.text, model.vision
    millions = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in model.num_parameters.items())
    return [
        ("model", model.model_type),
        (
            "decoder",
            f"{text.num_layers} layers, width {text.hidden_size}, heads {text.num_heads}/{text.num_kv_heads}",
        ),
        ("vision tower", f"{vision.num_layers} layers, {vision.image_size} px, patch {vision.patch_size}"),
        ("visual tokens per image", "; ".join(_grid(model, rows, columns) for rows, columns in vision.all_grids)),
        ("parameters", millions),
    ]


def _grid(model: Model, rows: int, columns: int) -> str:
    tokens = rows * columns if model.vision.grids else model.vision.tokens_per_image
    return f"{tokens} ({rows} x {columns})"


def _layers(start: int, stop: int) -> str:
    return f"{start}-{stop - 1}" if stop > start else "none"


def _folder_size(manifest: Manifest) -> str:
    return report.format_bytes(sum(file.bytes for file in manifest.files.values()))


def _need_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}", hint=f"give a folder: {what}")
