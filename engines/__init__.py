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

import dataclasses
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import reroute
from reroute.engines.targets import TARGETS, LoweringOptions
from reroute.errors import GateError, RerouteError, UserError, nearest
from reroute.folders import check_output, whole_folder
from reroute.manifest import Manifest, Part, file_table
from reroute.tiers import require_one_tier

if TYPE_CHECKING:
    from reroute.engines import build_engine  # run as a module, it must not be imported by its package

BACKENDS = ("ort", "tensorrt")
Progress = Callable[[str], None]


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
    tell("verifying the export")
    manifest.verify_files(export_dir)
    with whole_folder(output, force=force) as folder:
        if tensorrt is not None and backend == "tensorrt":
            bundle = _build_tensorrt(export_dir, manifest, folder, tensorrt, tell)
        else:
            bundle = _build_ort(export_dir, manifest, folder, tell)
        bundle.save(folder)
        if check and bundle.kind == "bundle":
            tell("checking the engine against the reference")
            bundle = dataclasses.replace(bundle, check=_check(folder))
            bundle.save(folder)
    return bundle


def _build_ort(export_dir: Path, manifest: Manifest, folder: Path, tell: Progress) -> Manifest:
    import onnx

    from reroute.engines.lower import lower
    from reroute.engines.tiers import take_budgets

    graphs = {part.file for part in manifest.parts.values()}
    for name in manifest.files:
        if name not in graphs:
            shutil.copyfile(export_dir / name, folder / name)
    parts = dict(manifest.parts)
    for name, part in manifest.parts.items():
        tell(f"lowering the {name}")
        neutral = onnx.load(export_dir / part.file, load_external_data=False)
        if name == "decoder" and manifest.tiers:
            neutral, parts[name] = take_budgets(neutral, manifest)
        onnx.save(lower(neutral, "ort"), folder / part.file)
        validate(folder / part.file, parts[name])
    versions = {**_versions(manifest), "build.onnxruntime": _onnxruntime_version()}
    return dataclasses.replace(
        manifest,
        kind="bundle",
        backend="ort",
        parts=parts,
        files=file_table(folder),
        versions=versions,
        check=None,
    )


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

    onnx.checker.check_model(str(path))
    graph = onnx.load(path, load_external_data=False).graph
    for values, table, what in ((graph.input, part.inputs, "input"), (graph.output, part.outputs, "output")):
        have, want = [value.name for value in values], [tensor.name for tensor in table]
        if have != want:
            missing = sorted(set(want) ^ set(have))
            raise RerouteError(f"{path.name} and the manifest differ in {what}s: {missing[:4]}", hint="export again")


def _check(folder: Path) -> dict[str, object]:
    from reroute.check import check_bundle

    report = check_bundle(folder)
    if not report.passed:
        failed = [row for row in report.rows if not row.passed]
        listed = "; ".join(f"{row.where}, {row.quantity}: {row.measured} (gate: {row.gate})" for row in failed)
        raise GateError(
            f"the engine does not reproduce the reference: {listed}",
            hint="nothing was written; --no-check keeps the bundle so that `reroute check` can show all rows",
        )
    return report.to_dict()


def _onnxruntime_version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
