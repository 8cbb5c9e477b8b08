"""`reroute export`: checkpoints that are not, that are damaged, or that hold what we do not support."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from reroute import cli
from reroute.manifest import Part
from tests.bad_input import damage as d
from tests.bad_input.conftest import Refused, tree
from tests.conftest import TINY_ROUTING

ROUTING = ("--routing", TINY_ROUTING)

NOT_CHECKPOINTS = {
    "empty config": (d.text("config.json", ""), ["cannot parse", "config.json"]),
    "config not json": (d.text("config.json", "{model_type: llava"), ["cannot parse", "config.json"]),
    "config a list": (d.text("config.json", "[1]"), ["config.json", "not a JSON object"]),
    "config binary": (d.binary("config.json", b"\x80\x81\xff"), ["cannot parse", "config.json"]),
    "no config": (d.remove("config.json"), ["holds no config.json"]),
    "no weights": (d.remove(d.WEIGHTS), ["holds no model.safetensors", "weights are missing"]),
}

UNSUPPORTED = {
    "model type": (d.config("model_type", "idefics3"), ["'idefics3' is not supported", "llava"]),
    "model type misspelt": (d.config("model_type", "lava"), ["'lava'", "did you mean 'llava'"]),
    "no model type": (d.config("model_type", d.ABSENT), ["model type None", "llava"]),
    "text model": (d.config("text_config.model_type", "gemma"), ["text model 'gemma'", "llama", "qwen2"]),
    "sliding window": (
        d.then(d.config("text_config.model_type", "mistral"), d.config("text_config.sliding_window", 64)),
        ["sliding window 64"],
    ),
    "vision tower": (d.config("vision_config.model_type", "siglip_vision_model"), ["siglip", "clip_vision_model"]),
    "text activation": (d.config("text_config.hidden_act", "gelu"), ["activation 'gelu'", "silu"]),
    "vision activation": (d.config("vision_config.hidden_act", "nosuch"), ["'nosuch'", "quick_gelu"]),
    "projector activation": (d.config("projector_hidden_act", "nosuch"), ["'nosuch'", "gelu"]),
    "rope type": (
        d.config("text_config.rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ["rotary type 'linear'", "default"],
    ),
    "rope scaling, old form": (
        d.then(
            d.config("text_config.rope_parameters", d.ABSENT),
            d.config("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ),
        ["rotary type 'linear'", "default"],
    ),
    "partial rotary": (
        d.config("text_config.rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ["partial rotary factor 0.5"],
    ),
    "feature strategy": (
        d.config("vision_feature_select_strategy", "cls"),
        ["vision_feature_select_strategy", "default", "full", "cls"],
    ),
    "feature layer": (d.config("vision_feature_layer", -9), ["vision_feature_layer -9", "3 layers"]),
    "quantized weights": (d.config("quantization_config", {"quant_method": "awq"}), ["awq", "float"]),
    "integer tensor": (
        d.tensor("model.layers.1.self_attn.q_proj.weight", lambda t: (t * 100).astype(np.int8)),
        ["layers.1.self_attn.q_proj.weight", "I8", "F32"],
    ),
    "image processor": (
        d.processor("image_processor_type", "SiglipImageProcessor"),
        ["'SiglipImageProcessor'", "CLIPImageProcessor"],
    ),
    "padding": (d.processor("do_pad", True), ["do_pad=true", "resize"]),
    "no resize": (d.processor("do_resize", False), ["do_resize=false", "resize"]),
    "no image processor": (d.remove("preprocessor_config.json"), ["holds no preprocessor_config.json"]),
    "fixed resize": (d.processor("size", {"height": 48, "width": 48}), ["resizes to", "shortest_edge"]),
    "crop of another size": (d.processor("crop_size", {"height": 64, "width": 64}), ["64 x 64", "48 x 48"]),
    "no mean": (d.processor("image_mean", d.ABSENT), ["image_mean"]),
    "two means": (d.processor("image_mean", [0.5, 0.5]), ["image_mean"]),
    "config of a wrong type": (d.config("text_config.num_hidden_layers", "six"), ["config.json", "six"]),
    "config without sizes": (d.config("text_config", 7), ["config.json"]),
}

DAMAGED = {
    "missing shard": (
        d.then(d.shard, d.remove("two.safetensors")),
        ["lacks the shard two.safetensors", "model.safetensors.index.json"],
    ),
    "truncated": (d.truncate(d.WEIGHTS), ["model.safetensors", "cut short"]),
    "truncated in the header": (d.truncate(d.WEIGHTS, 0.002), ["model.safetensors", "damaged"]),
    "empty shard": (d.binary(d.WEIGHTS, b""), ["model.safetensors", "damaged"]),
    "garbage": (d.binary(d.WEIGHTS, b"\xff" * 4096), ["model.safetensors", "damaged"]),
    "html instead": (d.text(d.WEIGHTS, "<html>404</html>" * 9), ["model.safetensors", "damaged"]),
    "missing tensor": (
        d.tensor("model.layers.3.mlp.up_proj.weight", None),
        ["lacks the tensor language_model.layers.3.mlp.up_proj.weight"],
    ),
    "missing tensor of the tower": (d.tensor("patch_embedding.weight", None), ["patch_embedding.weight"]),
    "missing projector": (d.tensor("multi_modal_projector.linear_2.bias", None), ["linear_2.bias"]),
    "wrong shape": (
        d.tensor("model.layers.0.self_attn.k_proj.weight", lambda t: t[:-1].copy()),
        ["layers.0.self_attn.k_proj.weight", "[31, 64]", "[32, 64]"],
    ),
    "config of another size": (d.config("text_config.hidden_size", 96), ["[176, 64]", "[176, 96]"]),
    "more layers than weights": (d.config("text_config.num_hidden_layers", 7), ["layers.6.", "do not match"]),
    "tensor only in the index": (
        d.then(d.shard, d.set_json(d.INDEX, "weight_map", {"nowhere.weight": "one.safetensors"})),
        ["nowhere.weight", "model.safetensors.index.json"],
    ),
    "index outside": (d.point_index_at("../elsewhere.safetensors"), ["outside", "../elsewhere.safetensors"]),
    "index absolute": (d.point_index_at("/etc/passwd"), ["outside", "/etc/passwd"]),
    "index up": (d.point_index_at(".."), [".."]),
    "index not text": (d.point_index_at(7), ["model.safetensors.index.json", "7"]),
    "index without a map": (d.text(d.INDEX, '{"metadata": {}}'), ["has no weight_map"]),
    "no tokenizer": (d.remove("tokenizer.json"), ["holds no tokenizer.json", "save_pretrained"]),
    "damaged tokenizer": (d.truncate("tokenizer.json"), ["cannot read tokenizer.json"]),
    "another tokenizer": (d.config("image_token_index", 170_000), ["no token 170000", "do not match"]),
    "no chat template": (d.remove("chat_template.jinja"), ["holds no chat template", "chat_template.jinja"]),
    "no end token": (
        d.then(d.config("text_config.eos_token_id", None), d.remove("generation_config.json")),
        ["names an end token", "eos_token_id"],
    ),
}


@pytest.mark.parametrize(
    ("damage", "says"),
    [pytest.param(*case, id=name) for table in (NOT_CHECKPOINTS, UNSUPPORTED, DAMAGED) for name, case in table.items()],
)
def test_checkpoint(damage: d.Damage, says: list[str], checkpoint: Path, refused: Refused) -> None:
    damage(checkpoint)
    refused("export", checkpoint, "-o", checkpoint.parent / "out", *ROUTING, says=says)


def test_no_folder(tmp_path: Path, refused: Refused) -> None:
    refused("export", tmp_path / "nowhere", "-o", tmp_path / "out", *ROUTING, says=["nowhere", "not a directory"])


def test_file_for_a_folder(checkpoint: Path, refused: Refused) -> None:
    refused("export", checkpoint / "config.json", "-o", checkpoint.parent / "out", *ROUTING, says="not a directory")


def test_empty_folder(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused("export", tmp_path / "empty", "-o", tmp_path / "out", *ROUTING, says="it is not a checkpoint")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickle_is_refused_and_not_read(name: str, checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    marker = tmp_path / "unpickled"
    (checkpoint / d.WEIGHTS).unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    refused("export", checkpoint, "-o", tmp_path / "out", *ROUTING, says=[name, "pickle", "save_pretrained"])
    assert not marker.exists()
    pickle.loads((checkpoint / name).read_bytes()).close()
    assert marker.exists(), "the pickle would not have done anything: this test proves nothing"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--max-text", "3000"], ["3000", "3072", "2048", "--max-text"], id="text"),
        pytest.param(["--max-images", "60"], ["60 images of 36", "2672", "2048", "--max-images"], id="images"),
        pytest.param(["--max-text", "1"], ["1 text tokens", "takes 32", "--max-text 32"], id="too small"),
        pytest.param(["--max-text", "0"], ["--max-text", "less than 1"], id="zero"),
        pytest.param(["--max-text", "many"], ["--max-text", "'many'"], id="a word"),
        pytest.param(["--max-images", "-1"], ["--max-images", "-1"], id="negative"),
    ],
)
@pytest.mark.parametrize("dry", [False, True], ids=["export", "dry run"])
def test_capacity(argv: list[str], says: list[str], dry: bool, checkpoint: Path, refused: Refused) -> None:
    where = ["--dry-run"] if dry else ["-o", checkpoint.parent / "out"]
    refused("export", checkpoint, *where, *ROUTING, *argv, says=says)


def test_no_output(checkpoint: Path, refused: Refused) -> None:
    refused("export", checkpoint, *ROUTING, says=["-o DIR", "--dry-run"])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder that Reroute did not write."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years of work")
    return tmp_path / "mine"


def test_output_exists(checkpoint: Path, exported: Path, refused: Refused) -> None:
    refused("export", checkpoint, "-o", exported, *ROUTING, says=["exists already", "--force"])


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_output_is_not_ours(force: list[str], checkpoint: Path, mine: Path, refused: Refused) -> None:
    refused("export", checkpoint, "-o", mine, *ROUTING, *force, says=["is not a Reroute export or bundle"])


@pytest.mark.parametrize("manifest", ["{}", "not json", '{"schema_version": 1}'])
def test_a_reroute_json_does_not_make_a_folder_ours(
    manifest: str, checkpoint: Path, mine: Path, refused: Refused
) -> None:
    (mine / "reroute.json").write_text(manifest)
    refused("export", checkpoint, "-o", mine, *ROUTING, "--force", says=["is not a Reroute export or bundle"])


def test_force_does_not_delete_what_was_put_into_an_export(checkpoint: Path, exported: Path, refused: Refused) -> None:
    (exported / "notes.txt").write_text("do not lose this")
    refused("export", checkpoint, "-o", exported, *ROUTING, "--force", says=["notes.txt"])


def test_output_is_a_file(checkpoint: Path, refused: Refused) -> None:
    output = checkpoint / "config.json"
    refused("export", checkpoint, "-o", output, *ROUTING, "--force", says="is not a Reroute export or bundle")


def test_output_below_a_file(checkpoint: Path, refused: Refused) -> None:
    output = checkpoint / "config.json" / "out"
    refused("export", checkpoint, "-o", output, *ROUTING, says=["cannot write to", "choose another output"])


def test_forced_export_of_a_bad_checkpoint_leaves_the_good_one(
    checkpoint: Path, exported: Path, refused: Refused
) -> None:
    d.truncate(d.WEIGHTS)(checkpoint)
    refused("export", checkpoint, "-o", exported, *ROUTING, "--force", says="cut short")


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("disk on fire"), 1), (KeyboardInterrupt(), 130)], ids=["crash", "ctrl-c"]
)
def test_an_export_that_breaks_off_leaves_the_good_one(
    error: BaseException,
    code: int,
    checkpoint: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last step fails, when all graphs are written (by a stand-in: tracing takes seconds)."""
    written: list[Path] = []

    def write(_: object, folder: Path, name: str, *_tables: object) -> Part:
        (folder / f"{name}.onnx").write_text("graph")
        written.append(folder)
        return Part(file=f"{name}.onnx", inputs=(), outputs=())

    def fail(*_: object) -> None:
        assert [path.name for path in sorted(written[-1].iterdir())] == ["decoder.onnx", "vision.onnx"]
        raise error

    monkeypatch.setattr("reroute.export.trace.trace_decoder", lambda _: None)
    monkeypatch.setattr("reroute.export.trace.trace_vision", lambda *_: None)
    monkeypatch.setattr("reroute.export.trace.save", write)
    monkeypatch.setattr("reroute.export.reference.record", fail)
    before = tree(tmp_path)
    for argv in (["-o", exported, "--force"], ["-o", tmp_path / "new"]):
        assert cli.main([str(part) for part in ("export", checkpoint, *argv, *ROUTING)]) == code
        assert tree(tmp_path) == before
    assert len(written) == 4
