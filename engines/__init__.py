"""Engines: an export becomes a bundle that one backend can run.

    read       the export's manifest; every file is hashed before anything is used
    lower      each `reroute` op gets the backend's body (dialects/) and is inlined
    validate   the lowered graph passes onnx's checker and has the inputs and outputs that the manifest promises
    write      graphs, weights, tokenizer, recorded reference, manifest with hashes; the folder appears whole
    check      the finished bundle is driven by the runtime and compared with the reference

No torch and no transformers: a bundle can be built on the device that will run it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

import reroute
from reroute.engines.lower import lower
from reroute.errors import GateError, RerouteError, UserError, nearest
from reroute.folders import check_output, whole_folder
from reroute.manifest import Manifest, Part, file_table

# Backend of a bundle -> dialect of its graphs.
BACKENDS = {"ort": "ort"}
Progress = Callable[[str], None]


def build(
    export_dir: Path,
    output: Path,
    *,
    backend: str = "ort",
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Build an engine bundle.

    Args:
        export_dir: folder that `reroute export` wrote.
        output: folder to write; appears whole, and only if the check passed.
        backend: "ort".
        check: compare the engine with the recorded reference and write the result into the manifest.
        force: replace an earlier bundle.
        progress: is told what happens next.

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
    tell("verifying the export")
    manifest.verify_files(export_dir)
    with whole_folder(output, force=force) as folder:
        graphs = {part.file for part in manifest.parts.values()}
        for name in manifest.files:
            if name not in graphs:
                shutil.copyfile(export_dir / name, folder / name)
        for name, part in manifest.parts.items():
            tell(f"lowering the {name}")
            graph = lower(onnx.load(export_dir / part.file, load_external_data=False), BACKENDS[backend])
            onnx.save(graph, folder / part.file)
            validate(folder / part.file, part)
        versions = {
            **manifest.versions,
            "build.reroute": reroute.__version__,
            "build.python": platform.python_version(),
            "build.onnx": onnx.__version__,
            "build.onnxruntime": _onnxruntime_version(),
        }
        bundle = dataclasses.replace(
            manifest, kind="bundle", backend=backend, files=file_table(folder), versions=versions, check=None
        )
        bundle.save(folder)
        if check:
            tell("checking the engine against the reference")
            bundle = dataclasses.replace(bundle, check=_check(folder))
            bundle.save(folder)
    return bundle


def validate(path: Path, part: Part) -> None:
    """Check a lowered graph on disk: onnx's checker (weights included), and the I/O table. Raises RerouteError."""
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
        listed = "; ".join(f"{row.part}, {row.quantity}: {row.measured} (gate: {row.gate})" for row in failed)
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
