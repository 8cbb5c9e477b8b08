"""Qwen-VL bundles as a user runs them, against transformers on the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from reroute import scenario
from reroute.check import check_bundle
from reroute.errors import UserError
from reroute.manifest import Capacity, GridProcessing, Manifest, file_table
from reroute.runtime import Session
from reroute.runtime.backend import BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.chat import assistant_message, user_message
from reroute.runtime.image import nearest_grid, preprocess, wanted_grid
from reroute.runtime.layout import Layout, lay_out, stack
from reroute.runtime.overlay import overlay, parse_box
from reroute.runtime.positions import Positions, join
from tests.qwen import CELL, GRIDS, IMAGE_TOKEN, KINDS, Kind, make_qwen, model_class

pytest.importorskip("onnxruntime")
KEEP_ALL = "reroute@1,3:keep=1.0,1.0"
# An early decision, before the last deepstack layer, and shares in each image: 7 and 4 of 24, 4 and 3 of 15.
ROUTED = {
    "qwen2_5_vl": "reroute@1,3:keep=.3,.2:pool=image",
    "qwen2_vl": "removal@1,3:keep=.3,.2",
    "qwen3_vl": "reroute@1,4:keep=.3,.2:score=previous",
}
CAPACITY = Capacity(max_text=400, max_images=4)
rng = np.random.default_rng(0)
# What transformers' processor makes of them are declared grids: 4 x 6, 5 x 3, 3 x 3.
WIDE, HIGH, SMALL = (
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((33, 50, 3), (41, 25, 3), (23, 25, 3))
)
Make = Callable[[Kind, str], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen-checkpoints")
    return {kind: make_qwen(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def make(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A built and checked bundle, made once for each checkpoint and schedule."""
    from reroute.engines import build
    from reroute.export import export_checkpoint

    made: dict[tuple[str, str], Path] = {}

    def bundle(kind: Kind, routing: str) -> Path:
        if (kind, routing) not in made:
            folder = tmp_path_factory.mktemp(kind)
            export_checkpoint(checkpoints[kind], folder / "export", routing=routing, capacity=CAPACITY, grids=GRIDS)
            build(folder / "export", folder / "bundle")
            made[kind, routing] = folder / "bundle"
        return made[kind, routing]

    return bundle


