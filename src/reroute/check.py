"""`reroute check`: an engine against the torch reference, part by part, through Polygraphy's comparators.

The reference is the one recorded at export (no torch needed, so it runs on a Jetson too), or, given the checkpoint, a
fresh run of torch on any image and prompt. The engine is driven through the same scenario (`reroute.scenario`) by the
runtime's own backend, so what is checked is what answers.

Gates (fp32): vision features, every layer's cache and the logits within 1e-4 of the reference and cosine >= 0.9999;
slots identical, except where scores tie within 1e-5 at the cut-off; all greedy tokens identical, except where the
engine's own two best logits tie within 1e-5. In fp16 differences are gated by the cosine alone, and what counts as a
tie is what fp16 cannot tell apart. Of a quantised profile a share of slots and tokens must be the reference's, and
caches are compared in the rows of slots that both ran. See `reroute.gates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reroute import scenario as scenarios
from reroute.errors import UserError
from reroute.manifest import Manifest
from reroute.parity import CheckRow, compare
from reroute.runtime.backend import Backend, BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, StepInputs, lay_out
from reroute.runtime.positions import Positions, VisualTokens
from reroute.scenario import Arrays, Scenario
from reroute.tiers import reference_of


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All gates of one check.

    Attributes:
        reference: "recorded at export" or "torch, live".
        rows: the gates, in the order of the data flow.
        fidelity: of a quantised engine that was asked questions, how it compares with float32.
    """

    reference: str
    rows: tuple[CheckRow, ...]
    fidelity: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the manifest."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "rows": [row.to_dict() for row in self.rows],
            **({"fidelity": self.fidelity} if self.fidelity else {}),
        }


def check_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    tokens: int = 64,
    tier: str | None = None,
    options: BackendOptions | None = None,
) -> CheckReport:
    """Compare a bundle with its torch reference, in every tier that it has.

    Args:
        bundle: the engine bundle.
        checkpoint: run torch on this checkpoint now, instead of reading the recorded reference.
        image: with `checkpoint`, the image to use instead of the probe's.
        prompt: with `checkpoint`, the question to use instead of the probe's words.
        tokens: with `checkpoint`, greedy tokens to compare.
        tier: compare this tier alone.
        options: how to run the bundle.

    Raises:
        UserError: not a bundle, or a checkpoint that is not the bundle's.
    """
    opened = Bundle.open(bundle)
    manifests = (opened.manifest.at(tier),) if tier is not None else opened.manifest.all_tiers
    if checkpoint is None:
        if image is not None or prompt is not None:
            raise UserError(
                "an image or a prompt of your own needs the reference to run",
                hint="add --checkpoint DIR with the checkpoint that the bundle was exported from",
            )
        opened.chat()  # a bundle whose tokenizer or template cannot be read would answer nothing
        references: Iterable[Arrays] = (scenarios.load(opened.path / reference_of(manifest)) for manifest in manifests)
        kind = "recorded at export"
    else:
        references = live_references(opened, manifests, checkpoint, image=image, prompt=prompt, tokens=tokens)
        kind = "torch, live"
    backend: Backend | None = None  # opened when the first reference is there
    rows: list[CheckRow] = []
    for manifest, expected in zip(manifests, references, strict=True):
        backend = backend or open_backend(opened, options)
        if manifest.tiers:
            backend.use(manifest.tier)
        found = compare(manifest, expected, replay(backend, manifest, expected))
        rows += [replace(row, tier=manifest.tier) for row in found]
    return CheckReport(reference=kind, rows=tuple(rows))


def live_references(
    bundle: Bundle,
    manifests: Sequence[Manifest],
    checkpoint: Path,
    *,
    image: Path | None,
    prompt: str | None,
    tokens: int,
) -> list[Arrays]:
    """Run the torch reference of each tier on the checkpoint that the bundle came from; its weights are read once.

    Raises:
        UserError: another checkpoint, or a scenario that does not fit.
    """
    from reroute.export.checkpoint import Checkpoint
    from reroute.export.models import family_of
    from reroute.export.reference import record

    opened = Checkpoint.open(checkpoint)
    model, expected = bundle.manifest.model, bundle.manifest.checkpoint_sha256
    if opened.sha256 != expected:
        raise UserError(
            f"{checkpoint} is not the checkpoint of this bundle: its fingerprint is {opened.sha256[:12]}..., the "
            f"bundle's {expected[:12]}...",
            hint="give the checkpoint that was exported, or export this one",
        )
    inputs = scenario_of(bundle, image=image, prompt=prompt, tokens=tokens)
    family = family_of(opened)
    decoder = family.build_decoder(opened, model, bundle.manifest.schedule)
    tower = family.build_vision(opened, model, bundle.manifest.schedule)
    references: list[Arrays] = []
    for manifest in manifests:
        decoder.schedule = manifest.schedule
        references.append(record(decoder, tower, model, inputs))
    return references


