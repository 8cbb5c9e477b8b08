"""Several budgets in one graph: every tier equals torch and the bundle of that budget alone, at the cost of one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from reroute import scenario
from reroute.check import check_bundle
from reroute.engines import TensorRTOptions, build
from reroute.engines.targets import LoweringOptions
from reroute.engines.tiers import BUDGETS, take_budgets
from reroute.errors import GateError, RerouteError, UserError
from reroute.export import export_checkpoint
from reroute.export.checkpoint import Checkpoint
from reroute.export.models import family_of
from reroute.export.reference import RecordingDecoder, Visual, encode, run_grids, run_prompt
from reroute.manifest import Capacity, Grid, Manifest, file_table
from reroute.runtime.backend import Backend, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.positions import Positions, join
from tests.conftest import TinyLlava, make_llava
from tests.qwen import GRIDS, make_qwen

pytest.importorskip("onnxruntime")

# Of a decoder of three layers: the default and the other tiers of each action, in their less plain forms.
FAMILIES: dict[str, tuple[str, ...]] = {
    "removal, dense by default": (
        "dense",
        "removal@0,2:keep=9,5:positions=renumbered",
        "removal@0,2:keep=20,2:positions=renumbered",
    ),
    "reroute, nuwa, scored before": (
        "reroute@1,2:nuwa=12:keep=5,3:score=previous",
        "reroute@1,2:nuwa=12:keep=2,9:score=previous",
    ),
}
# Of a model whose images differ in size: shares, tokens and everything in one graph.
GRID_FAMILIES: dict[str, tuple[str, ...]] = {
    "shares": ("reroute@0,1:avg=2/3", "reroute@0,1:keep=.2,.1", "reroute@0,1:keep=6,9", "dense"),
    "for each image": ("reroute@0,1:keep=5,3:pool=image", "reroute@0,1:keep=.4,.6:pool=image", "dense"),
}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("three") / "checkpoint", TinyLlava(layers=3, vision_layers=2))


def make(checkpoint: Path, folder: Path, routings: Sequence[str], grids: Sequence[Grid] = ()) -> Path:
    """Export with the first routing and the others as tiers, and build, unchecked."""
    capacity = Capacity(max_text=45, max_images=3)  # a short reference
    routing, *tiers = routings
    export_checkpoint(checkpoint, folder / "export", routing=routing, tiers=tiers, capacity=capacity, grids=grids)
    build(folder / "export", folder / "bundle", check=False)
    return folder / "bundle"


def assert_equal_to_torch(backend: Backend, manifest: Manifest, checkpoint: Path) -> list[int]:
    """A dialogue in the tier that the manifest is of: routes, logits and caches. Returns the rows kept in each stage.

    An image, decode, a text-only turn, an image behind it (of a model with grids: two), decode.
    """
    opened = Checkpoint.open(checkpoint)
    family, model = family_of(opened), manifest.model
    decoder = family.build_decoder(opened, model, manifest.schedule)
    tower = family.build_vision(opened, model, manifest.schedule)
    run = RecordingDecoder(decoder, capacity=400)
    positions, token = Positions(manifest), model.tokens.image_token_id
    generator = np.random.default_rng(1)
    images = [20, token, 21, token, 30] if model.vision.grids else [20, token, 30]
    shift, kept = 0, []
    for ids in ([8, 1, token, 9, 40], [11], [12, 13, 14], images, [45]):
        grids = [model.vision.grid] * ids.count(token)
        pixels = [generator.standard_normal((1, 3, *model.pixels(grid))).astype(np.float32) for grid in grids]
        visual = join([backend.encode(one) for one in pixels]) if pixels else None
        visuals: list[Visual] = [encode(tower, torch.from_numpy(one)) for one in pixels]
        if model.text.mrope is not None:
            expected = run_grids(run, np.asarray(ids), token, grids, visuals)
        elif visuals:
            expected = run_prompt(run, np.asarray(ids), token, model.vision.tokens_per_image, visuals[0])
        else:
            expected = run.run_text(torch.tensor([ids]))
        layout = Layout.of_text(ids)
        if visuals:
            counts = [one.embeds.shape[1] for one in visuals]
            layout = lay_out(
                ids, image_token="<image>", image_token_id=token, num_images=len(counts), tokens_per_image=counts
            )
        outputs = backend.step(positions.inputs(layout, visual, backend.lengths, shift=shift))
        shift += positions.shift(visual)
        np.testing.assert_allclose(outputs.logits, expected.logits.numpy(), atol=1e-4)
        if len(ids) > 1:
            for have, want in zip(outputs.routes, expected.routes, strict=True):
                np.testing.assert_array_equal(have, want.numpy())
        kept = kept or [route.shape[1] - layout.num_text for route in outputs.routes]
    assert backend.lengths.tolist() == run.lengths
    for layer, cache in enumerate(run.past):
        rows = run.lengths[manifest.schedule.stage_of_layer(layer)]
        for have, want in zip(backend.cache(layer), cache, strict=True):
            np.testing.assert_allclose(have, want[:, :, :rows].numpy(), atol=1e-4)
    return kept


def assert_every_tier(folder: Path, checkpoint: Path, kept: Sequence[Sequence[int]]) -> None:
    """All tiers on one engine, there and back."""
    bundle = Bundle.open(folder)
    backend = open_backend(bundle)
    tiers = dict(zip(bundle.manifest.tiers, kept, strict=True))
    for name in [*tiers, *reversed(list(tiers)[:-1])]:
        backend.use(name)
        assert assert_equal_to_torch(backend, bundle.manifest.at(name), checkpoint) == list(tiers[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tier_of_every_action_equals_torch(name: str, three_layers: Path, tmp_path: Path) -> None:
    entering = 36
    routings = FAMILIES[name]
    wanted = [
        [entering] * 2 if routing == "dense" else [int(k) for k in routing.split("keep=")[1].split(":")[0].split(",")]
        for routing in routings
    ]
    assert_every_tier(make(three_layers, tmp_path, routings), three_layers, wanted)


@pytest.mark.parametrize("name", GRID_FAMILIES)
def test_tiers_in_shares_and_tokens_share_one_graph(name: str, tmp_path: Path) -> None:
    checkpoint = make_qwen(tmp_path / "checkpoint", layers=2)
    folder = make(checkpoint, tmp_path, GRID_FAMILIES[name], GRIDS[1:2])
    wanted = {"shares": [(10, 10), (3, 1), (6, 9), (15, 15)], "for each image": [(5, 3), (6, 9), (15, 15)]}
    assert_every_tier(folder, checkpoint, wanted[name])


def test_the_check_gates_every_tier(tiered_bundle: Path, tiny_checkpoint: Path) -> None:
    for report in (check_bundle(tiered_bundle), check_bundle(tiered_bundle, checkpoint=tiny_checkpoint, tokens=4)):
        assert report.passed
        tiers = list(dict.fromkeys(row.tier for row in report.rows))
        assert tiers == list(Manifest.load(tiered_bundle).tiers) == ["7-4", "dense", "wide", "2/9"]
        slots = {(row.tier, row.part): row.measured for row in report.rows if row.quantity == "slots"}
        text = 24  # of the scenario's prompt
        assert slots["wide", "stage 1"] == f"{text + 20} of {text + 20} equal"
        assert slots["dense", "stage 2"] == f"{text + 36} of {text + 36} equal"
        assert slots["2/9", "stage 2"] == f"{text + 12} of {text + 12} equal"
    assert {row["tier"] for row in check_bundle(tiered_bundle, tier="wide").to_dict()["rows"]} == {"wide"}


@pytest.mark.parametrize("tier", ["dense", "2/9"])
def test_a_wrong_tier_fails_the_build_and_is_named(tiered_export: Path, tmp_path: Path, tier: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(tiered_export, folder)
    manifest = Manifest.load(folder)
    reference = folder / manifest.tiers[tier].reference
    scenario.save(reference, {name: a + (name == "cache.3.key") for name, a in scenario.load(reference).items()})
    dataclasses.replace(manifest, files=file_table(folder)).save(folder)
    with pytest.raises(
        GateError, match=f"reproduce the reference: tier {tier}, stage 1, caches of layers 2-3: "
    ) as caught:
        build(folder, tmp_path / "bundle")
    assert ";" not in caught.value.message  # nothing else failed
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_reference_of_a_tier_is_that_of_its_own_export(tiered_export: Path, tiny_export: Path) -> None:
    """The graph was traced with other budgets than the default's, and neither shows."""
    ours, alone = scenario.load(tiered_export / "reference.npz"), scenario.load(tiny_export / "reference.npz")
    assert ours.keys() == alone.keys()
    assert all(np.array_equal(ours[name], alone[name]) for name in alone)