class Reference:
    """transformers: the checkpoint's own processor, template and model on whole conversations."""

    def __init__(self, checkpoint: Path, kind: Kind) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        self.torch = torch
        self.model: Any = model_class(kind).from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def logits(self, ids: list[int], pictures: list[Image.Image]) -> np.ndarray:
        """Logits [S, V] of token ids with one placeholder for each image."""
        images: dict[str, Any] = dict(self.images(pictures, return_tensors="pt")) if pictures else {}
        counts = iter((images["image_grid_thw"].prod(1) // 4).tolist() if pictures else [])
        wide = [i for token in ids for i in ([token] * next(counts) if token == IMAGE_TOKEN else [token])]
        tensor = self.torch.tensor([wide])
        if pictures:
            images["mm_token_type_ids"] = (tensor == IMAGE_TOKEN).int()
        with self.torch.no_grad():
            return self.model(input_ids=tensor, **images).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_dialogue_gives_transformers_logits(kind: Kind, make: Make, checkpoints: dict[str, Path]) -> None:
    """Two images of different shapes, a text-only turn, a turn with a third image: 16 tokens each."""
    reference = Reference(checkpoints[kind], kind)
    turns = [("where is the red cat?", [WIDE, HIGH]), ("what colour is it?", []), ("and here?", [SMALL])]
    with Session.open(make(kind, KEEP_ALL), threads=1) as session:
        chat = session.bundle.chat()
        talk: list[dict[str, Any]] = []
        history: list[int] = []
        shown: list[Image.Image] = []
        for question, pictures in turns:
            talk.append(user_message(question, num_images=len(pictures)))
            shown += pictures
            if len(talk) == 1:
                text = reference.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
                assert chat.render(talk) == text
                assert chat.first_turn(talk) == reference.tokenizer(text)["input_ids"]
            history += chat.next_turn(talk) if len(talk) > 1 else chat.first_turn(talk)
            stream = session.stream(question, pictures, max_new_tokens=16)
            found = list(stream)
            assert [view.grid for view in stream.answer.views] == [
                GRIDS[[WIDE, HIGH, SMALL].index(p)] for p in pictures
            ]
            ids = [*history, *(token.id for token in found)]
            logits = reference.logits(ids, shown)[-len(found) - 1 : -1].astype(np.float64)
            assert [token.id for token in found] == logits.argmax(axis=1).tolist()
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = logprobs[np.arange(len(found)), [token.id for token in found]]
            np.testing.assert_allclose([token.logprob for token in found], expected, atol=1e-4)
            history = ids[:-1] if stream.answer.stop_reason == "eos" else ids
            talk.append(assistant_message(stream.answer.text))


@pytest.mark.slow
def test_a_text_only_dialogue_gives_transformers_logits(make: Make, checkpoints: dict[str, Path]) -> None:
    reference = Reference(checkpoints["qwen2_5_vl"], "qwen2_5_vl")
    with Session.open(make("qwen2_5_vl", KEEP_ALL), threads=1) as session:
        found = list(session.stream("what is red?", max_new_tokens=16))
        ids = session.bundle.chat().first_turn([user_message("what is red?")])
        logits = reference.logits([*ids, *(token.id for token in found)], [])[-len(found) - 1 : -1]
        assert [token.id for token in found] == logits.argmax(axis=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_routed_engines_equal_torch_slot_by_slot(kind: Kind, make: Make, checkpoints: dict[str, Path]) -> None:
    """One image of each grid, two images in one prompt, a text-only prompt, each with a later turn and decode steps."""
    import torch

    from reroute.export.checkpoint import Checkpoint
    from reroute.export.models import family_of
    from reroute.export.reference import RecordingDecoder, encode, run_grids

    bundle = Bundle.open(make(kind, ROUTED[kind]))
    manifest, backend = bundle.manifest, open_backend(bundle)
    opened = Checkpoint.open(checkpoints[kind])
    family = family_of(opened)
    decoder = family.build_decoder(opened, manifest.model, manifest.schedule)
    tower = family.build_vision(opened, manifest.model, manifest.schedule)
    positions = Positions(manifest)
    generator = np.random.default_rng(1)
    for grids in ([GRIDS[0]], [GRIDS[1]], [GRIDS[1], GRIDS[0]], []):
        backend.reset()
        run = RecordingDecoder(decoder, capacity=300)
        ids = [8, 1, *(token for _ in grids for token in (3, IMAGE_TOKEN, 4)), 40, 50, 60]
        pixels = [
            generator.standard_normal((1, 3, rows * CELL, columns * CELL)).astype(np.float32) for rows, columns in grids
        ]
        visual = join([backend.encode(one) for one in pixels]) if pixels else None
        layout = lay_out(
            ids,
            image_token="<|image_pad|>",
            image_token_id=IMAGE_TOKEN,
            num_images=len(grids),
            tokens_per_image=[rows * columns for rows, columns in grids],
        )
        visuals = [encode(tower, torch.from_numpy(one)) for one in pixels]
        expected = run_grids(run, np.asarray(ids), IMAGE_TOKEN, grids, visuals)
        outputs = backend.step(positions.inputs(layout, visual, backend.lengths))
        for have, want in zip(outputs.routes, expected.routes, strict=True):
            np.testing.assert_array_equal(have, want)
        np.testing.assert_allclose(outputs.logits, expected.logits, atol=1e-4)
        shift = positions.shift(visual)
        for tokens in ([11], [12], [13, 14, 15], [16]):
            step = positions.inputs(Layout.of_text(tokens), None, backend.lengths, shift=shift)
            logits = backend.step(step).logits
            np.testing.assert_allclose(logits, run.run_text(torch.tensor([tokens])).logits, atol=1e-4)
        assert backend.lengths.tolist() == run.lengths
        for layer, cache in enumerate(run.past):
            rows = run.lengths[manifest.schedule.stage_of_layer(layer)]
            for have, want in zip(backend.cache(layer), cache, strict=True):
                np.testing.assert_allclose(have, want[:, :, :rows], atol=1e-4)


@pytest.mark.slow
def test_a_batch_of_equal_layout_is_its_rows(make: Make) -> None:
    """Two prompts with other images and words of one layout; deepstack features and selections are each row's own."""
    bundle = Bundle.open(make("qwen3_vl", ROUTED["qwen3_vl"]))
    generator = np.random.default_rng(2)
    positions = Positions(bundle.manifest)
    single, double = open_backend(bundle), open_backend(bundle, BackendOptions(batch=2))
    rows, columns = GRIDS[1]
    steps, logits, routes = [], [], []
    for words in ([8, 1, 3, IMAGE_TOKEN, 4, 40], [9, 2, 3, IMAGE_TOKEN, 4, 50]):
        pixels = generator.standard_normal((1, 3, rows * CELL, columns * CELL)).astype(np.float32)
        layout = lay_out(
            words, image_token="", image_token_id=IMAGE_TOKEN, num_images=1, tokens_per_image=[rows * columns]
        )
        single.reset()
        steps.append(positions.inputs(layout, single.encode(pixels), single.lengths))
        outputs = single.step(steps[-1])
        logits.append(outputs.logits[0].copy())
        routes.append([route[0] for route in outputs.routes])
    outputs = double.step(stack(steps))
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    for index, own in enumerate(routes):
        for have, want in zip(outputs.routes, own, strict=True):
            np.testing.assert_array_equal(have[index], want)
    assert any(not np.array_equal(*pair) for pair in zip(*routes, strict=True))
    # Another grid with as many tokens would stand at other positions.
    turned = replace(steps[0], rope_cos=steps[0].rope_cos[::-1])
    with pytest.raises(UserError, match="have their images at different positions"):
        stack([steps[0], turned])


@pytest.mark.slow
def test_the_graphs_of_all_grids_share_one_file_of_weights(make: Make) -> None:
    folder = make("qwen2_5_vl", KEEP_ALL)
    manifest = Manifest.load(folder)
    assert sorted(manifest.parts) == ["decoder", "vision.3x3", "vision.4x6", "vision.5x3"]
    used: dict[str, set[str]] = {}
    for part in manifest.model.vision_parts:
        graph = onnx.load(folder / manifest.parts[part].file, load_external_data=False).graph
        for tensor in graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                assert entries["location"] == "vision.onnx.data"
                used.setdefault(f"{entries['offset']}+{entries['length']}", set()).add(part)
        assert (folder / manifest.parts[part].file).stat().st_size < 60_000
    shared = [place for place, parts in used.items() if len(parts) == 3]
    weights = manifest.model.num_parameters["vision"] * 4
    assert sum(int(place.partition("+")[2]) for place in shared) > 0.9 * weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["5x3.visual_embeds", "in.pixel_values.3x3", "3x3.visual_deepstack"])
def test_the_check_holds_the_graph_of_every_grid(make: Make, tmp_path: Path, name: str) -> None:
    """A reference that differs for one grid alone fails the check of that grid."""
    folder = tmp_path / "bundle"
    shutil.copytree(make("qwen3_vl", ROUTED["qwen3_vl"]), folder)
    arrays = scenario.load(folder / scenario.FILE_NAME)
    arrays[name] = arrays[name] + np.float32(1e-2)
    scenario.save(folder / scenario.FILE_NAME, arrays)
    replace(Manifest.load(folder), files=file_table(folder)).save(folder)
    failed = [row.quantity for row in check_bundle(folder).rows if not row.passed]
    assert failed == ["features of 5 x 3" if "5x3" in name else "features of 3 x 3"]


@pytest.mark.slow
def test_an_image_is_resized_to_the_nearest_grid_and_the_answer_says_so(make: Make) -> None:
    with Session.open(make("qwen2_5_vl", ROUTED["qwen2_5_vl"]), threads=1) as session:
        picture = Image.new("RGB", (640, 420), "red")
        answer = session.ask("where?", [picture, HIGH], max_new_tokens=3)
        assert str(answer.views[0]) == "640 x 420 pixels, seen as 48 x 32: 4 x 6 visual tokens"
        assert answer.visual_tokens == 24 + 15
        assert [len(route) for route in answer.routes] == [7 + 4, 4 + 3]
        # Indices count on from image to image, by the images' own grids.
        first, second = (
            overlay(picture, answer, session.manifest),
            overlay(HIGH, answer, session.manifest, image_index=1),
        )
        assert (first.grid, second.grid) == ((4, 6), (5, 3))
        assert first.shown.size == (48, 32)
        assert [view.ran for view in first.stages] == [24, 7, 4]
        assert [view.ran for view in second.stages] == [15, 4, 3]


@pytest.mark.slow
def test_features_encoded_before_are_the_images_themselves(make: Make) -> None:
    with Session.open(make("qwen3_vl", ROUTED["qwen3_vl"]), threads=1) as session:
        direct = session.ask("where?", [WIDE, HIGH], max_new_tokens=5)
        session.reset()
        again = session.ask("where?", session.encode([WIDE, HIGH]), max_new_tokens=5)
        assert direct.token_ids == again.token_ids
        assert direct.views == again.views
        for one, other in zip(direct.routes, again.routes, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("picture", [WIDE, HIGH, SMALL], ids=["wide", "high", "small"])
def test_pixels_are_those_of_transformers_processor(picture: Image.Image) -> None:
    from transformers import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil(
        patch_size=CELL // 2, merge_size=2, min_pixels=4 * CELL**2, max_pixels=40 * CELL**2
    )
    out = theirs(picture, return_tensors="np")
    processing = processing_of(theirs)
    grid = nearest_grid(picture.size, processing, GRIDS)
    assert out["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]]
    ours = preprocess(picture, processing, grid)
    patch = CELL // 2
    flat = ours.reshape(3, grid[0], 2, patch, grid[1], 2, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    flat = np.repeat(flat[:, :, :, :, :, None], 2, axis=5).reshape(-1, 3 * 2 * patch**2)
    np.testing.assert_allclose(flat, out["pixel_values"], atol=1e-6)


def processing_of(theirs: Any) -> GridProcessing:
    return GridProcessing(
        cell=theirs.patch_size * theirs.merge_size,
        min_pixels=theirs.size["shortest_edge"],
        max_pixels=theirs.size["longest_edge"],
        resample=int(theirs.resample),
        rescale_factor=theirs.rescale_factor,
        mean=tuple(theirs.image_mean),
        std=tuple(theirs.image_std),
    )


def test_the_wanted_grid_is_smart_resize() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    processing = GridProcessing(
        cell=28, min_pixels=3136, max_pixels=451584, resample=3, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for width, height in rng.integers(10, 2000, (300, 2)).tolist():
        rows, columns = wanted_grid((width, height), processing)
        assert (rows * 28, columns * 28) == smart_resize(height, width, 28, 3136, 451584)


def test_the_nearest_grid_is_the_one_of_the_nearest_shape() -> None:
    processing = GridProcessing(
        cell=28, min_pixels=3136, max_pixels=12845056, resample=3, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
    )
    grids = ((24, 24), (18, 32), (32, 18), (12, 12))
    cases = {(672, 672): (24, 24), (1920, 1080): (18, 32), (1080, 1920): (32, 18), (4000, 4000): (24, 24),
             (320, 320): (12, 12), (20, 20): (12, 12), (560, 480): (24, 24)}  # fmt: skip
    for size, grid in cases.items():
        assert nearest_grid(size, processing, grids) == grid


@pytest.mark.parametrize(
    ("text", "boxes", "box"),
    [
        ('```json\n[{"bbox_2d": [14, 28, 140, 280], "label": "cat 1"}]\n```', "pixels", (0.1, 0.1, 1.0, 1.0)),
        ("(100,200),(300,400)", "thousandths", (0.1, 0.2, 0.3, 0.4)),
        ('{"bbox_2d": [100, 200, 300, 1001]}', "thousandths", None),
        ("[300, 200, 100, 400]", "pixels", None),
        ("there are 3 cats", "pixels", None),
    ],
)
def test_boxes_are_shares_of_what_the_model_saw(text: str, boxes: Any, box: tuple[float, ...] | None) -> None:
    found = parse_box(text, boxes, (140, 280))
    assert found == (box if box is None else pytest.approx(box))


@pytest.mark.slow
def test_tensorrt_refuses_by_name(make: Make, tmp_path: Path) -> None:
    from reroute.engines import build

    export = make("qwen2_5_vl", KEEP_ALL).parent / "export"
    with pytest.raises(UserError, match="one graph for each grid"):
        build(export, tmp_path / "out", backend="tensorrt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_than_the_capacity_is_refused(make: Make) -> None:
    with Session.open(make("qwen2_5_vl", KEEP_ALL), threads=1) as session, pytest.raises(UserError, match="cache rows"):
        session.ask("where?", [WIDE] * 20)


@pytest.mark.slow
def test_an_evaluation_asks_in_qwens_words(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """`reroute eval` on generated scenes; a random model is never right, and its answers are read without an error."""
    from reroute.cli import main

    folder = make("qwen2_5_vl", ROUTED["qwen2_5_vl"])
    assert main(["eval", str(folder), "--grounding", "2", "--vqa", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"]["set"] == "scenes/heldout, seed 0, 3 to 7 objects (qwen)"
    (row,) = found["bundles"]
    assert [record["iou"] for record in row["records"]] == [0.0, 0.0, None]
