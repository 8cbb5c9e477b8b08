"""From export to bundle: dialects agree with torch, builds are deterministic, a wrong engine is never written."""

from __future__ import annotations

import dataclasses
import filecmp
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from reroute import scenario
from reroute.check import check_bundle
from reroute.engines import build
from reroute.engines.lower import lower, plugin_nodes, with_functions
from reroute.engines.targets import Form
from reroute.errors import GateError, RerouteError
from reroute.export import export_checkpoint, resolve
from reroute.export.checkpoint import Checkpoint
from reroute.export.models import family_of
from reroute.export.reference import RecordingDecoder, rotary_rows
from reroute.manifest import Capacity, Manifest
from tests.conftest import TINY_ROUTING, TinyLlava, make_llava

ROUTINGS = {
    "reroute": TINY_ROUTING,
    "removal": "removal@2,4:keep=7,4",
    "first-layer": "reroute@0,3:keep=9,5",
    "growing": "reroute@1,3,5:keep=3,9,2",
    "previous": "removal@1,4:keep=9,5:score=previous",
    "previous-reroute": "reroute@1,2,5:keep=9,5,7:score=previous",
    "renumbered": "removal@1,3,5:keep=9,5,2:positions=renumbered",
    "renumbered-previous": "removal@1,3,5:keep=9,5,2:score=previous:positions=renumbered",
    "dense": "dense",
}
# (text tokens, visual tokens) of each step: image prompt, decode, text-only turn, second image, decode.
STEPS = [(9, 36), (1, 0), (1, 0), (11, 0), (6, 36), (1, 0), (3, 0)]


# Every routing in every dialect; the plugin form, which computes the same by other nodes, where it differs.
FORMS: list[tuple[str, str, Form]] = [
    *((routing, dialect, "native") for routing in ROUTINGS for dialect in ("standard", "ort", "trt", "trt-jp6")),
    *((routing, "trt", "plugin") for routing in ("reroute", "removal", "renumbered")),
    ("reroute", "trt-jp6", "plugin"),
]


