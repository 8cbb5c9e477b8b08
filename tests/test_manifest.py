"""The manifest: what is written is what is read, and anything else is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reroute.errors import EXIT_USAGE, UserError
from reroute.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    Capacity,
    Manifest,
    Part,
    Tensor,
    decode,
    file_table,
    sha256_of,
)
from reroute.routing import RoutingSpec
from tests.model_descriptions import model_of

SPEC = "reroute@2,7,15,23:avg=1/9"


def manifest_of(folder: Path, **changes: Any) -> Manifest:
    schedule = RoutingSpec.parse(SPEC).resolve(num_layers=32, num_visual=576)
    capacity = Capacity(max_text=100, max_images=2)
    manifest = Manifest(
        kind="bundle",
        backend="ort",
        dtype="float32",
        checkpoint_sha256="0" * 64,
        model=model_of(),
        routing=SPEC,
        schedule=schedule,
        average_visual_tokens=schedule.average_visual_tokens(576),
        capacity=capacity,
        cache_rows=capacity.cache_rows(schedule, 576),
        parts={
            "decoder": Part(
                file="decoder.onnx",
                inputs=(Tensor(name="input_ids", dtype="int64", shape=("B", "T")),),
                outputs=(Tensor(name="logits", dtype="float32", shape=("B", 32064)),),
            )
        },
        files=file_table(folder),
        estimates={"peak_bytes": 1.5e10},
        versions={"onnx": "1.23.0", "torch": "2.13.0"},
    )
    return dataclasses.replace(manifest, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "decoder.onnx").write_bytes(b"graph" * 1000)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tokenizer.json").write_text("{}")
    manifest_of(tmp_path).save(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / FILE_NAME
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as error:
        Manifest.load(folder)
    assert error.value.exit_code == EXIT_USAGE
    assert error.value.hint
    return error.value


def test_round_trip(folder: Path):
    assert Manifest.load(folder) == manifest_of(folder)


@pytest.mark.parametrize("check", [None, {"passed": True, "rows": [{"part": "decoder", "gate": 0.1}]}])
def test_round_trip_is_byte_identical(folder: Path, check: dict[str, Any] | None):
    manifest_of(folder, check=check).save(folder)
    text = (folder / FILE_NAME).read_text()
    loaded = Manifest.load(folder)
    assert loaded.check == check
    assert loaded.to_json() == text


def test_equal_manifests_are_equal_bytes_whatever_the_order_of_insertion(folder: Path):
    first = manifest_of(folder, versions={"a": "1", "b": "2"}, estimates={"x_bytes": 1.0, "a_flops": 2.0})
    second = manifest_of(folder, versions={"b": "2", "a": "1"}, estimates={"a_flops": 2.0, "x_bytes": 1.0})
    assert first == second
    assert first.to_json() == second.to_json()


def test_cache_rows_follow_from_capacity_and_schedule():
    schedule = RoutingSpec.parse("reroute@2,7:keep=600,10").resolve(num_layers=8, num_visual=1000)
    assert Capacity(max_text=100, max_images=3).cache_rows(schedule, 576) == (1828, 1828, 130)


@pytest.mark.parametrize(
    ("edit", "message", "hint"),
    [
        (lambda d: d.update(backnd="ort"), "unknown key 'backnd'", "did you mean 'backend'?"),
        (
            lambda d: d["model"]["text"].update(head_dims=1),
            "reroute.json.model.text has an unknown key",
            "'head_dim'",
        ),
        (lambda d: d.pop("dtype"), "lacks dtype", "again"),
        (lambda d: d["model"].pop("image"), "reroute.json.model lacks image", "again"),
        (lambda d: d.update(kind="engine"), "reroute.json.kind is 'engine'", "again"),
        (lambda d: d["model"]["text"].update(num_layers="32"), "num_layers is '32', expected int", "again"),
        (lambda d: d["model"]["text"].update(num_layers=True), "num_layers is True, expected int", "again"),
        (lambda d: d["model"]["text"].update(num_layers=32.0), "num_layers is 32.0, expected int", "again"),
        (lambda d: d.update(average_visual_tokens=False), "average_visual_tokens is False", "again"),
        (lambda d: d["model"]["vision"].update(grid=[24]), "model.vision.grid is [24]", "again"),
        (
            lambda d: d["parts"]["decoder"]["inputs"][0].update(shape=[True]),
            "inputs[0].shape[0] is True",
            "again",
        ),
        (lambda d: d["files"].update(x=3), "reroute.json.files.x is 3, expected an object", "again"),
        (lambda d: d.update(check=[1]), "reroute.json.check is [1]", "again"),
        (lambda d: d.update(cache_rows=7), "reroute.json.cache_rows is 7", "again"),
        (lambda d: d["schedule"]["stages"].pop(1), "reroute.json.schedule is not consistent", "again"),
        (
            lambda d: d["schedule"]["stages"][1].update(keep=-5),
            "reroute.json.schedule is not consistent",
            "again",
        ),
        (
            lambda d: d["schedule"].update(action="rerout"),
            "reroute.json.schedule.action is 'rerout'",
            "again",
        ),
        (
            lambda d: d.update(schema_version=99),
            f"schema version 99, this Reroute reads version {SCHEMA_VERSION}",
            "again",
        ),
        (lambda d: d.clear(), "schema version None", "again"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_by_name(folder: Path, edit: Any, message: str, hint: str):
    change(folder, edit)
    error = refused(folder)
    assert message in error.message
    assert hint in error.hint


def test_an_unknown_key_is_refused_even_inside_the_stages(folder: Path):
    change(folder, lambda d: d["schedule"]["stages"][0].update(keeps=3))
    assert "schedule.stages[0] has an unknown key 'keeps'" in refused(folder).message


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1', "[1]", "null", '"reroute"', "\x00"])
def test_a_manifest_that_is_not_an_object_is_refused(folder: Path, text: str):
    (folder / FILE_NAME).write_text(text)
    refused(folder)


def test_a_manifest_that_is_not_text_is_refused(folder: Path):
    (folder / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refused(folder).message


def test_a_truncated_manifest_is_refused_wherever_it_was_cut(folder: Path):
    text = (folder / FILE_NAME).read_text().rstrip()
    for length in range(0, len(text), 97):
        (folder / FILE_NAME).write_text(text[:length])
        refused(folder)


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path):
    assert "reroute build" in refused(tmp_path).hint


def test_files_as_built_verify(folder: Path):
    Manifest.load(folder).verify_files(folder)


def test_a_changed_byte_is_found(folder: Path):
    path = folder / "decoder.onnx"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"decoder\.onnx has sha256"):
        Manifest.load(folder).verify_files(folder)


def test_a_truncated_file_gives_both_sizes(folder: Path):
    (folder / "decoder.onnx").write_bytes(b"graph")
    with pytest.raises(UserError, match=r"decoder\.onnx has 5 bytes, the manifest says 5000"):
        Manifest.load(folder).verify_files(folder)


def test_a_missing_file_is_found(folder: Path):
    (folder / "sub" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks sub/tokenizer\.json"):
        Manifest.load(folder).verify_files(folder)


def test_the_file_table_lists_all_but_the_manifest_itself(folder: Path):
    (folder / "sub" / FILE_NAME).write_text("a file of this name elsewhere is a file like any other")
    table = file_table(folder)
    assert list(table) == ["decoder.onnx", "sub/reroute.json", "sub/tokenizer.json"]
    assert table["decoder.onnx"].bytes == 5000


def test_sha256_of_a_file_is_that_of_all_its_bytes(tmp_path: Path):
    path = tmp_path / "data"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(data := bytes(range(256)) * 9000)  # more than one block
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()


def test_decode_tries_every_member_of_a_union():
    assert decode(int | str, "B", where="x") == "B"
    assert decode(int | str, 3, where="x") == 3
    assert decode(dict[str, Any] | None, {"a": 1}, where="x") == {"a": 1}
    with pytest.raises(UserError, match=r"x is 1\.5"):
        decode(int | str, 1.5, where="x")
