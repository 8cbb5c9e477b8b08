"""`reroute build`: exports that are not, or that were changed since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reroute import cli
from reroute.errors import EXIT_GATE
from tests.bad_input import damage as d
from tests.bad_input.conftest import Refused, tree

MANIFEST = "reroute.json"

CHANGED = {
    "graph": (d.flip("decoder.onnx"), ["decoder.onnx has sha256", "the manifest says"]),
    "weights": (d.flip("decoder.onnx.data"), ["decoder.onnx.data has sha256", "the manifest says"]),
    "reference": (d.flip("reference.npz"), ["reference.npz has sha256", "the manifest says"]),
    "template": (d.text("chat_template.jinja", "{{ x }}"), ["chat_template.jinja has 7 bytes", "says 580"]),
    "truncated": (d.truncate("vision.onnx.data"), ["vision.onnx.data has", "bytes, the manifest says"]),
    "missing": (d.remove("tokenizer.json"), ["lacks tokenizer.json"]),
    "no manifest": (d.remove(MANIFEST), ["holds no reroute.json", "reroute export"]),
    "manifest not json": (d.truncate(MANIFEST), ["cannot read", MANIFEST]),
    "manifest a list": (d.text(MANIFEST, "[]"), ["schema version None", "reads version 3"]),
    "newer schema": (d.set_json(MANIFEST, "schema_version", 99), ["schema version 99", "reads version 3"]),
    "unknown key": (d.set_json(MANIFEST, "routings", ""), ["unknown key 'routings'", "did you mean 'routing'"]),
    "missing key": (d.set_json(MANIFEST, "capacity", d.ABSENT), ["lacks capacity"]),
    "wrong type": (d.set_json(MANIFEST, "capacity.max_text", "many"), ["capacity.max_text", "'many'", "int"]),
    "schedule with a gap": (
        d.set_json(
            MANIFEST, "schedule.stages", [{"start": 0, "stop": 2, "keep": None}, {"start": 3, "stop": 6, "keep": 1}]
        ),
        ["schedule", "consecutive"],
    ),
    "a template that does not compile": (
        d.then(d.text("chat_template.jinja", "{% for m in %}"), d.rehash),
        ["the chat template does not compile"],
    ),
    "a tokenizer that does not load": (
        d.then(d.text("tokenizer.json", "{}"), d.rehash),
        ["cannot read", "tokenizer.json"],
    ),
}


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*case, id=name) for name, case in CHANGED.items()])
def test_export(damage: d.Damage, says: list[str], exported: Path, refused: Refused) -> None:
    damage(exported)
    refused("build", exported, "-o", exported.parent / "out", says=says)


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "sub/../../outside.txt", ""])
@pytest.mark.parametrize("where", ["file", "part"])
def test_names_outside_the_folder(name: str, where: str, exported: Path, tmp_path: Path, refused: Refused) -> None:
    """A build copies every listed file under its name: a name must not leave the folder."""
    (tmp_path / "outside.txt").write_text("secret")
    data = json.loads((exported / MANIFEST).read_text())
    if where == "file":
        data["files"][name] = {"bytes": 6, "sha256": "0" * 64}
    else:
        data["parts"]["decoder"]["file"] = name
    (exported / MANIFEST).write_text(json.dumps(data))
    refused("build", exported, "-o", tmp_path / "out", says=["outside its folder", name])


def test_no_folder(tmp_path: Path, refused: Refused) -> None:
    refused("build", tmp_path / "nowhere", "-o", tmp_path / "out", says=["nowhere does not exist", "export"])


def test_file_for_a_folder(exported: Path, refused: Refused) -> None:
    refused("build", exported / MANIFEST, says=["is not a folder", "export"])


def test_checkpoint_for_an_export(checkpoint: Path, refused: Refused) -> None:
    refused("build", checkpoint, says=["holds no reroute.json", "reroute export"])


def test_bundle_for_an_export(bundle: Path, refused: Refused) -> None:
    refused("build", bundle, "-o", bundle.parent / "out", says=["is a bundle, not an export", "reroute export"])


@pytest.mark.parametrize("name", ["orrt", "tensort", "a/b", ""])
def test_unknown_backend(name: str, exported: Path, refused: Refused) -> None:
    refused("build", exported, "--backend", name, says=[f"unknown backend {name!r}", "supported: ort"])


@pytest.mark.parametrize(("option", "value"), [("--grounding", "5"), ("--dataset-split", "val"), ("--set", "refcoco")])
def test_questions_that_nobody_asks(option: str, value: str, exported: Path, tmp_path: Path, refused: Refused) -> None:
    arguments = ["build", exported, "-o", tmp_path / "out", "--profile", "int8", option, value]
    refused(*arguments, says=[f"{option} has no meaning without --evaluate"])


def test_output_exists(exported: Path, bundle: Path, refused: Refused) -> None:
    refused("build", exported, "-o", bundle, says=["exists already", "--force"])


def test_output_is_not_ours(exported: Path, checkpoint: Path, refused: Refused) -> None:
    refused("build", exported, "-o", checkpoint, "--force", says="is not a Reroute export or bundle")


def test_output_is_the_export(exported: Path, refused: Refused) -> None:
    refused("build", exported, "-o", exported, "--force", says=["would overwrite the export", "-o"])


def test_forced_build_of_a_bad_export_leaves_the_good_bundle(exported: Path, bundle: Path, refused: Refused) -> None:
    d.flip("vision.onnx.data")(exported)
    refused("build", exported, "-o", bundle, "--force", says="vision.onnx.data has sha256")


def test_a_failed_gate_leaves_the_good_bundle(exported: Path, bundle: Path, refused: Refused) -> None:
    """Weights that are not those of the recorded reference: the engine is right, and answers otherwise."""
    weights = bytearray((exported / "decoder.onnx.data").read_bytes())
    weights[: len(weights) // 2] = bytes(len(weights) // 2)
    (exported / "decoder.onnx.data").write_bytes(weights)
    d.rehash(exported)
    says = ["does not reproduce the reference", "logits", "--no-check"]
    refused("build", exported, "-o", bundle, "--force", says=says, code=EXIT_GATE)
    refused("build", exported, "-o", bundle.parent / "new", says=says, code=EXIT_GATE)


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("disk on fire"), 1), (KeyboardInterrupt(), 130)], ids=["crash", "ctrl-c"]
)
def test_a_build_that_breaks_off_leaves_the_good_bundle(
    error: BaseException, code: int, exported: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("reroute.check.check_bundle", fail)
    before = tree(tmp_path)
    for argv in (["-o", bundle, "--force"], ["-o", tmp_path / "new"]):
        assert cli.main([str(part) for part in ("build", exported, *argv)]) == code
        assert tree(tmp_path) == before
