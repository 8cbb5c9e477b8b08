"""The manifest `reroute.json`: the one thing that export, engines and runtime all know.

Plain frozen dataclasses and JSON, no dependency. Unknown keys are refused with the nearest match, so that a
bundle written by a newer version fails clearly instead of half-working.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reroute.errors import UserError, nearest
from reroute.schedule import Schedule

SCHEMA_VERSION = 3
FILE_NAME = "reroute.json"


Grid = tuple[int, int]  # rows and columns of visual tokens


@dataclass(frozen=True, kw_only=True)
class MRope:
    """Rotary embedding of three positions: time, row and column (M-RoPE, arXiv 2409.12191).

    `sections` says how many of the head_dim / 2 frequencies turn with each of them: one block after the other, or,
    where `interleaved` (Qwen3-VL), in turn from the highest frequency on, and what is left over with time.
    """

    sections: tuple[int, int, int]
    interleaved: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """For each frequency, the position that it turns with: 0 time, 1 row, 2 column."""
        if not self.interleaved:
            return tuple(axis for axis, length in enumerate(self.sections) for _ in range(length))
        axes = [0] * sum(self.sections)
        for axis in (1, 2):
            for index in range(axis, 3 * self.sections[axis], 3):
                axes[index] = axis
        return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """Shape of the decoder. `head_dim`, `hidden_size` and so on are the Hugging Face config's.

    Attributes:
        mrope: how three positions share the frequencies; None for plain rotary embeddings of one position.
        qk_norm: whether queries and keys are normed for each head.
        deepstack: early layers after which features of the tower are added to the visual rows (arXiv 2406.04334).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    mrope: MRope | None = None
    qk_norm: bool = False
    deepstack: int = 0


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """What the runtime must know of the tower: one image gives `tokens_per_image` visual tokens.

    `grid` is (rows, columns) of visual tokens, row-major from the top left; `num_layers` counts the layers
    run, `depth` those that the tower has.

    Attributes:
        grids: of a tower that takes images of several shapes, the ones it was exported for: one graph each. `grid` and
            `tokens_per_image` are then those of the first, which has the most tokens, and `image_size` is its longer
            side. Empty for a tower of one shape.
        merge: patches a side that become one visual token.
        window: visual tokens a side of an attention window; 0: all patches attend to each other.
        full_layers: of a tower with windows, the layers without.
        class_token: whether a class token runs with the patches.
        gated_mlp: three matrices instead of two.
        mergers: two-layer maps from `merge` x `merge` patches to the decoder's width; 0: LLaVA's projector.
    """

    image_size: int
    patch_size: int
    grid: tuple[int, int]
    tokens_per_image: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    depth: int
    grids: tuple[Grid, ...] = ()
    merge: int = 1
    window: int = 0
    full_layers: int = 0
    class_token: bool = True
    gated_mlp: bool = False
    mergers: int = 0

    @property
    def all_grids(self) -> tuple[Grid, ...]:
        """Every grid that an image can have."""
        return self.grids or (self.grid,)