@dataclasses.dataclass
class Reference:
    """An export, and the torch decoder driven through STEPS: feeds without caches, and what torch gave for each."""

    folder: Path
    manifest: Manifest
    feeds: list[dict[str, np.ndarray]]
    logits: list[np.ndarray]
    routes: list[list[np.ndarray]]
    caches: list[dict[str, np.ndarray]]  # valid rows after the step


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Export and torch run of a routing, made once."""

    @functools.cache
    def make(routing: str) -> Reference:
        folder = tmp_path_factory.mktemp(routing) / "export"
        export_checkpoint(tiny_checkpoint, folder, routing=ROUTINGS[routing])
        return drive_torch(folder, tiny_checkpoint)

    return make


def drive_torch(folder: Path, checkpoint: Path) -> Reference:
    opened = Checkpoint.open(checkpoint)
    manifest = Manifest.load(folder)
    decoder = family_of(opened).build_decoder(opened, manifest.model, manifest.schedule)
    run = RecordingDecoder(decoder, capacity=200)
    made = Reference(folder, manifest, [], [], [], [])
    text = manifest.model.text
    generator = torch.Generator().manual_seed(3)
    for num_text, num_visual in STEPS:
        rows = num_text + num_visual
        starts = run.lengths if manifest.schedule.positions == "renumbered" else run.lengths[:1]
        tables = [rotary_rows(text.head_dim, text.rope_theta, start + torch.arange(rows)) for start in starts]
        ids = torch.randint(5, 170, (1, num_text), generator=generator)
        embeds = torch.randn(1, num_visual, text.hidden_size, generator=generator)
        visual = torch.arange(min(2, num_text - 1), min(2, num_text - 1) + num_visual)
        slots = torch.tensor([s for s in range(rows) if s not in set(visual.tolist())])
        expected = run.step(ids, embeds, slots, visual)
        cos, sin = (torch.stack(part).squeeze(0) for part in zip(*tables, strict=True))
        made.feeds.append(
            {
                "input_ids": ids.numpy(),
                "visual_embeds": embeds.numpy(),
                "text_slots": slots.numpy(),
                "visual_slots": visual.numpy(),
                "rope_cos": cos.numpy(),
                "rope_sin": sin.numpy(),
                "kv_len": np.asarray(run.lengths, dtype=np.int32),
            }
        )
        made.logits.append(expected.logits.numpy())
        made.routes.append([route.numpy() for route in expected.routes])
        made.caches.append(
            {
                f"{layer}.{part}": tensor[:, :, : run.lengths[run.schedule.stage_of_layer(layer)]].numpy().copy()
                for layer, cache in enumerate(run.past)
                for part, tensor in zip(("key", "value"), cache, strict=True)
            }
        )
    return made


@pytest.mark.parametrize(("routing", "dialect", "form"), FORMS)
def test_every_phase_of_the_one_graph_equals_torch(
    reference: Callable[[str], Reference], routing: str, dialect: str, form: Form, tmp_path: Path
) -> None:
    """Prompt, decode, text-only turn and second image through one session of the one graph."""
    torch_run = reference(routing)
    shutil.copyfile(torch_run.folder / "decoder.onnx.data", tmp_path / "decoder.onnx.data")
    neutral = onnx.load(torch_run.folder / "decoder.onnx", load_external_data=False)
    model = lower(neutral, dialect, form=form)
    if form == "plugin":  # the nodes are TensorRT's; to run them here they get their functions back
        assert set(plugin_nodes(model)) >= {"RerouteSelect", "RerouteGather"}
        model = with_functions(model, neutral, dialect)
    counts: list[str] = []
    if dialect.startswith("trt"):  # what TensorRT asks of TopK: K of at least 1, also in decode
        counts = [node.input[1] for node in model.graph.node if node.op_type == "TopK"]
        assert counts or form == "plugin" or routing == "dense"
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(counts))
    onnx.save(model, tmp_path / "decoder.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "decoder.onnx", options)
    # The masks of the other dialects multiply unused rows by zero, which NaN survives.
    for outputs in equal_torch(session, torch_run, unused=np.nan if dialect == "ort" else 0):
        assert all(int(outputs[name].ravel()[0]) >= 1 for name in counts)


def equal_torch(session: ort.InferenceSession, torch_run: Reference, *, unused: float) -> Iterator[dict[str, Any]]:
    """Assert that all steps equal torch's; `unused` is what caches hold behind their valid rows. Gives the outputs."""
    text = torch_run.manifest.model.text
    caches = {
        f"{layer}.{part}": np.full((1, text.num_kv_heads, 200, text.head_dim), unused, dtype=np.float32)
        for layer in range(text.num_layers)
        for part in ("key", "value")
    }
    names = [output.name for output in session.get_outputs()]
    steps = zip(torch_run.feeds, torch_run.logits, torch_run.routes, torch_run.caches, strict=True)
    for feed, logits, routes, valid in steps:
        feed = feed | {f"past_key_values.{name}": cache for name, cache in caches.items()}
        outputs: dict[str, Any] = dict(zip(names, session.run(names, feed), strict=True))
        before, caches = caches, {name: outputs[f"present.{name}"] for name in caches}
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-4)
        for stage, route in enumerate(routes, start=1):
            np.testing.assert_array_equal(outputs[f"routes.{stage}"], route)
        for name, rows in valid.items():
            length = rows.shape[2]
            np.testing.assert_allclose(caches[name][:, :, :length], rows, atol=1e-4)
            if unused == 0:  # ort's present is defined up to kv_len only, unless it is past's own buffer
                np.testing.assert_array_equal(caches[name][:, :, length:], before[name][:, :, length:])
        yield outputs


def test_the_lowered_graph_holds_no_op_of_ours_and_no_transpose_of_a_weight(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} <= {"", "com.microsoft"}
    weights = {tensor.name for tensor in graph.initializer}
    transposed = [node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    assert not transposed


def test_two_builds_of_one_checkpoint_are_byte_identical(
    tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path
) -> None:
    export_checkpoint(tiny_checkpoint, tmp_path / "again", routing=TINY_ROUTING)
    build(tiny_export, tmp_path / "one", check=False)
    build(tmp_path / "again", tmp_path / "two", check=False)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    _, mismatch, errors = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)
    assert (mismatch, errors) == ([], [])


