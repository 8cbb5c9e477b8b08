"""Export: a Hugging Face checkpoint becomes ONNX graphs, a manifest and a recorded torch reference.

    read_model           config, tensor names and shapes, tokenizer, processor   -> manifest.Model   (headers only)
    build_decoder        the paper's decoder with a fixed schedule                -> torch module     (decoder.py)
    trace                one graph for all phases, ops of our own domain          -> decoder.onnx, vision.onnx
    record               a fixed scenario driven through torch                    -> reference.npz
    write                tokenizer, chat template, manifest with hashes           -> reroute.json

Weights stay in the checkpoint and are read one at a time (`weights`, `initializers`): memory follows from the largest
layer, not from the model.

The folder is written whole or not at all. Nothing in it depends on the machine, the time or the path: two exports of
one checkpoint are equal byte for byte.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import reroute
from reroute import cost, scenario
from reroute.errors import UserError
from reroute.export.checkpoint import Checkpoint, read_json
from reroute.folders import check_output, whole_folder
from reroute.manifest import Capacity, Grid, Manifest, Model, file_table
from reroute.routing import RoutingSpec
from reroute.schedule import Schedule
from reroute.tiers import parse_tiers, resolve_tiers, tier_of, traced_schedule

CHAT_TEMPLATE = "chat_template.jinja"
REFERENCE_TOKENS = 64
_VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "numpy")
Progress = Callable[[str], None]


def read_model(checkpoint: Path, grids: Sequence[Grid] = ()) -> Model:
    """Describe the model of a checkpoint directory from its headers.

    Args:
        checkpoint: Hugging Face directory.
        grids: of a tower of variable shape, the ones to export it for; empty for the usual ones.

    Raises:
        UserError: not a checkpoint that we support, or grids that it cannot have.
    """
    from reroute.export.models import family_of

    opened = Checkpoint.open(checkpoint)
    return _choose(family_of(opened).read(opened), grids)


def _choose(model: Model, grids: Sequence[Grid]) -> Model:
    from reroute.export.grids import with_grids

    return with_grids(model, grids) if grids else model


def resolve(routing: str, model: Model) -> Schedule:
    """The schedule that a routing spec means for a model. Raises UserError."""
    return cost.resolve(RoutingSpec.parse(routing), model)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    routing: str,
    tiers: Sequence[str] = (),
    capacity: Capacity | None = None,
    grids: Sequence[Grid] = (),
    reference_tokens: int = REFERENCE_TOKENS,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Export a checkpoint directory to `output`.

    Args:
        checkpoint: Hugging Face directory with config.json, *.safetensors, tokenizer.json and processor files.
        output: folder to write; appears whole.
        routing: a routing spec, see `reroute.routing`.
        tiers: further budgets that the bundle shall have, see `reroute.tiers`; `routing` is then the default one.
        capacity: sizes of a session.
        grids: see `read_model`.
        reference_tokens: greedy tokens of the recorded reference; fewer where the capacity has less room. Of a model
            that does not stay in memory each reads the whole checkpoint.
        force: replace an earlier export.
        progress: is told what happens next.

    Raises:
        UserError: anything that the user can mend, before anything is written.
    """
    from reroute.export import reference, trace
    from reroute.export.models import family_of

    tell = progress or (lambda _: None)
    capacity = capacity or Capacity()
    check_output(output, force=force)
    opened = Checkpoint.open(checkpoint)
    family = family_of(opened)
    model = _choose(family.read(opened), grids)
    table = resolve_tiers(parse_tiers(routing, tiers), model, capacity)
    own = next(iter(table.values()), None) or tier_of(RoutingSpec.parse(routing), model, capacity)
    schedule = own.schedule
    check_capacity(capacity, model)
    template = chat_template(opened)
    with whole_folder(output, force=force) as folder:
        decoder = family.build_decoder(opened, model, traced_schedule(table) if table else schedule)
        tower = family.build_vision(opened, model, schedule)
        tell("tracing the decoder")
        graph = trace.trace_decoder(decoder)
        inputs, outputs = trace.decoder_inputs(decoder), trace.decoder_outputs(decoder)
        parts = {"decoder": trace.save(graph, folder, "decoder", inputs, outputs)}
        tell("tracing the vision tower")
        parts |= trace.save_vision(tower, model, schedule, folder)
        tokens = min(reference_tokens, capacity.max_text - scenario.text_tokens(0))
        probe = scenario.probe(model, num_tokens=tokens)
        for name, tier in (table or {"": own}).items():
            tell("recording the torch reference" + (f" of the tier {name}" if name else ""))
            decoder.schedule = tier.schedule
            scenario.save(folder / tier.reference, reference.record(decoder, tower, model, probe))
        shutil.copyfile(opened.folder / "tokenizer.json", folder / "tokenizer.json")
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        tell("hashing checkpoint and files")
        manifest = Manifest(
            kind="export",
            backend="neutral",
            dtype="float32",
            model=model,
            checkpoint_sha256=opened.sha256,
            routing=own.routing,
            schedule=schedule,
            average_visual_tokens=own.average_visual_tokens,
            capacity=capacity,
            cache_rows=own.cache_rows,
            parts=parts,
            files=file_table(folder),
            estimates=own.estimates,
            versions=versions(),
            tier=next(iter(table), ""),
            tiers=table,
        )
        manifest.save(folder)
    return manifest


def check_capacity(capacity: Capacity, model: Model) -> None:
    """Refuse a session that cannot hold the shortest reference, or that the model's positions cannot hold.

    Raises:
        UserError: one of the two.
    """
    least = scenario.text_tokens(1)
    if capacity.max_text < least or capacity.max_images < 1:
        raise UserError(
            f"{capacity.max_text} text tokens and {capacity.max_images} images are too few to check an engine with: "
            f"the shortest reference takes {least} and 1",
            hint=f"use --max-text {least} or more and --max-images 1 or more",
        )
    rows = capacity.max_text + capacity.max_images * model.vision.tokens_per_image
    limit = model.text.max_position_embeddings
    if rows > limit:
        raise UserError(
            f"{capacity.max_text} text tokens and {capacity.max_images} images of {model.vision.tokens_per_image} "
            f"visual tokens are {rows} positions; the model has {limit}",
            hint="lower --max-text or --max-images",
        )


def chat_template(checkpoint: Checkpoint) -> str:
    """The template, from wherever this generation of checkpoints keeps it. Raises UserError."""
    path = checkpoint.folder / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(checkpoint.folder, name).get("chat_template")
        if isinstance(template, str):
            return template
    raise UserError(
        f"{checkpoint.folder} holds no chat template", hint=f"copy {CHAT_TEMPLATE} or chat_template.json too"
    )


def versions() -> dict[str, str]:
    """Versions of everything that shaped the files."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"reroute": reroute.__version__, "python": platform.python_version(), **found}