@dataclass(frozen=True, kw_only=True)
class ImageProcessing:
    """Constants of the checkpoint's image processor (CLIP): resize the shortest edge, centre crop, rescale,
    normalise. `resample` is Pillow's number (3 = bicubic).
    """

    shortest_edge: int
    crop_height: int
    crop_width: int
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class GridProcessing:
    """Constants of an image processor that keeps an image's shape (Qwen-VL): resize to whole visual tokens of `cell` x
    `cell` pixels, between `min_pixels` and `max_pixels`, rescale, normalise. The runtime resizes to the nearest of the
    grids that the tower was exported for.
    """

    cell: int
    min_pixels: int
    max_pixels: int
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Special tokens. `image_token` is the placeholder that the chat template writes once for each image."""

    image_token: str
    image_token_id: int
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]


# How a model writes boxes. shares: of the image's sides, as four decimals or hundredths; pixels: of the resized image;
# thousandths: of its sides.
Boxes = Literal["shares", "pixels", "thousandths"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's description, everything that does not depend on the routing."""

    model_type: str
    text: TextModel
    vision: VisionModel
    image: ImageProcessing | GridProcessing
    tokens: Tokens
    num_parameters: dict[str, int]
    boxes: Boxes = "shares"

    def pixels(self, grid: Grid) -> tuple[int, int]:
        """(height, width) of the pixel values of an image with `grid` visual tokens."""
        if isinstance(self.image, ImageProcessing):
            return self.image.crop_height, self.image.crop_width
        return grid[0] * self.image.cell, grid[1] * self.image.cell

    def grid_of(self, height: int, width: int) -> Grid:
        """The grid of pixel values of this size. Raises KeyError for a size without one."""
        return {self.pixels(grid): grid for grid in self.vision.all_grids}[height, width]

    def vision_part(self, grid: Grid) -> str:
        """Name of the part that encodes images of `grid`: `vision`, or one for each grid."""
        return f"vision.{grid[0]}x{grid[1]}" if self.vision.grids else "vision"

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """The parts of all grids."""
        return tuple(self.vision_part(grid) for grid in self.vision.all_grids)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Fixed sizes of a session: text tokens (prompts and answers of the whole dialogue) and images in it."""

    max_text: int = 512
    max_images: int = 2

    def cache_rows(self, schedule: Schedule, tokens_per_image: int) -> tuple[int, ...]:
        """Rows of the KV cache of each stage: `max_text` plus the visual rows that `max_images` can add."""
        entering = schedule.entering(tokens_per_image)
        rows = [self.max_images * stage.visual_rows(entering) for stage in schedule.stages]
        if schedule.pool == "all":
            # The share of several images together can be a token more for each than their shares one by one.
            rows = [
                count + (self.max_images - 1) * (stage.share is not None)
                for count, stage in zip(rows, schedule.stages, strict=True)
            ]
        return tuple(self.max_text + count for count in rows)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output of a graph; a str in `shape` is a dynamic dimension's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph or engine of the bundle and its I/O table."""

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class File:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """Shapes of one input that an engine's optimisation profile allows, and the one that it is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What TensorRT graphs were lowered for: all that the build on the device needs besides the graphs.

    Attributes:
        target: name in `reroute.engines.targets`.
        dialect: bodies of the graphs.
        form: "native": standard operators only; "plugin": nodes of the C++ plugin are left.
        tensorrt_min: lowest TensorRT version whose rules the graphs pass, "10.3".
        plugin_nodes: nodes of each plugin op in the decoder; empty for "native".
        profiles: for each part its optimisation profiles in order, with the span of every dynamic input.
    """

    target: str
    dialect: str
    form: Literal["native", "plugin"]
    tensorrt_min: str
    plugin_nodes: dict[str, int]
    profiles: dict[str, dict[str, dict[str, Span]]]


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """Where and with what a TensorRT engine was built: it runs nowhere else, so the runtime compares before loading.

    Attributes:
        tensorrt: full version of the builder.
        compute_capability: of the GPU, "8.7".
        device: name of the GPU.
        platform: operating system and machine, "linux-aarch64".
        hardware_compatibility: "none", or the level that lets other GPUs load the engine.
        version_compatible: whether later TensorRT versions of the same major may load the engine.
        plugin_file: the plugin library in the bundle; empty without one.
        plugin_layers: plugin layers counted in the built decoder.
        device_memory_bytes: scratch memory of each part's engine.
    """

    tensorrt: str
    compute_capability: str
    device: str
    platform: str
    hardware_compatibility: str
    version_compatible: bool
    plugin_file: str
    plugin_layers: int
    device_memory_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One of several budgets that a bundle runs with the same weights (see `reroute.tiers`).

    Attributes:
        routing: the spec as the user wrote it.
        schedule: the spec resolved to stages; tiers differ in their budgets alone. `dense` has the others' decisions,
            which then keep everything.
        average_visual_tokens: measured from the schedule for one image, per layer.
        cache_rows: of each stage.
        estimates: bytes and FLOPs of the plan.
        reference: file of the recorded reference.
    """

    routing: str
    schedule: Schedule
    average_visual_tokens: float
    cache_rows: tuple[int, ...]
    estimates: dict[str, float]
    reference: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a stage needs to know of the one before it.

    With `tiers`, the fields that follow from a schedule are those of one of them, `tier`: in the file of the default,
    and `at` gives the manifest of another. So whatever reads a manifest serves every tier.

    Attributes:
        schema_version: raised when a reader of the older form would go wrong.
        kind: "export" (neutral graphs), "lowered" (TensorRT graphs, still to be built on the device) or "bundle".
        backend: "neutral", "ort" or "tensorrt".
        dtype: dtype that the graphs compute in, of visual embeddings and caches. The weights of an export may be
            stored in 16 bits, as its checkpoint has them.
        profile: what the decoder's weights are stored as, "fp32", "int8" or "int4:1" (see `reroute.engines.profiles`).
        kernels: file of the library that the decoder's operators come from; empty where they are ONNX Runtime's own.
        checkpoint_sha256: fingerprint of the exported checkpoint's config and weights.
        routing: the spec as the user wrote it.
        schedule: the spec resolved to stages.
        average_visual_tokens: measured from the schedule for one image, per layer.
        capacity: fixed sizes of a session; `cache_rows` follows from it.
        parts: "decoder" and "vision", or one "vision.RxC" for each grid (`Model.vision_part`).
        files: every file of the folder but the manifest, by relative name.
        estimates: bytes and FLOPs of the plan (see `reroute.cost`).
        versions: of everything that wrote or lowered the graphs.
        check: result of the last check, or None.
        lowering: of TensorRT graphs; None for other backends.
        engine: of built TensorRT engines; None for other backends.
        tier: name of the tier that `routing`, `schedule`, `average_visual_tokens`, `cache_rows` and `estimates` are of;
            empty without tiers.
        tiers: the budgets of a bundle that has several, by name, the default first.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["export", "lowered", "bundle"]
    backend: str
    dtype: str
    model: Model
    checkpoint_sha256: str
    routing: str
    schedule: Schedule
    average_visual_tokens: float
    capacity: Capacity
    cache_rows: tuple[int, ...]
    parts: dict[str, Part]
    files: dict[str, File]
    estimates: dict[str, float]
    versions: dict[str, str]
    check: dict[str, Any] | None = field(default=None)
    profile: str = "fp32"
    kernels: str = ""
    lowering: Lowering | None = None
    engine: EngineBuild | None = None
    tier: str = ""
    tiers: dict[str, Tier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tiers and not self.tier:
            return
        if self.tier not in self.tiers:
            raise ValueError(f"the tier {self.tier!r} is none of {', '.join(self.tiers) or 'no tiers'}")
        if any(getattr(self, name) != value for name, value in _of_tier(self.tiers[self.tier]).items()):
            raise ValueError(f"the schedule and its figures are not those of the tier {self.tier!r}")
        if len({budget_free(tier.schedule) for tier in self.tiers.values()}) > 1:
            raise ValueError("tiers differ in more than their budgets")

    def at(self, tier: str | None) -> Manifest:
        """The manifest of one tier; None is the tier that it is of. Raises UserError for a name that is no tier."""
        if tier is None or tier == self.tier != "":
            return self
        if not self.tiers:
            raise UserError(
                f"there is no tier {tier!r}: {self.routing} is all that was exported",
                hint="export with --tier SPEC for several budgets in one bundle",
            )
        if tier not in self.tiers:
            raise UserError(f"unknown tier {tier!r}", hint=nearest(tier, self.tiers))
        return dataclasses.replace(self, tier=tier, **_of_tier(self.tiers[tier]))

    @property
    def all_tiers(self) -> tuple[Manifest, ...]:
        """The manifest of each tier, the default first; of a bundle without tiers its own alone."""
        return tuple(self.at(name) for name in self.tiers) or (self,)

    def to_json(self) -> str:
        """Canonical JSON text: two manifests of equal content are equal byte for byte."""
        data = dataclasses.asdict(self)
        # Equal dicts can differ in order; fields keep the order of their class, which is the one to read.
        for name in ("parts", "files", "estimates", "versions"):
            data[name] = dict(sorted(data[name].items()))
        data["model"]["num_parameters"] = dict(sorted(data["model"]["num_parameters"].items()))
        for tier in data["tiers"].values():  # their own order says which is the default
            tier["estimates"] = dict(sorted(tier["estimates"].items()))
        # Left out where they say nothing, so that readers from before TensorRT, or tiers, still take other bundles.
        data = {name: value for name, value in data.items() if value is not None or name == "check"}
        if not self.tiers:
            del data["tier"], data["tiers"]
        if not self.kernels:
            del data["kernels"]
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write `reroute.json` into `folder`."""
        (folder / FILE_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and validate `folder/reroute.json`. Raises UserError; does not hash the files."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {FILE_NAME}: it is not a Reroute export or bundle",
                hint="make one with `reroute export CHECKPOINT -o DIR` and `reroute build DIR`",
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}", hint="build the bundle again") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this Reroute reads version {SCHEMA_VERSION}",
                hint="build the bundle again with the installed version",
            )
        manifest = decode(cls, data, where=FILE_NAME)
        for name in (*manifest.files, *(part.file for part in manifest.parts.values())):
            # Names are joined to folders, to read and, in a build, to write.
            if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
                raise UserError(f"{path} names a file outside its folder: {name}", hint="do not use this folder")
        return manifest

    def verify_files(self, folder: Path) -> None:
        """Compare size and sha256 of every listed file with the manifest. Raises UserError."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{folder} lacks {name}", hint="the bundle is incomplete: build it again")
            size = path.stat().st_size
            if size != expected.bytes:
                raise UserError(
                    f"{name} has {size} bytes, the manifest says {expected.bytes}",
                    hint="the file was changed or cut short after the build: build the bundle again",
                )
            digest = sha256_of(path)
            if digest != expected.sha256:
                raise UserError(
                    f"{name} has sha256 {digest[:12]}..., the manifest says {expected.sha256[:12]}...",
                    hint="the file was changed after the build: build the bundle again",
                )


def _of_tier(tier: Tier) -> dict[str, Any]:
    """The fields of a manifest that are a tier's."""
    names = ("routing", "schedule", "average_visual_tokens", "cache_rows", "estimates")
    return {name: getattr(tier, name) for name in names}


