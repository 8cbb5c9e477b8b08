"""Build TensorRT engines from a lowered folder, on the device that will run them.

    python build_engine.py LOWERED [-o BUNDLE] [--plugin LIBRARY] [--timing-cache FILE] [--force]

LOWERED is what `reroute build DIR --backend tensorrt --target T --onnx-only` wrote; this file is in it, and is the same
as `python -m reroute.engines.build_engine`. It needs TensorRT's Python package and the standard library, nothing else,
not even Reroute. Python 3.10.

    read       the manifest; every file is hashed before anything is used
    device     compute capability, name and memory, from the CUDA driver; too little memory ends here
    plugin     the library is loaded into TensorRT's registry, and must bring every op that the decoder uses
    parse      a strongly typed network: precision is what the ONNX file says; plugin layers are counted
    build      one engine for each part, the decoder's with a prefill and a decode profile, into one timing cache
    look       each engine is deserialised once: its profiles, tensors and plugin layers must be those asked for
    write      engines, plugin library, tokenizer, reference and manifest; the folder appears whole

An engine runs only with the TensorRT version, GPU and platform that built it; the manifest records them, and the
runtime compares before it loads. Errors end with exit code 2 (bad input) or 1 (TensorRT refused).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

MANIFEST = "reroute.json"
SCHEMA_VERSION = 3
PLUGIN_FILE = "reroute_plugin.so"
MAJORS = (10, 11)
GIB = 2**30


class BuildError(Exception):
    """What is wrong, what to do about it, and the exit code."""

    def __init__(self, message: str, hint: str = "", code: int = 2) -> None:
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code


@dataclass(frozen=True)
class Options:
    """How to build; nothing here changes what the engine answers.

    Attributes:
        plugin: the plugin library, needed for graphs in plugin form.
        timing_cache: file of measured tactics, read if it exists and written; a second build is then much faster.
        workspace_mib: most scratch memory of one layer; 0 leaves TensorRT's own limit, all of the device.
        optimization_level: 0 to 5, TensorRT's default is 3.
        compatible_gpus: "none", or "ampere+" for an engine that other GPUs from Ampere on load too (slower).
        force: replace an earlier bundle.
    """

    plugin: Path | None = None
    timing_cache: Path | None = None
    workspace_mib: int = 0
    optimization_level: int = 3
    compatible_gpus: str = "none"
    force: bool = False


@dataclass(frozen=True)
class Device:
    """The GPU that TensorRT will build for: compute capability "8.7", name, bytes of memory."""

    capability: str
    name: str
    memory_bytes: int


def build(lowered: Path, bundle: Path, options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    """Build a bundle from a lowered folder and return its manifest as a dict. Raises BuildError."""
    manifest = read_manifest(lowered)
    check_output(bundle, force=options.force)
    trt = import_tensorrt(manifest["lowering"]["tensorrt_min"])
    device = cuda_device()
    needed = int(manifest["estimates"]["engine_build_bytes"])
    if needed > device.memory_bytes:
        raise BuildError(
            f"the build needs about {needed / GIB:.1f} GiB, {device.name} has {device.memory_bytes / GIB:.1f}",
            "lower again in float16, or for fewer tokens",
        )
    logger = trt.Logger(trt.Logger.WARNING)
    plugin = load_plugin(trt, manifest["lowering"], options.plugin)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.", dir=bundle.parent))
    try:
        parts = manifest["parts"]
        graphs = {part["file"] for part in parts.values()}
        skip = graphs | {f"{name}.data" for name in graphs} | {Path(__file__).name, "build_engine.py"}
        for name in manifest["files"]:
            if name not in skip:
                shutil.copyfile(lowered / name, staging / name)
        memory, layers = {}, 0
        for name, part in parts.items():
            tell(f"building the {name} for {device.name} with TensorRT {trt.__version__}")
            data, count = build_part(trt, logger, lowered / part["file"], name, manifest, options, tell)
            part["file"] = f"{name}.engine"
            (staging / part["file"]).write_bytes(data)
            memory[name] = inspect(trt, logger, data, name, part, manifest["lowering"], count)
            layers += count
        if plugin is not None:
            shutil.copyfile(plugin, staging / PLUGIN_FILE)
        manifest["kind"] = "bundle"
        manifest["files"] = file_table(staging)
        made_with = {"build.tensorrt": trt.__version__, "build.engine_python": platform.python_version()}
        manifest["versions"] = dict(sorted({**manifest["versions"], **made_with}.items()))
        manifest["engine"] = {
            "tensorrt": trt.__version__,
            "compute_capability": device.capability,
            "device": device.name,
            "platform": machine(),
            "hardware_compatibility": options.compatible_gpus,
            "version_compatible": False,
            "plugin_file": PLUGIN_FILE if plugin is not None else "",
            "plugin_layers": layers,
            "device_memory_bytes": memory,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        staging.chmod(0o755)
        replace_folder(staging, bundle)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a lowered folder whose files are all as they were written. Raises BuildError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind, version = manifest["kind"], manifest["schema_version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BuildError(f"{folder} is not a lowered folder: {error}", "give what --onnx-only wrote") from error
    if kind != "lowered" or version != SCHEMA_VERSION:
        raise BuildError(
            f"{folder} is a {kind} of schema version {version}, expected is a lowered folder of {SCHEMA_VERSION}",
            "make one with `reroute build DIR --backend tensorrt --target T --onnx-only`",
        )
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BuildError(f"the manifest names a file outside its folder: {name}", "do not use this folder")
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise BuildError(f"{name} is missing or was changed since it was written", "copy or lower it again")
    return manifest


def import_tensorrt(least: str) -> Any:
    """The module `tensorrt`, of a version that the graphs were checked for. Raises BuildError."""
    try:
        trt = import_module("tensorrt")
    except ImportError as error:
        raise BuildError(
            f"TensorRT cannot be imported: {error}",
            "on a Jetson it comes with JetPack (a virtual environment needs --system-site-packages); elsewhere "
            "pip install tensorrt; or lower here with --onnx-only and run build_engine.py on the device",
        ) from error
    have, want = version_of(trt.__version__), version_of(least)
    if have < want or have[0] not in MAJORS:
        raise BuildError(
            f"this is TensorRT {trt.__version__}, the graphs were lowered for {least} or later, "
            f"major {' or '.join(map(str, MAJORS))}",
            "lower again for the target that this machine is",
        )
    return trt


def version_of(text: str) -> tuple[int, int]:
    """(10, 3) of "10.3.0.26"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def cuda_device() -> Device:
    """Device 0, asked from the CUDA driver. Raises BuildError."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError(
            f"there is no CUDA driver: {error}", "build on the machine that will run the engine"
        ) from error
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # compute capability, major
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        lambda: cuda.cuDeviceGetName(name, len(name), device),
        lambda: cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    )
    for call in calls:
        if code := call():
            raise BuildError(f"the CUDA driver answers with error {code}", "is a GPU there, and free for this user?")
    return Device(f"{major.value}.{minor.value}", name.value.decode(), memory.value)


def load_plugin(trt: Any, lowering: dict[str, Any], library: Path | None) -> Path | None:
    """Load the plugin library if the graphs need it, and check that it brings their ops. Raises BuildError."""
    wanted = lowering["plugin_nodes"]
    if not wanted:
        return None
    if library is None or not library.is_file():
        raise BuildError(
            f"the graphs are in plugin form, and {'no plugin library was given' if library is None else library}"
            f"{'' if library is None else ' is not a file'}",
            "give --plugin LIBRARY (plugins_cpp/README.md says how to build it), or lower with --form native",
        )
    registry = trt.get_plugin_registry()
    # A process loads a library once: after an earlier build the creators are there, and loading again would fail.
    known = all(registry.get_creator(name, "1", "") is not None for name in wanted)
    if not known and registry.load_library(str(library.resolve())) is None:
        raise BuildError(f"TensorRT {trt.__version__} does not load {library}", "build it for this major version", 1)
    if missing := [name for name in wanted if registry.get_creator(name, "1", "") is None]:
        raise BuildError(f"{library} has no {', '.join(missing)}", "build the plugin library of this version", 1)
    return library


def build_part(
    trt: Any,
    logger: Any,
    graph: Path,
    name: str,
    manifest: dict[str, Any],
    options: Options,
    tell: Callable[[str], None],
) -> tuple[bytes, int]:
    """Parse and build one graph. Returns the serialised engine and its number of plugin layers. Raises BuildError."""
    lowering = manifest["lowering"]
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        lines = []
        for index in range(parser.num_errors):
            problem = parser.get_error(index)
            lines.append(f"{problem.node_name()} ({problem.node_operator()}): {problem.desc()}")
        raise BuildError(f"TensorRT does not parse {graph.name}: {'; '.join(lines[:3])}", "report it", 1)
    count = count_plugins(trt, network, name, lowering)
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of layers, for the count after the build
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.compatible_gpus == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    for spans in lowering["profiles"][name].values():
        profile = builder.create_optimization_profile()
        for tensor, span in spans.items():
            profile.set_shape(tensor, min=span["min"], opt=span["opt"], max=span["max"])
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses a profile of the {name}", "report it", 1)
    known = options.timing_cache.read_bytes() if options.timing_cache and options.timing_cache.is_file() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(f"{options.timing_cache} is of another device or version", "remove it, or name another", 2)
    config.progress_monitor = progress_monitor(trt, name, tell)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"TensorRT could not build the {name}; its log is above", "less text, or --workspace-mib", 1)
    if options.timing_cache:
        write_whole(options.timing_cache, bytes(memoryview(cache.serialize())))
    return bytes(memoryview(serialized)), count


def count_plugins(trt: Any, network: Any, name: str, lowering: dict[str, Any]) -> int:
    """Plugin layers of a parsed network. Raises BuildError if a plugin node became something else: a parser that has
    both a function and a plugin may take the function.
    """
    expected = sum(lowering["plugin_nodes"].values()) if name == "decoder" else 0
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    count = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if count != expected:
        raise BuildError(f"the {name} has {count} plugin layers, expected are {expected}", "report it", 1)
    return count


def inspect(
    trt: Any, logger: Any, data: bytes, name: str, part: dict[str, Any], lowering: dict[str, Any], plugins: int
) -> int:
    """Look at a built engine: tensors, profiles, plugin layers. Returns its scratch memory in bytes.

    Raises BuildError.
    """
    runtime = trt.Runtime(logger)  # has to outlive the engine
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BuildError(f"TensorRT does not load the {name} that it built; its log is above", "report it", 1)
    have = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    want = {tensor["name"] for tensor in (*part["inputs"], *part["outputs"])}
    if have != want:
        raise BuildError(f"the {name} differs from its table in {sorted(have ^ want)[:4]}", "report it", 1)
    if engine.num_optimization_profiles != len(lowering["profiles"][name]):
        raise BuildError(f"the {name} has {engine.num_optimization_profiles} profiles", "report it", 1)
    if plugins:
        inspector = engine.create_engine_inspector()
        listed = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
        found = {entry["Name"].split(" [profile ")[0] for entry in listed if "Plugin" in entry["LayerType"]}
        if len(found) != plugins:
            raise BuildError(f"the built {name} has {len(found)} plugin layers of {plugins}", "report it", 1)
    return int(engine.device_memory_size_v2)


def progress_monitor(trt: Any, part: str, tell: Callable[[str], None]) -> Any:
    """A monitor that tells of the builder's outer phases, and of a long one every ten seconds."""

    class Monitor(trt.IProgressMonitor):
        """TensorRT calls it from its own thread, where an exception would be lost."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                tell(f"{part}: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.told > 10:
                self.told = now
                tell(f"{part}: {phase_name}, step {step + 1} of {self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def machine() -> str:
    """Operating system and machine, "linux-aarch64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def check_output(bundle: Path, *, force: bool) -> None:
    """Refuse to replace anything but an earlier bundle, and that only with `force`. Raises BuildError."""
    if not bundle.exists():
        return
    try:
        known = {MANIFEST, *json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BuildError(f"{bundle} exists and is not a bundle", "choose another output") from error
    if not force:
        raise BuildError(f"{bundle} exists already", "add --force to replace it")
    if strange := sorted({path.name for path in bundle.iterdir()} - known):
        raise BuildError(f"{bundle} holds {strange[0]}, which no build wrote", "move it away: --force would delete it")


def replace_folder(staging: Path, bundle: Path) -> None:
    """Rename `staging` to `bundle`; what was there goes after the new one stands."""
    old = staging.with_name(f"{staging.name}.old")
    if bundle.exists():
        bundle.rename(old)
    try:
        staging.rename(bundle)
    except OSError:
        if old.exists():
            old.rename(bundle)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_bytes(data)
    staging.replace(path)


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Build TensorRT engines from a lowered folder.")
    made.add_argument("lowered", type=Path, metavar="LOWERED")
    made.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="default: LOWERED with -engine added")
    made.add_argument("--plugin", type=Path, metavar="LIBRARY", help="the plugin library, for graphs in plugin form")
    made.add_argument("--timing-cache", type=Path, metavar="FILE", help="read if it exists, and written")
    made.add_argument("--workspace-mib", type=int, default=0, metavar="N", help="of one layer; default: no limit")
    made.add_argument("--optimization-level", type=int, default=3, choices=range(6), help="default 3")
    made.add_argument("--compatible-gpus", default="none", choices=("none", "ampere+"), help="default none")
    made.add_argument("--force", action="store_true", help="replace an earlier bundle")
    return made


def main() -> int:
    """Run the command line and return its exit code."""
    args = vars(command_line().parse_args())
    lowered: Path = args.pop("lowered").resolve()
    output = args.pop("output") or lowered.with_name(f"{lowered.name}-engine")
    try:
        build(lowered, output, Options(**args), lambda line: print(line, file=sys.stderr, flush=True))
    except BuildError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return error.code
    print(f"built {output}; next, where Reroute is installed: reroute check {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
