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

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reroute import scenario as scenarios
from reroute.errors import UserError
from reroute.gates import Gates, gates_of, vision_gates
from reroute.manifest import Manifest
from reroute.runtime.backend import Backend, BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, StepInputs, lay_out
from reroute.runtime.positions import Positions, VisualTokens
from reroute.scenario import Arrays, Scenario
from reroute.tiers import reference_of


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One gate: what was compared, what was measured, what it may be at most (or at least).

    `tier` is empty for a bundle without tiers.
    """

    part: str
    quantity: str
    measured: str
    gate: str
    passed: bool
    tier: str = ""

    @property
    def where(self) -> str:
        """The part, with its tier."""
        return f"tier {self.tier}, {self.part}" if self.tier else self.part

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without a tier where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "tier" or value}


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


def compare(manifest: Manifest, expected: Arrays, measured: Arrays) -> list[CheckRow]:
    """All gates of a replay."""
    gates, vision = gates_of(manifest), vision_gates(manifest)
    floats = [name for name in ("visual_embeds", "visual_deepstack") if name in expected]
    rows = [_close("vision", "features", floats, expected, measured, vision)]
    for high, wide in manifest.model.vision.grids:
        others = [f"{high}x{wide}.{name}" for name in floats]
        if others[0] in expected:
            rows.append(_close("vision", f"features of {high} x {wide}", others, expected, measured, vision))
    for name in sorted(name for name in expected if name.endswith("visual_places")):
        rows.append(_places(name, expected[name], measured[name]))
    if gates.slots < 1.0:
        rows += _shares(manifest, expected, measured, gates)
    else:
        rows += _decisions(manifest, expected, measured, gates)
    rows.append(_close("prompt", "logits", ["prompt.logits"], expected, measured, gates))
    rows.append(_tokens(expected, measured, gates))
    rows.append(_close("later turn", "logits", ["turn.logits"], expected, measured, gates))
    return rows


def _decisions(manifest: Manifest, expected: Arrays, measured: Arrays, gates: Gates) -> list[CheckRow]:
    """Slots and caches of every stage, each slot the reference's or a tie."""
    rows: list[CheckRow] = []
    tied = False
    for stage in range(1, len(manifest.schedule.stages)):
        row, tie = _slots(stage, expected, measured, gates)
        rows.append(row)
        tied = tied or tie
    for number, quantity, names in _caches(manifest):
        part = f"stage {number}"
        if tied and number:
            # Other rows ran, rightly: their caches are not the reference's. The logits below still have to agree.
            rows.append(CheckRow(part=part, quantity=quantity, measured="tie above", gate="not compared", passed=True))
        else:
            rows.append(_close(part, quantity, names, expected, measured, gates))
    return rows


def _shares(manifest: Manifest, expected: Arrays, measured: Arrays, gates: Gates) -> list[CheckRow]:
    """The same for a quantised engine: a share of the slots, and the cache rows of those that both have."""
    rows: list[CheckRow] = []
    equal = kept = 0
    for stage in range(1, len(manifest.schedule.stages)):
        want, got = (_visual_slots(stage, arrays, expected) for arrays in (expected, measured))
        common = int(np.isin(got, want).sum())
        equal, kept = equal + common, kept + len(want)
        counts = f"{common} of {len(want)} visual ones equal"
        same = len(want) == len(got)
        rows.append(CheckRow(part=f"stage {stage}", quantity="slots", measured=counts, gate="as many", passed=same))
    if kept:
        share = equal / kept
        gate = f"of all decisions >= {gates.slots:.0%}"
        rows.append(
            CheckRow(part="stages", quantity="slots", measured=f"{share:.1%}", gate=gate, passed=share >= gates.slots)
        )
    for number, quantity, names in _caches(manifest):
        ours, theirs = measured, expected
        if number:
            own, other = (arrays[f"routes.{number}"].ravel() for arrays in (measured, expected))
            ours = {name: measured[name].take(_rows_of(own, other, measured[name].shape[2]), axis=2) for name in names}
            theirs = {
                name: expected[name].take(_rows_of(other, own, expected[name].shape[2]), axis=2) for name in names
            }
            quantity += ", common rows"
        rows.append(_close(f"stage {number}", quantity, names, theirs, ours, gates))
    return rows


def _caches(manifest: Manifest) -> Iterator[tuple[int, str, list[str]]]:
    """Every stage with layers: its number, what to call its caches, and their names."""
    for number, stage in enumerate(manifest.schedule.stages):
        if names := [f"cache.{i}.{part}" for i in range(stage.start, stage.stop) for part in ("key", "value")]:
            yield number, f"caches of layers {stage.start}-{stage.stop - 1}", names


