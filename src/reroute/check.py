"""`reroute check`: an engine against the torch reference, part by part, through Polygraphy's comparators.

The reference is the one recorded at export (no torch needed, so it runs on a Jetson too), or, given the checkpoint, a
fresh run of torch on any image and prompt. The engine is driven through the same scenario (`reroute.scenario`) by the
runtime's own backend, so what is checked is what answers.

Gates (fp32): vision features, every layer's cache and the logits within 1e-4 of the reference and cosine >= 0.9999;
slots identical, except where scores tie within 1e-5 at the cut-off; all greedy tokens identical, except where the
engine's own two best logits tie within 1e-5. In fp16 differences are gated by the cosine alone, and what counts as a
tie is what fp16 cannot tell apart: see `GATES`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroute import scenario as scenarios
from reroute.errors import UserError
from reroute.manifest import Manifest
from reroute.runtime.backend import Backend, BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, StepInputs, lay_out
from reroute.runtime.positions import Positions, VisualTokens
from reroute.scenario import Arrays, Scenario

COSINE = 0.9999


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a bundle of one dtype has to meet.

    Attributes:
        tolerance: largest absolute difference of features, caches and logits; inf leaves it to the cosine.
        score_margin: scores (attention probabilities) this near the cut-off tie.
        score_share: so do those within this share of it.
        token_margin: two best logits this near tie.
    """

    tolerance: float
    score_margin: float
    score_share: float
    token_margin: float

    @property
    def close(self) -> str:
        """The numerical gate in words."""
        return (f"<= {self.tolerance:g}, " if np.isfinite(self.tolerance) else "cosine ") + f">= {COSINE}"

    @property
    def slots(self) -> str:
        """The gate of a decision in words."""
        share = f" or {self.score_share:.0%}" if self.score_share else ""
        return f"identical, ties within {self.score_margin:g}{share}"


# fp16 has 11 bits: a score that passed through several layers is right to about 1 %, and logits between 8 and 16 come
# in steps of 0.008, of which two may be lost.
GATES = {
    "float32": Gates(tolerance=1e-4, score_margin=1e-5, score_share=0.0, token_margin=1e-5),
    "float16": Gates(tolerance=float("inf"), score_margin=1e-5, score_share=0.01, token_margin=0.02),
}


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One gate: what was compared, what was measured, what it may be at most (or at least)."""

    part: str
    quantity: str
    measured: str
    gate: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All gates of one check.

    Attributes:
        reference: "recorded at export" or "torch, live".
        rows: the gates, in the order of the data flow.
    """

    reference: str
    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the manifest."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "rows": [asdict(row) for row in self.rows],
        }


def check_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    tokens: int = 64,
    options: BackendOptions | None = None,
) -> CheckReport:
    """Compare a bundle with its torch reference.

    Args:
        bundle: the engine bundle.
        checkpoint: run torch on this checkpoint now, instead of reading the recorded reference.
        image: with `checkpoint`, the image to use instead of the probe's.
        prompt: with `checkpoint`, the question to use instead of the probe's words.
        tokens: with `checkpoint`, greedy tokens to compare.
        options: how to run the bundle.

    Raises:
        UserError: not a bundle, or a checkpoint that is not the bundle's.
    """
    opened = Bundle.open(bundle)
    if checkpoint is None:
        if image is not None or prompt is not None:
            raise UserError(
                "an image or a prompt of your own needs the reference to run",
                hint="add --checkpoint DIR with the checkpoint that the bundle was exported from",
            )
        opened.chat()  # a bundle whose tokenizer or template cannot be read would answer nothing
        expected = scenarios.load(opened.path / scenarios.FILE_NAME)
        kind = "recorded at export"
    else:
        expected = live_reference(opened, checkpoint, image=image, prompt=prompt, tokens=tokens)
        kind = "torch, live"
    backend = open_backend(opened, options)
    measured = replay(backend, opened.manifest, expected)
    return CheckReport(reference=kind, rows=tuple(compare(opened.manifest, expected, measured)))


def live_reference(bundle: Bundle, checkpoint: Path, *, image: Path | None, prompt: str | None, tokens: int) -> Arrays:
    """Run the torch reference on the checkpoint that the bundle came from. Raises UserError if it is another one."""
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
    return record(decoder, family.build_vision(opened, model, bundle.manifest.schedule), model, inputs)


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
    gates = GATES[manifest.dtype]
    floats = [name for name in ("visual_embeds", "visual_deepstack") if name in expected]
    rows = [_close("vision", "features", floats, expected, measured, gates)]
    for high, wide in manifest.model.vision.grids:
        others = [f"{high}x{wide}.{name}" for name in floats]
        if others[0] in expected:
            rows.append(_close("vision", f"features of {high} x {wide}", others, expected, measured, gates))
    if manifest.schedule.nuwa is not None:
        rows.append(_places(expected["visual_places"], measured["visual_places"]))
    tied = False
    for stage in range(1, len(manifest.schedule.stages)):
        row, tie = _slots(stage, expected, measured, gates)
        rows.append(row)
        tied = tied or tie
    for number, stage in enumerate(manifest.schedule.stages):
        names = [f"cache.{i}.{part}" for i in range(stage.start, stage.stop) for part in ("key", "value")]
        if not names:
            continue
        part, quantity = f"stage {number}", f"caches of layers {stage.start}-{stage.stop - 1}"
        if tied and number:
            # Other rows ran, rightly: their caches are not the reference's. The logits below still have to agree.
            rows.append(CheckRow(part=part, quantity=quantity, measured="tie above", gate="not compared", passed=True))
        else:
            rows.append(_close(part, quantity, names, expected, measured, gates))
    rows.append(_close("prompt", "logits", ["prompt.logits"], expected, measured, gates))
    rows.append(_tokens(expected, measured, gates))
    rows.append(_close("later turn", "logits", ["turn.logits"], expected, measured, gates))
    return rows


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
        passed=all(bool(same[name]) for name in names) and cosine >= COSINE,
    )


def _places(want: np.ndarray, got: np.ndarray) -> CheckRow:
    """The tokens that the vision graph lets through must be identical."""
    equal = int(np.isin(got, want).sum())
    return CheckRow(
        part="vision",
        quantity="places",
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
        gate=gates.slots,
        passed=len(want) == len(got) and (not different or tie),
    )
    return row, tie


def _tokens(expected: Arrays, measured: Arrays, gates: Gates) -> CheckRow:
    """Greedy tokens, each given the reference's tokens before it."""
    equal = expected["tokens"] == measured["tokens"]
    tied = ~equal & (measured["margins"] <= gates.token_margin)
    return CheckRow(
        part="decode",
        quantity="greedy tokens",
        measured=f"{int(equal.sum())} of {len(equal)} equal" + (", the rest tie" if tied.any() else ""),
        gate=f"identical, ties within {gates.token_margin:g}",
        passed=bool((equal | tied).all()),
    )


def _margin(logits: np.ndarray) -> float:
    """Best minus second-best logit of one row."""
    second, first = np.sort(logits.ravel())[-2:]
    return float(first - second)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms else 1.0