def test_the_dense_tier_is_the_dense_decoder(
    tiered_bundle: Path, tiny_dense_bundle: Path, tiny_checkpoint: Path
) -> None:
    """Invariant 1 in the engine: the numbers are those of a bundle exported with `dense`."""
    dense, tiered = Bundle.open(tiny_dense_bundle), Bundle.open(tiered_bundle).at("dense")
    backends = open_backend(dense), open_backend(tiered)
    found = []
    for backend, manifest in zip(backends, (dense.manifest, tiered.manifest), strict=True):
        assert_equal_to_torch(backend, manifest, tiny_checkpoint)
        found.append([array for layer in range(6) for array in backend.cache(layer)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    # What it costs more is scoring: a query row and its products for each decision, and no key that it had not.
    costs, wanted = tiered.manifest.estimates, dense.manifest.estimates
    assert costs["kv_bytes"] == wanted["kv_bytes"]
    assert costs["decoder_flops"] == wanted["decoder_flops"] + costs["scoring_flops"]
    text, rows = dense.manifest.model.text, 36 + 64
    assert costs["scoring_flops"] == 2 * 2 * text.num_heads * text.head_dim * (text.hidden_size + rows)


def test_four_tiers_take_the_disk_of_one(tiered_bundle: Path, tiny_bundle: Path) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir() if "reference" not in path.name)

    weights = sum((tiered_bundle / f"{part}.onnx.data").stat().st_size for part in ("decoder", "vision"))
    assert size(tiered_bundle) - size(tiny_bundle) < 0.01 * weights + (tiered_bundle / "reroute.json").stat().st_size
    for name in ("decoder.onnx.data", "vision.onnx.data", "vision.onnx"):
        assert (tiered_bundle / name).read_bytes() == (tiny_bundle / name).read_bytes()
    assert sorted(path.name for path in tiered_bundle.glob("reference*")) == [
        "reference.2-9.npz", "reference.dense.npz", "reference.npz", "reference.wide.npz",
    ]  # fmt: skip


def test_budgets_are_an_input_of_a_bundle_with_tiers_alone(tiered_bundle: Path, tiny_bundle: Path) -> None:
    for folder, has in ((tiered_bundle, True), (tiny_bundle, False)):
        graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
        names = [value.name for value in graph.input]
        table = [tensor.name for tensor in Manifest.load(folder).parts["decoder"].inputs]
        assert names == table
        assert (BUDGETS in names) is has


def test_a_graph_of_other_budgets_than_the_manifests_is_refused(tiered_export: Path, tiny_export: Path) -> None:
    manifest = Manifest.load(tiered_export)
    model = onnx.load(tiny_export / "decoder.onnx", load_external_data=False)
    take_budgets(model, manifest)  # traced with (7, 4), which is one of the tiers
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i += attribute.name == "keep"
    with pytest.raises(RerouteError, match=r"decides \[\(8, 0\), \(5, 0\)\], which is none of the manifest's tiers"):
        take_budgets(model, manifest)


def test_tensorrt_refuses_tiers_before_anything_is_written(tiered_export: Path, tmp_path: Path) -> None:
    options = TensorRTOptions(lowering=LoweringOptions(target="orin-jp6"), only_lower=True)
    with pytest.raises(UserError, match=r"4 tiers .* budgets are fixed in a TensorRT engine") as caught:
        build(tiered_export, tmp_path / "out", backend="tensorrt", tensorrt=options)
    assert "without --tier" in caught.value.hint
    assert not list(tmp_path.iterdir())