def scenario_of(bundle: Bundle, *, image: Path | None, prompt: str | None, tokens: int) -> Scenario:
    """The probe, with the user's own image and prompt in its place where given. Raises UserError."""
    from reroute.runtime.chat import user_message
    from reroute.runtime.image import grid_of, open_image, preprocess

    model = bundle.manifest.model
    probe = scenarios.probe(model, num_tokens=tokens)
    pixels, ids = probe.pixel_values, probe.prompt_ids
    if image is not None:
        opened = open_image(image)
        pixels = preprocess(opened, model.image, grid_of(opened, model))[None]
    if prompt is not None:
        if not prompt.strip():
            raise UserError("the prompt is empty", hint="leave --prompt away to use the recorded words")
        ids = np.asarray(bundle.chat().first_turn([user_message(prompt, num_images=1)]), dtype=np.int64)
    inputs = Scenario(pixel_values=pixels, prompt_ids=ids, turn_ids=probe.turn_ids, num_tokens=tokens)
    check_fits(inputs, bundle.manifest)
    return inputs


def check_fits(inputs: Scenario, manifest: Manifest) -> Layout:
    """The layout of a scenario's prompt.

    Raises:
        UserError: the scenario is longer than the bundle's sessions, or has not one image.
    """
    tokens, model = manifest.model.tokens, manifest.model
    rows, columns = model.grid_of(*inputs.pixel_values.shape[2:])
    made = rows * columns if model.vision.grids else model.vision.tokens_per_image
    layout = lay_out(
        inputs.prompt_ids.tolist(),
        image_token=tokens.image_token,
        image_token_id=tokens.image_token_id,
        num_images=1,
        tokens_per_image=manifest.schedule.entering(made),
    )
    # The last token of the answer is run with the later turn.
    needed = layout.num_text + inputs.num_tokens + len(inputs.turn_ids)
    if needed > manifest.capacity.max_text:
        raise UserError(
            f"the scenario has {needed} text tokens, the bundle's capacity is {manifest.capacity.max_text}",
            hint="export with a larger --max-text, or check fewer --tokens",
        )
    return layout


def replay(backend: Backend, manifest: Manifest, expected: Arrays) -> Arrays:
    """Drive an engine through the scenario of a reference; arrays by the same names."""
    inputs = Scenario.from_arrays(expected)
    model = manifest.model
    prompt = check_fits(inputs, manifest)
    positions = Positions(manifest)
    backend.reset()
    visual = backend.encode(inputs.pixel_values)
    measured = _features(visual)
    for (rows, columns), pixel_values in inputs.other_pixels.items():
        other = _features(backend.encode(pixel_values))
        measured |= {f"{rows}x{columns}.{name}": array for name, array in other.items()}
    shift = positions.shift(visual)

    def text(ids: Sequence[int]) -> StepInputs:
        return positions.inputs(Layout.of_text(ids), None, backend.lengths, shift=shift)

    # The engine's own vision features go in, so that the whole chain is what is compared.
    outputs = backend.step(positions.inputs(prompt, visual, backend.lengths))
    measured["prompt.logits"] = outputs.logits.copy()
    measured |= {f"routes.{stage}": route for stage, route in enumerate(outputs.routes, start=1)}
    tokens, margins = [int(outputs.logits.argmax())], [_margin(outputs.logits)]
    for forced in expected["tokens"][:-1].tolist():
        outputs = backend.step(text([forced]))
        tokens.append(int(outputs.logits.argmax()))
        margins.append(_margin(outputs.logits))
    measured["tokens"], measured["margins"] = np.asarray(tokens, dtype=np.int64), np.asarray(margins)
    turn = [int(expected["tokens"][-1]), *inputs.turn_ids.tolist()]
    measured["turn.logits"] = backend.step(text(turn)).logits.copy()
    for layer in range(model.text.num_layers):
        key, value = backend.cache(layer)
        measured[f"cache.{layer}.key"], measured[f"cache.{layer}.value"] = np.array(key), np.array(value)
    return measured


def _features(visual: VisualTokens) -> Arrays:
    """What the vision graph made, by the reference's names."""
    made = {"embeds": visual.embeds, "places": visual.places, "deepstack": visual.deepstack}
    return {f"visual_{name}": array for name, array in made.items() if array is not None}


def _margin(logits: np.ndarray) -> float:
    """Best minus second-best logit of one row."""
    second, first = np.sort(logits.ravel())[-2:]
    return float(first - second)
