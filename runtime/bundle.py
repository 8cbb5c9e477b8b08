"""An engine bundle on disk: checked before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reroute.errors import UserError
from reroute.manifest import Manifest
from reroute.runtime.chat import Chat
from reroute.scenario import FILE_NAME as REFERENCE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder and its manifest.

    Attributes:
        path: the folder.
        manifest: what `reroute.json` says; of a bundle with tiers in one of them.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read the manifest of `path` and compare size and sha256 of every file with it.

        Args:
            path: the bundle's folder.
            verify: False skips the hashes (files are then trusted as they are).

        Raises:
            UserError: not a folder, not a bundle, of another schema version, incomplete or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}",
                hint="give the bundle that `reroute build` made",
            )
        manifest = Manifest.load(folder)
        if manifest.kind == "lowered":
            raise UserError(
                f"{folder} holds graphs for TensorRT, no engine yet",
                hint=f"build it on the device that will run it: python3 {folder}/build_engine.py {folder}",
            )
        if manifest.kind != "bundle":
            raise UserError(
                f"{folder} is an {manifest.kind}, not an engine bundle",
                hint=f"lower it for a backend first: `reroute build {folder}`",
            )
        bundle = cls(path=folder, manifest=manifest)
        for name in ("decoder", *manifest.model.vision_parts):
            bundle.part(name)
        if verify:
            manifest.verify_files(folder)
        return bundle

    def at(self, tier: str | None) -> Bundle:
        """The bundle in another of its tiers; None for the one that it is in. Raises UserError for an unknown one."""
        return replace(self, manifest=self.manifest.at(tier))

    def part(self, name: str) -> Path:
        """Path of the graph or engine called `name` ("decoder", or see `Model.vision_part`). Raises UserError."""
        part = self.manifest.parts.get(name)
        if part is None:
            raise UserError(f"{self.path} has no part {name!r}", hint="build the bundle again")
        # A part outside the file table has no hash and could even point outside the folder.
        return self._listed(part.file)

    @property
    def kernels(self) -> Path | None:
        """The library that the decoder's operators come from, if it has one. Raises UserError."""
        return self._listed(self.manifest.kernels) if self.manifest.kernels else None

    @property
    def vision_sha256(self) -> str:
        """Of the vision graph and its weights: bundles that share it make the same features of an image."""
        return self._hash(name for name in self.manifest.files if self._is_vision(name))

    @property
    def decoder_sha256(self) -> str:
        """Of the decoder, its weights and its schedule: whatever is neither vision, nor text, nor recorded reference.

        Bundles that share it make the same cache rows of the same tokens.
        """
        others = (TOKENIZER, CHAT_TEMPLATE, REFERENCE)
        own = (name for name in self.manifest.files if name not in others and not self._is_vision(name))
        schedule = json.dumps(asdict(self.manifest.schedule), sort_keys=True)
        return hashlib.sha256(f"{self._hash(own)}\n{schedule}".encode()).hexdigest()

    def _is_vision(self, name: str) -> bool:
        parts = [self.manifest.parts[part].file for part in self.manifest.model.vision_parts]
        return name.startswith((*parts, "vision.onnx.data"))

    def _hash(self, names: Iterable[str]) -> str:
        lines = [f"{name}={self.manifest.files[name].sha256}" for name in names]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, with truncation and padding off. Raises UserError."""
        from tokenizers import Tokenizer

        path = self._listed(TOKENIZER)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"cannot read {path}: {error}", hint="build the bundle again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def chat(self) -> Chat:
        """The checkpoint's chat template with its tokenizer. Raises UserError."""
        path = self._listed(CHAT_TEMPLATE)
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}", hint="build the bundle again") from error
        return Chat(template, self.tokenizer(), self.manifest.model.tokens)

    def _listed(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise UserError(f"the manifest of {self.path} does not list {name}", hint="build the bundle again")
        return self.path / name
