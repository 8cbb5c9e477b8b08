"""Facts of the machine that a figure depends on, and a fingerprint that tells devices apart. No host name, no paths."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from reroute.doctor import cpu_features, l4t_version


def facts(*, gpu: bool) -> dict[str, Any]:
    """What this machine is and how busy it is; asks for a GPU only when one takes part."""
    cpuinfo = _text("/proc/cpuinfo")
    model = _text("/proc/device-tree/model").strip("\0\n ")
    found: dict[str, Any] = {
        "cpu": cpu_model(cpuinfo) or model or platform.processor() or platform.machine(),
        "cpu_features": list(cpu_features(cpuinfo)),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "load_average_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if release := l4t_version(_text("/etc/nv_tegra_release")):
        found |= {"jetson": model, "l4t": release, "power_mode": _first_line("nvpmodel", "-q")}
    if gpu:
        found["gpu"] = _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return found | {"fingerprint": fingerprint(found)}


def fingerprint(machine: dict[str, Any]) -> str:
    """A name for machines of one kind: processor, usable cores, memory in GiB, GPU and power mode where there are any.

    Kernel and library versions are not in it: an update that makes things slower should be seen, not excused.
    """
    gib = math.ceil((machine["memory_bytes"] or 0) / 2**30)  # systems report a little less than there is
    extra = [machine.get(name) for name in ("gpu", "power_mode")]
    words = [machine["cpu"], f"{machine['cores_usable']}c", f"{gib}gib", *(word for word in extra if word)]
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")


def cpu_model(cpuinfo: str) -> str:
    """The processor's name of `/proc/cpuinfo`; empty on Arm, which has none there."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(name: str, *args: str) -> str | None:
    """First line that a command prints; None when it is not there or fails."""
    if (path := shutil.which(name)) is None:
        return None
    try:
        done = subprocess.run([path, *args], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]
