"""The checkpoint and the bundles of the measurements, made once and kept in a work folder.

The shape is that of `benchmarks/make_checkpoint.py small24`: 24 layers, hidden 896, 14 query and 2 key/value heads of
64, intermediate 4864, vocabulary 32000, images of 576 visual tokens; random weights. A tier is an average of visual
tokens per layer: 64, 128 and 192 of 576 are the shares 1/9, 2/9 and 1/3.

Exports and bundles are made by the commands that a user runs. An int8 or int4 engine of a *random* model need not
agree with the fp32 reference as one of a trained model does, so only fp32 builds are checked here; the gates of the
profiles belong to the trained demo model.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reroute.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / "out" / "benchmark"
TIERS: Mapping[str, str] = {"64": "1/9", "128": "2/9", "192": "1/3"}
DENSE = "dense"
METHOD = "reroute-pdrop"
WITH_KERNELS = "+kernels"  # behind a profile: built with `reroute build --kernels`
PROFILES = ("fp32", "int8", "int4", f"int8{WITH_KERNELS}", f"int4{WITH_KERNELS}")
KERNELS = REPOSITORY / "out" / "plugins" / "cpu" / "libreroute_onnxruntime.so"


def bits_of(profile: str) -> str:
    """The profile without what follows a plus."""
    return profile.partition("+")[0]


def best_of(bits: str, profiles: Iterable[str]) -> str | None:
    """The form of a profile that is there, with kernels rather than without."""
    return next((name for name in (f"{bits}{WITH_KERNELS}", bits) if name in profiles), None)


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where things are made.

    Attributes:
        folder: work folder.
        checkpoint: of the model; made when it is the work folder's own and missing.
        method: head of the routed specs: `METHOD:avg=SHARE`, for example reroute-pdrop@2,7,15,23.
        kernels: the library of plugins_cpp/onnxruntime.
        max_text, max_images: capacity of the exports.
    """

    folder: Path = WORK
    checkpoint: Path | None = None
    method: str = METHOD
    kernels: Path = KERNELS
    max_text: int = 768
    max_images: int = 1

    def model(self) -> Path:
        """The checkpoint. Raises UserError when it is not there."""
        if self.checkpoint is not None:
            if not (self.checkpoint / "config.json").is_file():
                raise UserError(f"there is no checkpoint in {self.checkpoint}", hint="give a Hugging Face checkpoint")
            return self.checkpoint
        folder = self.folder / "small24"
        if not folder.exists():
            script = REPOSITORY / "benchmarks" / "make_checkpoint.py"
            _run(sys.executable, str(script), "small24", "-o", str(folder), "--dtype", "float32")
        return folder

    def routing(self, tier: str) -> str:
        """The spec of a tier; `dense` is one."""
        return DENSE if tier == DENSE else f"{self.method}:avg={TIERS[tier]}"

    def bundle(self, tier: str, profile: str) -> Path:
        """A bundle, made if it is not there. Raises UserError."""
        model = self.model()
        name = f"{model.name}-{self.routing(tier).replace('/', '.')}-text{self.max_text}-images{self.max_images}"
        export = self.folder / "exports" / name
        if not export.exists():
            capacity = ("--max-text", str(self.max_text), "--max-images", str(self.max_images))
            _reroute("export", str(model), "-o", str(export), "--routing", self.routing(tier), *capacity)
        bundle = self.folder / "bundles" / profile / name
        if not bundle.exists():
            options: tuple[str, ...] = () if profile == "fp32" else ("--profile", bits_of(profile), "--no-check")
            if profile.endswith(WITH_KERNELS):
                options += ("--kernels", str(self.kernels))
            _reroute("build", str(export), "-o", str(bundle), *options)
        return bundle


def _reroute(*arguments: str) -> None:
    _run(sys.executable, "-m", "reroute.cli", *arguments)


def _run(*command: str) -> None:
    """Run a command of this project; its output goes to our stderr. Raises UserError when it fails."""
    print("+", shlex.join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise UserError(
            f"`{shlex.join(command[1:])}` ended with status {done.returncode}", hint="its own words are above"
        )