def budget_free(schedule: Schedule) -> Schedule:
    """The schedule with every budget 1: equal for schedules that one graph can run."""
    stages = [dataclasses.replace(stage, keep=stage.keep and 1, share=None) for stage in schedule.stages]
    return dataclasses.replace(schedule, stages=tuple(stages))


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    # hashlib.file_digest is new in Python 3.11; JetPack 6 has 3.10.
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_table(folder: Path) -> dict[str, File]:
    """Hash every file below `folder` except the manifest itself, sorted by name."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / FILE_NAME)
    return {p.relative_to(folder).as_posix(): File(bytes=p.stat().st_size, sha256=sha256_of(p)) for p in paths}


def decode(kind: Any, data: Any, *, where: str) -> Any:
    """Rebuild a (nested) dataclass from JSON data; unknown or missing keys and wrong types are refused."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        # Each member in turn: isinstance() with a union of generics is an error on Python 3.10.
        if data is None and type(None) in args:
            return None
        members = [member for member in args if member is not type(None)]
        if isinstance(data, dict) and all(map(dataclasses.is_dataclass, members)):
            # Last the one that is meant, by its keys: its message is the one to show.
            members.sort(key=lambda member: len(data.keys() & {f.name for f in dataclasses.fields(member)}))
        for member in members[:-1]:
            with contextlib.suppress(UserError):
                return decode(member, data, where=where)
        return decode(members[-1], data, where=where)
    if origin is tuple and isinstance(data, list):
        kinds = [args[0]] * len(data) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(data):
            pairs = zip(kinds, data, strict=True)
            return tuple(decode(k, d, where=f"{where}[{i}]") for i, (k, d) in enumerate(pairs))
    elif origin is dict and isinstance(data, dict):
        return {key: decode(args[1], value, where=f"{where}.{key}") for key, value in data.items()}
    elif origin is Literal and data in args:
        return data
    elif kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    elif origin is None and isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
        return data
    name = kind.__name__ if origin is None else str(kind)
    raise UserError(f"{where} is {_short(data)}, expected {name}", hint="build it again")


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where} is {_short(data)}, expected an object", hint="build it again")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    for key in data:
        if key not in names:
            raise UserError(f"{where} has an unknown key {key!r}", hint=nearest(key, names))
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - data.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}", hint="build it again")
    values = {key: decode(hints[key], value, where=f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where} is not consistent: {error}", hint="build it again") from error


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