def _visual_slots(stage: int, arrays: Arrays, expected: Arrays) -> np.ndarray:
    """The visual slots that run in a stage: what it runs of all that were ever ranked."""
    return np.intersect1d(arrays[f"routes.{stage}"], expected["candidates.1"])


def _rows_of(slots: np.ndarray, others: np.ndarray, rows: int) -> np.ndarray:
    """Cache rows, of `rows`, whose slot is in `others` as well, and those of later steps, which run everywhere."""
    return np.concatenate([np.flatnonzero(np.isin(slots, others)), np.arange(len(slots), rows)])


def _close(
    part: str, quantity: str, names: Sequence[str], expected: Arrays, measured: Arrays, gates: Gates
) -> CheckRow:
    """Gate on the largest absolute difference, over all `names`, as Polygraphy computes it, and on the cosine."""
    from polygraphy.comparator import CompareFunc, IterationResult
    from polygraphy.logger import G_LOGGER

    gate = gates.close
    wrong = [name for name in names if expected[name].shape != measured[name].shape]
    if wrong:
        shapes = f"{wrong[0]} {list(measured[wrong[0]].shape)} for {list(expected[wrong[0]].shape)}"
        return CheckRow(part=part, quantity=quantity, measured=f"shape {shapes}", gate=gate, passed=False)
    results = [
        IterationResult(OrderedDict((name, arrays[name]) for name in names), runner_name=runner)
        for arrays, runner in ((measured, "engine"), (expected, "torch"))
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        same = CompareFunc.simple(atol=gates.tolerance, rtol=0.0, check_error_stat="max")(*results)
    worst = max(float(same[name].max_absdiff) for name in names)
    cosine = min(_cosine(expected[name], measured[name]) for name in names)
    return CheckRow(
        part=part,
        quantity=quantity,
        measured=f"max abs {worst:.1e}, cosine {cosine:.6f}",
        gate=gate,
        passed=all(bool(same[name]) for name in names) and cosine >= gates.cosine,
    )


def _places(name: str, want: np.ndarray, got: np.ndarray) -> CheckRow:
    """The tokens that a vision graph lets through must be identical; `name` begins with the grid of other graphs."""
    grid = name.removesuffix("visual_places").rstrip(".")
    equal = int(np.isin(got, want).sum())
    return CheckRow(
        part="vision",
        quantity=f"places of {grid.replace('x', ' x ')}" if grid else "places",
        measured=f"{equal} of {want.size} equal",
        gate="identical",
        passed=np.array_equal(want, got),
    )


def _slots(stage: int, expected: Arrays, measured: Arrays, gates: Gates) -> tuple[CheckRow, bool]:
    """Slots of a stage must be identical; a candidate may differ only if its score ties with the cut-off."""
    want, got = (
        set(expected[f"routes.{stage}"].ravel().tolist()),
        set(measured[f"routes.{stage}"].ravel().tolist()),
    )
    different = sorted(want ^ got)
    candidates, scores = expected[f"candidates.{stage}"].ravel(), expected[f"scores.{stage}"].ravel()
    score_of = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
    kept = [score for slot, score in score_of.items() if slot in want]
    cut = min(kept) if kept else 0.0
    margin = max(gates.score_margin, gates.score_share * cut)
    tie = bool(different) and all(abs(score_of.get(slot, np.inf) - cut) <= margin for slot in different)
    row = CheckRow(
        part=f"stage {stage}",
        quantity="slots",
        measured=f"{len(want & got)} of {len(want)} equal" + (", the rest tie" if tie else ""),
        gate=gates.same_slots,
        passed=len(want) == len(got) and (not different or tie),
    )
    return row, tie


def _tokens(expected: Arrays, measured: Arrays, gates: Gates) -> CheckRow:
    """Greedy tokens, each given the reference's tokens before it."""
    equal = expected["tokens"] == measured["tokens"]
    tied = ~equal & (measured["margins"] <= gates.token_margin)
    ties = f"ties within {gates.token_margin:g}"
    return CheckRow(
        part="decode",
        quantity="greedy tokens",
        measured=f"{int(equal.sum())} of {len(equal)} equal" + (f", {int(tied.sum())} tie" if tied.any() else ""),
        gate=f"identical, {ties}" if gates.tokens == 1.0 else f">= {gates.tokens:.0%}, {ties}",
        passed=float((equal | tied).mean()) >= gates.tokens,
    )


def _margin(logits: np.ndarray) -> float:
    """Best minus second-best logit of one row."""
    second, first = np.sort(logits.ravel())[-2:]
    return float(first - second)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms else 1.0