def test_no_file_of_a_bundle_names_the_machine(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for path in tiny_bundle.iterdir():
        data = path.read_bytes()
        for text in (str(tiny_checkpoint), str(Path(__file__).parents[2]), str(Path.home())):
            assert text.encode() not in data, f"{path.name} holds {text}"


def test_a_check_with_a_live_reference_passes_on_a_real_prompt(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    report = check_bundle(tiny_bundle, checkpoint=tiny_checkpoint, prompt="where is the red circle ?", tokens=8)
    assert report.passed, report.rows
    assert report.reference == "torch, live"
    assert {row.quantity for row in report.rows} >= {"features", "slots", "logits", "greedy tokens"}


@pytest.mark.parametrize(
    "tensor", ["in.pixel_values", "visual_embeds", "routes.1", "prompt.logits", "tokens", "cache.3.key"]
)
def test_every_gate_of_the_check_can_fail(tiny_export: Path, tmp_path: Path, tensor: str) -> None:
    """A reference that differs in one place fails the check, and a bundle that fails it is not written."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    arrays = scenario.load(folder / scenario.FILE_NAME)
    values = arrays[tensor]
    arrays[tensor] = (values + 1) if values.dtype.kind == "i" else values + 1e-2
    scenario.save(folder / scenario.FILE_NAME, arrays)
    _rehash(folder)
    with pytest.raises(GateError, match="does not reproduce"):
        build(folder, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    build(folder, tmp_path / "bundle", check=False)
    assert not check_bundle(tmp_path / "bundle").passed


def test_slots_may_differ_only_where_scores_tie(tiny_export: Path, tmp_path: Path) -> None:
    """Swapping a kept slot for another is a failure, unless the reference's scores say that the two tie."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    arrays = scenario.load(folder / scenario.FILE_NAME)
    slots, candidates, scores = arrays["routes.2"][0], arrays["candidates.2"][0], arrays["scores.2"][0]
    kept = [slot for slot in slots if slot in candidates]
    worst = min(kept, key=lambda slot: scores[list(candidates).index(slot)])
    other = next(slot for slot in candidates if slot not in slots)
    arrays["routes.2"] = np.sort(np.where(slots == worst, other, slots))[None]
    scenario.save(folder / scenario.FILE_NAME, arrays)
    _rehash(folder)
    build(folder, tmp_path / "bundle", check=False)
    rows = {(row.part, row.quantity): row for row in check_bundle(tmp_path / "bundle").rows}
    assert not rows["stage 2", "slots"].passed

    index = {int(slot): i for i, slot in enumerate(candidates)}
    arrays["scores.2"][0, index[int(other)]] = arrays["scores.2"][0, index[int(worst)]]
    scenario.save(folder / scenario.FILE_NAME, arrays)
    _rehash(folder)
    build(folder, tmp_path / "bundle", check=False, force=True)
    rows = {(row.part, row.quantity): row for row in check_bundle(tmp_path / "bundle").rows}
    assert rows["stage 2", "slots"].passed
    assert "tie" in rows["stage 2", "slots"].measured


def test_an_op_without_a_body_is_named(tiny_export: Path) -> None:
    model = onnx.load(tiny_export / "decoder.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("RerouteUnheard", ["logits"], ["more"], domain="reroute"))
    with pytest.raises(RerouteError, match="no body for RerouteUnheard"):
        lower(model, "ort")


@pytest.mark.parametrize(
    "size", [TinyLlava(kv_heads=4), TinyLlava(tied=True), TinyLlava(attention_bias=True, kv_heads=1)], ids=str
)
def test_other_text_models_build_and_check(size: TinyLlava, tmp_path: Path) -> None:
    """MHA, tied embeddings, biases with one key/value head: the build's own check is the assertion."""
    checkpoint = make_llava(tmp_path / "checkpoint", size)
    export_checkpoint(checkpoint, tmp_path / "export", routing=TINY_ROUTING, capacity=Capacity(max_text=100))
    manifest = build(tmp_path / "export", tmp_path / "bundle")
    assert manifest.check is not None
    assert manifest.check["passed"] is True


def test_manifest_says_what_was_built(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert manifest.schedule == resolve(TINY_ROUTING, manifest.model)
    assert manifest.average_visual_tokens == pytest.approx((2 * 36 + 2 * 7 + 2 * 4) / 6)
    assert manifest.cache_rows == (512 + 72, 512 + 14, 512 + 8)
    assert manifest.checkpoint_sha256 == Checkpoint.open(tiny_checkpoint).sha256
    weights = (tiny_bundle / "decoder.onnx.data").stat().st_size + (tiny_bundle / "vision.onnx.data").stat().st_size
    assert weights == pytest.approx(manifest.estimates["weight_bytes"], rel=0.05)
    manifest.verify_files(tiny_bundle)


def _rehash(folder: Path) -> None:
    from reroute.manifest import file_table

    dataclasses.replace(Manifest.load(folder), files=file_table(folder)).save(folder)


def test_the_manifest_records_the_spec_of_a_toml_file_and_not_its_path(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "routing.toml"
    path.write_text('[routing]\naction = "reroute"\nlayers = [2, 4]\nkeep = [7, 4]\n', encoding="utf-8")
    manifest = export_checkpoint(tiny_checkpoint, tmp_path / "export", routing=str(path))
    assert manifest.routing == "reroute@2,4:keep=7,4"
