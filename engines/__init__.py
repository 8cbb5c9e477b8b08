"""Engines: an export becomes a bundle that one backend can run.

    read       the export's manifest; every file is hashed before anything is used
    lower      each `reroute` op gets the backend's body (dialects/) and is inlined
    validate   the lowered graph passes onnx's checker and has the inputs and outputs that the manifest promises
    write      graphs, weights, tokenizer, recorded reference, manifest with hashes; the folder appears whole
    check      the finished bundle is driven by the runtime and compared with the reference

TensorRT has one step more: lowering gives a folder (lowered.py) that `build_engine.py` turns into the bundle, here or
on the device.

No torch and no transformers: a bundle can be built on the device that will run it. onnx is imported when a graph is
lowered, so that `python -m reroute.engines.build_engine` works without it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import reroute
from reroute.engines.profiles import Profile, profile_named
from reroute.engines.targets import TARGETS, LoweringOptions
from reroute.errors import GateError, RerouteError, UserError, nearest
from reroute.folders import check_output, whole_folder
from reroute.manifest import Manifest, Part, file_table
from reroute.tiers import require_one_tier

if TYPE_CHECKING:
    from reroute.engines import build_engine  # run as a module, it must not be imported by its package
    from reroute.parity import CheckRow

BACKENDS = ("ort", "tensorrt")
KERNELS_FILE = "reroute_kernels.so"
Progress = Callable[[str], None]


class Compared(Protocol):
    """What `evaluate` found: rows of the check, and everything for the manifest."""

    def rows(self) -> list[CheckRow]:
        """Gates, and what is only reported."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All figures."""
        ...


Evaluate = Callable[[Path, Path], Compared]  # the float32 bundle and the quantised one


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRTOptions:
    """What a TensorRT build needs to know.

    Attributes:
        lowering: target, form, dtype, memory.
        only_lower: stop before TensorRT is needed; the output is then the lowered folder.
        engine: options of the build itself, see `reroute.engines.build_engine`.
    """

    lowering: LoweringOptions
    only_lower: bool = False
    engine: build_engine.Options | None = None


def build(
    export_dir: Path,
    output: Path,
    *,
    backend: str = "ort",
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    tensorrt: TensorRTOptions | None = None,
    profile: str = "fp32",
    kernels: Path | None = None,
    evaluate: Evaluate | None = None,
) -> Manifest:
    """Build an engine bundle.

    Args:
        export_dir: folder that `reroute export` wrote.
        output: folder to write; appears whole, and only if the check passed.
        backend: "ort" or "tensorrt".
        check: compare the engine with the recorded reference and write the result into the manifest.
        force: replace an earlier bundle.
        progress: is told what happens next.
        tensorrt: with the backend "tensorrt", what to build for.
        profile: with the backend "ort", what the weights become (see `reroute.engines.profiles`).
        kernels: with a quantised profile, the library of plugins_cpp/onnxruntime that runs the layers; the bundle gets
            a copy.
        evaluate: with a quantised profile, asks the float32 bundle and this one the same questions; part of the check.

    Raises:
        UserError: bad input, before anything is written.
        GateError: the check failed; nothing is written.
    """
    tell = progress or (lambda _: None)
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}", hint=nearest(backend, BACKENDS))
    manifest = Manifest.load(export_dir)
    if manifest.kind != "export":
        raise UserError(f"{export_dir} is a {manifest.kind}, not an export", hint="give what `reroute export` wrote")
    if output.resolve() == export_dir.resolve():
        raise UserError("the bundle would overwrite the export", hint="choose another output with -o")
    check_output(output, force=force)
    if backend == "tensorrt":
        from reroute.engines.lowered import require_fixed_shapes

        require_one_tier(manifest, "a TensorRT engine")
        require_fixed_shapes(manifest)
    if backend == "tensorrt" and tensorrt is None:
        raise UserError("a TensorRT engine needs a target", hint=f"add --target T; supported: {', '.join(TARGETS)}")
    chosen = profile_named(profile)
    if chosen.quantized and backend != "ort":
        raise UserError(f"the profile {profile} is for ONNX Runtime", hint="leave --profile out for TensorRT")
    if kernels is not None:
        require_kernels(kernels, chosen, backend)
    if evaluate is not None and not (chosen.quantized and check):
        raise UserError(
            "only a quantised engine that is checked is compared with float32", hint="add --profile int8 or int4"
        )
    tell("verifying the export")
    manifest.verify_files(export_dir)
    with whole_folder(output, force=force) as folder:
        if tensorrt is not None and backend == "tensorrt":
            bundle = _build_tensorrt(export_dir, manifest, folder, tensorrt, tell)
            bundle.save(folder)
            if check and bundle.kind == "bundle":
                bundle = _checked(folder, bundle, tell)
        elif evaluate is None:
            bundle = _build_ort(export_dir, manifest, folder, chosen, tell, kernels)
            bundle.save(folder)
            bundle = _checked(folder, bundle, tell) if check else bundle
        else:
            bundle = _build_measured(export_dir, manifest, folder, chosen, evaluate, tell, kernels)
    return bundle


