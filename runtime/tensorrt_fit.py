"""Whether a TensorRT engine may be loaded here: compared before it is deserialised, because TensorRT's own refusal of a
foreign engine names neither side.
"""

from __future__ import annotations

import platform

from reroute.errors import UserError
from reroute.manifest import EngineBuild

REBUILD = "build the engine here: `python -m reroute.engines.build_engine LOWERED`, or `reroute build` with TensorRT"


def require_fit(built: EngineBuild, *, tensorrt: str, compute_capability: str, device: str) -> None:
    """Compare where an engine was built with where it is to run. Raises UserError naming both sides.

    Args:
        built: the manifest's entry.
        tensorrt: version of the runtime here, "10.3.0".
        compute_capability: of the GPU here, "8.7".
        device: name of the GPU here.
    """
    here = f"{platform.system().lower()}-{platform.machine()}"
    theirs, ours = _release(built.tensorrt), _release(tensorrt)
    same_version = theirs[:1] == ours[:1] and ours >= theirs if built.version_compatible else theirs == ours
    same_gpu = built.compute_capability == compute_capability or (
        built.hardware_compatibility == "ampere+" and float(compute_capability) >= 8.0
    )
    if same_version and same_gpu and built.platform == here:
        return
    raise UserError(
        f"the engine was built with TensorRT {built.tensorrt} for {built.device} (compute capability "
        f"{built.compute_capability}) on {built.platform}; this is TensorRT {tensorrt} with {device} "
        f"({compute_capability}) on {here}",
        hint=REBUILD,
    )


def _release(version: str) -> tuple[int, ...]:
    """(10, 3, 0) of "10.3.0.26": engines are bound to the release, not to its build number."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
