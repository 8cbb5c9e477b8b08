"""What TensorRT engines are built for: machines, and the options of a lowering. Each machine says which rules a graph
has to pass, and what memory there is at most.

Facts from NVIDIA's JetPack release notes: JetPack 6.1 and 6.2 ship TensorRT 10.3 and can never move to 11; JetPack
7.2 has 10.16, the first with kernels for Orin (sm_87) again. Compute capability, version and memory of the real
machine are read on the device before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reroute.errors import UserError, nearest

GIB = 2**30
Form = Literal["native", "plugin"]
FORMS = ("native", "plugin")
DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of machine.

    Attributes:
        what: for messages.
        tensorrt: lowest TensorRT version there, as (major, minor): the rules of that version decide.
        dialect: see `reroute.engines.dialects`.
        memory_bytes: of the largest machine of the kind; an engine that needs more is refused before it is built.
    """

    what: str
    tensorrt: tuple[int, int]
    dialect: str
    memory_bytes: int

    @property
    def version(self) -> str:
        """The TensorRT version as text."""
        return ".".join(map(str, self.tensorrt))


TARGETS: dict[str, Target] = {
    "orin-jp6": Target(
        what="Jetson Orin, JetPack 6.1 or 6.2", tensorrt=(10, 3), dialect="trt-jp6", memory_bytes=64 * GIB
    ),
    "orin-jp7": Target(what="Jetson Orin, JetPack 7.2", tensorrt=(10, 16), dialect="trt", memory_bytes=64 * GIB),
    "thor-jp7": Target(what="Jetson Thor, JetPack 7.2", tensorrt=(10, 16), dialect="trt", memory_bytes=128 * GIB),
    "datacenter": Target(what="a data-centre or desktop GPU", tensorrt=(10, 16), dialect="trt", memory_bytes=288 * GIB),
}


def target_named(name: str) -> Target:
    """The target called `name`. Raises UserError with the nearest one."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}", hint=nearest(name, TARGETS))
    return TARGETS[name]


@dataclass(frozen=True, kw_only=True)
class LoweringOptions:
    """What a TensorRT graph is made for.

    Attributes:
        target: name in `TARGETS`.
        form: "native": standard operators only; "plugin": nodes of the C++ plugin are left.
        dtype: of weights and caches.
        memory_bytes: of the machine; None takes the largest of the target's kind.
    """

    target: str
    form: Form = "native"
    dtype: str = "float16"
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        target_named(self.target)
        for what, value, choices in (("form", self.form, FORMS), ("dtype", self.dtype, DTYPES)):
            if value not in choices:
                raise UserError(f"unknown {what} {value!r}", hint=nearest(value, choices))