def require_kernels(library: Path, profile: Profile, backend: str) -> None:
    """Refuse a library that the engine would not use, or that is none. Raises UserError."""
    if backend != "ort" or not profile.quantized:
        raise UserError(
            "--kernels has no meaning without a quantised profile", hint="add --profile int8 or int4, or leave it out"
        )
    if not library.is_file():
        raise UserError(f"there is no library {library}", hint="plugins_cpp/README.md says how to build it")
    try:
        instructions = ctypes.CDLL(str(library.resolve())).reroute_cpu_instructions
    except (OSError, AttributeError) as error:
        raise UserError(
            f"{library} is not the library of kernels: {error}", hint="give libreroute_onnxruntime.so of this machine"
        ) from error
    instructions.restype = ctypes.c_char_p
    if instructions() == b"portable":
        raise UserError(
            "this processor has no AVX-512 VNNI: the kernels would be slower than ONNX Runtime's own operators",
            hint="leave --kernels out",
        )


def _build_measured(
    export_dir: Path,
    manifest: Manifest,
    folder: Path,
    profile: Profile,
    evaluate: Evaluate,
    tell: Progress,
    kernels: Path | None,
) -> Manifest:
    """The first rung of a profile that meets the gates, also those of the questions. Raises GateError if none does."""
    with tempfile.TemporaryDirectory(prefix=".float32.", dir=folder.parent) as name:
        base = Path(name)
        tell("building the float32 engine to compare with")
        _build_ort(export_dir, manifest, base, profile_named("fp32"), lambda _: None).save(base)
        ladder = profile.ladder
        for rung in ladder:
            bundle = _build_ort(export_dir, manifest, folder, rung, tell, kernels)
            bundle.save(folder)
            try:
                return _checked(folder, bundle, tell, lambda: evaluate(base, folder))
            except GateError as error:
                if rung is ladder[-1]:
                    raise
                tell(f"{rung.label}: {error.message}; more layers with 8 bits")
    raise AssertionError("a profile without rungs has nothing to measure")


def _checked(
    folder: Path, bundle: Manifest, tell: Progress, evaluate: Callable[[], Compared] | None = None
) -> Manifest:
    """The bundle with the result of its check in the manifest. Raises GateError unless every gate passed."""
    from reroute.check import check_bundle

    tell("checking the engine against the reference")
    report = check_bundle(folder)
    if evaluate is not None:
        tell("asking it and the float32 engine questions")
        compared = evaluate()
        report = dataclasses.replace(report, rows=(*report.rows, *compared.rows()), fidelity=compared.to_dict())
    if not report.passed:
        failed = [row for row in report.rows if not row.passed]
        listed = "; ".join(f"{row.where}, {row.quantity}: {row.measured} (gate: {row.gate})" for row in failed)
        raise GateError(
            f"the engine does not reproduce the reference: {listed}",
            hint="nothing was written; --no-check keeps the bundle so that `reroute check` can show all rows",
        )
    bundle = dataclasses.replace(bundle, check=report.to_dict())
    bundle.save(folder)
    return bundle


