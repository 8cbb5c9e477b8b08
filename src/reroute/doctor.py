"""What this machine can do: `reroute doctor`. Imports nothing heavy and changes nothing.

Versions come from package metadata. Only the providers of ONNX Runtime need the library itself, which is
asked in a child process: a broken wheel, common on a Jetson, must not take the doctor down.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_ORT = ("onnxruntime", "onnxruntime-gpu")
_PACKAGES = (
    *("numpy", "pillow", "tokenizers", "jinja2", "rich", *_ORT, "onnx", "polygraphy"),
    *("torch", "transformers", "onnxscript", "safetensors", "tensorrt", "cuda-python", "tensorrt-llm"),
)
_CORE = ("jinja2", "numpy", "pillow", "rich", "tokenizers")

# Packages of each command and the extras of pyproject.toml that install them; a tuple is a choice.
COMMANDS: dict[str, tuple[str, tuple[str | tuple[str, ...], ...]]] = {
    "run": ("ort", (*_CORE, _ORT)),
    "eval": ("ort", (*_CORE, _ORT)),
    "bench": ("ort", (*_CORE, _ORT)),
    "compare": ("ort", (*_CORE, _ORT)),
    "build": ("build", (*_CORE, _ORT, "onnx", "polygraphy")),
    "check": ("build", (*_CORE, _ORT, "onnx", "polygraphy")),
    "export": ("export", (*_CORE, "onnx", "onnxscript", "safetensors", "torch", "transformers")),
    "tune": (
        "export,build",
        (*_CORE, _ORT, "onnx", "onnxscript", "polygraphy", "safetensors", "torch", "transformers"),
    ),
}

NOT_PROVEN = (
    "TensorRT: graphs are checked against its documented rules and run in ONNX Runtime, names against its real Python "
    "bindings; no engine was built or run",
    "TensorRT-LLM: the written checkpoint and engine directory follow its documented layout; nothing was run",
    "Jetson: the runtime is written for it (Python 3.10, no torch) but CI has none to run it on",
    "CUDA and TensorRT providers of ONNX Runtime: CI has no GPU",
)


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Whether one command can run here, and if not, what to install."""

    command: str
    missing: tuple[str, ...]
    install: str

    @property
    def ok(self) -> bool:
        """Nothing is missing."""
        return not self.missing


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything the doctor found. `machine` and `packages` are name and value, in order of print."""

    machine: dict[str, str]
    packages: dict[str, str | None]
    providers: tuple[str, ...]
    commands: tuple[Usable, ...]
    notes: tuple[str, ...] = ()
    not_proven: tuple[str, ...] = NOT_PROVEN

    @property
    def runtime_usable(self) -> bool:
        """`reroute run` can run here."""
        return all(usable.ok for usable in self.commands if usable.command == "run")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        commands = {usable.command: {**asdict(usable), "ok": usable.ok} for usable in self.commands}
        return {**asdict(self), "commands": commands, "runtime_usable": self.runtime_usable}


def diagnose() -> Diagnosis:
    """Look at this machine and this Python. Takes no lock, opens no device, writes nothing."""
    packages = {name: package_version(name) for name in _PACKAGES}
    providers: tuple[str, ...] = ()
    if any(packages[name] for name in _ORT):
        providers = _providers()
    return Diagnosis(
        machine=_machine(),
        packages=packages,
        providers=providers,
        commands=usable_commands(packages, providers),
        notes=engine_notes(packages),
    )


def engine_notes(packages: Mapping[str, str | None]) -> tuple[str, ...]:
    """What the installed TensorRT and TensorRT-LLM can do with this project's engines."""
    notes = []
    if version := packages.get("tensorrt"):
        release = _release(version)
        if release < (10, 3) or release >= (12, 0):
            notes.append(f"TensorRT {version}: engines are built with 10.3 to 11.x only")
        elif release < (10, 15):
            notes.append(f"TensorRT {version}: builds the target orin-jp6 (primitive operators) only")
        else:
            notes.append(f"TensorRT {version}: builds every target")
        if not packages.get("cuda-python"):
            notes.append(
                "TensorRT engines run with cuda-python, which is not installed: pip install 'reroute[tensorrt]'"
            )
    if version := packages.get("tensorrt-llm"):
        if _release(version) >= (1, 3):
            notes.append(
                f"TensorRT-LLM {version} has no engine backend (the last is 1.2.x): it cannot load our engines"
            )
        else:
            notes.append(
                f"TensorRT-LLM {version}: its runtime.Session loads the decoder engine, and trtllm-build the dense "
                "baseline; its GenerationSession cannot route, one cache length is all it has"
            )
    return tuple(notes)


def _release(version: str) -> tuple[int, ...]:
    """(10, 3) of "10.3.0": major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def usable_commands(packages: Mapping[str, str | None], providers: tuple[str, ...]) -> tuple[Usable, ...]:
    """Which commands have their packages; an ONNX Runtime that names no provider does not load."""
    found = {name for name, version in packages.items() if version}
    if not providers:
        found -= set(_ORT)
    result = []
    for command, (extra, needed) in COMMANDS.items():
        choices = [(need,) if isinstance(need, str) else need for need in needed]
        missing = tuple(" or ".join(choice) for choice in choices if not found & set(choice))
        result.append(Usable(command=command, missing=missing, install=f"pip install 'reroute[{extra}]'"))
    return tuple(result)


def package_version(name: str) -> str | None:
    """Version from the package's metadata; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    facts = {
        "reroute": package_version("reroute") or "not installed as a package",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPUs": _cpu_count(),
        "CPU features": " ".join(cpu_features(_read("/proc/cpuinfo"))) or "unknown",
        "memory": _memory(_read("/proc/meminfo")),
        "GPU": _gpu(),
    }
    if release := l4t_version(_read("/etc/nv_tegra_release")):
        facts["Jetson"] = _read("/proc/device-tree/model").strip("\0\n ") or "model unknown"
        facts["L4T"] = release
        facts["power mode"] = _command("nvpmodel", "-q").replace("\n", ", ") or "nvpmodel does not answer"
    return facts


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The features that matter for inference, of `/proc/cpuinfo` (x86 "flags", Arm "Features")."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    words = set(match.group(1).split()) if match else set()
    return tuple(name for name in _CPU_FEATURES if name in words)


def l4t_version(text: str) -> str:
    """`# R36 (release), REVISION: 4.3, ...` of /etc/nv_tegra_release is 36.4.3; empty for anything else."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match.group(1)}.{match.group(2)}" if match else ""


def _memory(meminfo: str) -> str:
    sizes = {key: int(kib) / 2**20 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    if "MemTotal" not in sizes:
        return "unknown"
    return f"{sizes['MemTotal']:.1f} GiB, {sizes.get('MemAvailable', 0.0):.1f} GiB available"


def _cpu_count() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _gpu() -> str:
    query = ("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader")
    return _command("nvidia-smi", *query).replace("\n", "; ") or "none seen by nvidia-smi"


def _providers() -> tuple[str, ...]:
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    return tuple(_command(sys.executable, "-c", code).split())


def _command(name: str, *args: str) -> str:
    """Output of a command; empty when it is not there, fails or hangs."""
    if (path := shutil.which(name)) is None:
        return ""
    try:
        done = subprocess.run([path, *args], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