def _build_ort(
    export_dir: Path,
    manifest: Manifest,
    folder: Path,
    profile: Profile,
    tell: Progress,
    kernels: Path | None = None,
) -> Manifest:
    import contextlib

    import onnx

    from reroute.engines.branches import sink
    from reroute.engines.lower import lower
    from reroute.engines.quantize import quantize
    from reroute.engines.tiers import take_budgets
    from reroute.engines.weights import DataFile, load_graph

    loaded = {name: load_graph(export_dir / part.file) for name, part in manifest.parts.items()}
    graphs = {part.file for part in manifest.parts.values()}
    data = {name: weights.file or f"{manifest.parts[name].file}.data" for name, (_, weights) in loaded.items()}
    for name in manifest.files:
        if name not in graphs | set(data.values()):
            shutil.copyfile(export_dir / name, folder / name)
    parts = dict(manifest.parts)
    with contextlib.ExitStack() as stack:
        # The graphs of several grids share their file.
        files = {file: stack.enter_context(DataFile(folder / file)) for file in sorted(set(data.values()))}
        for name, (neutral, weights) in loaded.items():
            tell(f"lowering the {name}")
            if name == "decoder" and manifest.tiers:
                neutral, parts[name] = take_budgets(neutral, manifest)
            own = name == "decoder" and kernels is not None
            graph, made = lower(neutral, "ort-kernels" if own else "ort"), None
            sink(graph.graph)
            if name == "decoder" and profile.quantized:
                tell(f"quantising the decoder to {profile.label}")
                made = quantize(graph, weights, profile, manifest.schedule, kernels=own)
            files[data[name]].take(graph, weights, made)
            onnx.save(graph, folder / parts[name].file)
    for part in parts.values():
        validate(folder / part.file, part)
    if kernels is not None:
        # A rung before may have loaded it, and what is mapped must not be written over.
        shutil.copyfile(kernels, folder / f"{KERNELS_FILE}.new")
        (folder / f"{KERNELS_FILE}.new").replace(folder / KERNELS_FILE)
    versions = {**_versions(manifest), "build.onnxruntime": _onnxruntime_version()}
    stored = sum((folder / file).stat().st_size for file in data.values())
    return dataclasses.replace(
        manifest,
        kind="bundle",
        backend="ort",
        profile=profile.label,
        kernels="" if kernels is None else KERNELS_FILE,
        parts=parts,
        files=file_table(folder),
        versions=versions,
        check=None,
        **(_with_weights(manifest, stored) if profile.quantized else {}),
    )


def _with_weights(manifest: Manifest, stored: int) -> dict[str, Any]:
    """The manifest's estimates, and those of its tiers, with the weights as they are stored."""

    def updated(estimates: dict[str, float]) -> dict[str, float]:
        peak = estimates["peak_bytes"] - estimates["weight_bytes"] + stored
        return {**estimates, "weight_bytes": float(stored), "peak_bytes": peak}

    tiers = {
        name: dataclasses.replace(tier, estimates=updated(tier.estimates)) for name, tier in manifest.tiers.items()
    }
    return {"estimates": updated(manifest.estimates), "tiers": tiers}


def _build_tensorrt(
    export_dir: Path, manifest: Manifest, folder: Path, options: TensorRTOptions, tell: Progress
) -> Manifest:
    """The lowered folder, or, where TensorRT is, the bundle. Raises UserError without it, once the rules passed."""
    from reroute.engines import build_engine
    from reroute.engines.lowered import lower_export

    manifest = dataclasses.replace(manifest, versions=_versions(manifest))
    if options.only_lower:
        return lower_export(export_dir, manifest, folder, options.lowering, tell)
    # Beside the output: the lowered weights are as large as the engine, and /tmp may be small.
    with tempfile.TemporaryDirectory(prefix=".lowered.", dir=folder.parent) as name:
        lowered, made = Path(name), folder / "bundle"
        lower_export(export_dir, manifest, lowered, options.lowering, tell)
        try:
            build_engine.build(lowered, made, options.engine or build_engine.Options(), tell)
        except build_engine.BuildError as error:
            kind = UserError if error.code == 2 else RerouteError
            raise kind(error.message, hint=error.hint) from error
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    return Manifest.load(folder)


def _versions(manifest: Manifest) -> dict[str, str]:
    import onnx

    return {
        **manifest.versions,
        "build.reroute": reroute.__version__,
        "build.python": platform.python_version(),
        "build.onnx": onnx.__version__,
    }


def validate(path: Path, part: Part) -> None:
    """Check a lowered graph on disk: onnx's checker (weights included), and the I/O table. Raises RerouteError."""
    import onnx

    from reroute.engines.dialects.ort import register_schemas

    register_schemas()
    onnx.checker.check_model(str(path))
    graph = onnx.load(path, load_external_data=False).graph
    for values, table, what in ((graph.input, part.inputs, "input"), (graph.output, part.outputs, "output")):
        have, want = [value.name for value in values], [tensor.name for tensor in table]
        if have != want:
            missing = sorted(set(want) ^ set(have))
            raise RerouteError(f"{path.name} and the manifest differ in {what}s: {missing[:4]}", hint="export again")


def _onnxruntime_version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
