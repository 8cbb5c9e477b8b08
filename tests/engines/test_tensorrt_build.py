"""From an export to a lowered folder, and on to a bundle, with TensorRT replaced by ONNX Runtime
(tests/tensorrt_fakes)."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from reroute import cli
from reroute.check import check_bundle
from reroute.engines import TensorRTOptions, build, build_engine
from reroute.engines.lowered import require_fixed_shapes
from reroute.engines.targets import TARGETS, Form, LoweringOptions
from reroute.errors import RerouteError, UserError
from reroute.export import export_checkpoint
from reroute.manifest import Manifest
from tests import tensorrt_fakes as fakes
from tests.conftest import REPOSITORY


def options(
    target: str = "orin-jp7",
    form: Form = "native",
    dtype: str = "float32",
    *,
    only_lower: bool = False,
    plugin: Path | None = None,
    **engine: Any,
) -> TensorRTOptions:
    lowering = LoweringOptions(target=target, form=form, dtype=dtype)
    return TensorRTOptions(
        lowering=lowering, only_lower=only_lower, engine=build_engine.Options(plugin=plugin, **engine)
    )


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> fakes.FakeTensorRT:
    return fakes.install(monkeypatch)[0]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "libreroute_trt.so"
    path.write_bytes(b"plugin")
    return path


@pytest.fixture(scope="module")
def lowered(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lowered folder in plugin form. Do not change it."""
    folder = tmp_path_factory.mktemp("lowered") / "folder"
    build(tiny_export, folder, backend="tensorrt", tensorrt=options("orin-jp6", "plugin", "float16", only_lower=True))
    return folder


@pytest.mark.parametrize("target", ["orin-jp6", "orin-jp7"])
@pytest.mark.parametrize(("form", "dtype"), [("native", "float32"), ("plugin", "float32"), ("native", "float16")])
def test_the_built_engine_equals_torch(
    tiny_export: Path, tmp_path: Path, tensorrt: Any, plugin: Path, target: str, form: Form, dtype: str
) -> None:
    """The recorded scenario through the TensorRT backend: vision, slots, every cache, 64 tokens, a later turn."""
    chosen = options(target, form, dtype, plugin=plugin if form == "plugin" else None)
    manifest = build(tiny_export, tmp_path / "bundle", backend="tensorrt", tensorrt=chosen)
    assert manifest.check is not None
    rows = {(row["part"], row["quantity"]): row for row in manifest.check["rows"]}
    assert all(row["passed"] for row in rows.values())
    assert rows["stage 2", "slots"]["measured"] == "28 of 28 equal"
    assert manifest.dtype == dtype
    assert manifest.engine is not None
    assert manifest.engine.plugin_layers == (8 if form == "plugin" else 0)
    assert bool(manifest.engine.plugin_file) == (form == "plugin")
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert names >= {"decoder.engine", "vision.engine", "tokenizer.json", "reference.npz", "reroute.json"}
    assert not any(name.endswith((".onnx", ".data", ".py")) for name in names)
    assert (len(tensorrt.configs[0].profiles), len(tensorrt.configs[1].profiles)) == (2, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tower_that_drops_tokens(tiny_checkpoint: Path, tmp_path: Path, tensorrt: Any, dtype: str) -> None:
    """Nüwa: the vision engine has a second output, and its choices are the reference's."""
    del tensorrt
    export_checkpoint(tiny_checkpoint, tmp_path / "export", routing="removal@3:nuwa=12:keep=4:score=previous")
    manifest = build(tmp_path / "export", tmp_path / "bundle", backend="tensorrt", tensorrt=options(dtype=dtype))
    assert [tensor.name for tensor in manifest.parts["vision"].outputs] == ["visual_embeds", "visual_places"]
    rows = {(row.part, row.quantity): row for row in check_bundle(tmp_path / "bundle").rows}
    assert rows["vision", "places"].measured == "12 of 12 equal"


@pytest.mark.slow
@pytest.mark.parametrize(("target", "form"), [("orin-jp7", "plugin"), ("orin-jp6", "native")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_demo_model(
    demo_export: Path, tmp_path: Path, tensorrt: Any, plugin: Path, target: str, form: Form, dtype: str
) -> None:
    del tensorrt
    chosen = options(target, form, dtype, plugin=plugin)
    manifest = build(demo_export, tmp_path / "bundle", backend="tensorrt", tensorrt=chosen)
    assert manifest.check is not None
    assert manifest.check["passed"]


def test_a_lowered_folder_is_complete(lowered: Path, tiny_export: Path) -> None:
    manifest = Manifest.load(lowered)
    assert (manifest.kind, manifest.backend, manifest.dtype) == ("lowered", "tensorrt", "float16")
    manifest.verify_files(lowered)
    assert manifest.lowering is not None
    assert manifest.lowering.plugin_nodes == {"RerouteGather": 5, "RerouteScatter": 1, "RerouteSelect": 2}
    assert manifest.lowering.tensorrt_min == "10.3"
    assert (lowered / "build_engine.py").read_bytes() == (REPOSITORY / "engines" / "build_engine.py").read_bytes()
    weights = [(folder / "decoder.onnx.data").stat().st_size for folder in (lowered, tiny_export)]
    assert weights[0] == pytest.approx(weights[1] / 2, rel=0.01)
    graph = onnx.load(lowered / "decoder.onnx", load_external_data=False)
    assert not graph.functions
    assert all(
        tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer if len(tensor.dims) > 1
    )
    by_name = {tensor.name: tensor for tensor in manifest.parts["decoder"].inputs}
    assert by_name["past_key_values.5.key"].shape == (1, 2, 512 + 8, 16)
    assert by_name["rope_cos"].dtype == "float32"


def test_profiles_hold_every_step_and_decode_is_one_shape(lowered: Path) -> None:
    manifest = Manifest.load(lowered)
    assert manifest.lowering is not None
    spans = manifest.lowering.profiles["decoder"]
    assert list(spans) == ["prefill", "decode"]
    assert spans["prefill"]["visual_embeds"].max == (1, 72, 64)
    assert (spans["prefill"]["input_ids"].min, spans["prefill"]["input_ids"].max) == ((1, 1), (1, 512))
    assert spans["prefill"]["rope_cos"].max == (584, 8)
    assert all(span.min == span.opt == span.max for span in spans["decode"].values())
    assert spans["decode"]["visual_slots"].max == (0,)
    assert "kv_len" not in spans["prefill"]


def test_two_lowerings_are_byte_identical(lowered: Path, tiny_export: Path, tmp_path: Path) -> None:
    again = options("orin-jp6", "plugin", "float16", only_lower=True)
    build(tiny_export, tmp_path / "again", backend="tensorrt", tensorrt=again)
    names = sorted(path.name for path in lowered.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (lowered / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_an_fp16_graph_is_typed_throughout(lowered: Path) -> None:
    """fp32 stay the logits and what hangs on them, the tables at the door, and the insides of the ops."""
    graph = onnx.load(lowered / "decoder.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {kind for name, kind in kinds.items() if name.startswith(("past", "present", "visual_embeds"))} == {half}
    assert {kinds[name] for name in ("logits", "rope_cos", "rope_sin", "next_logprob")} == {single}


def test_a_weight_beyond_fp16_is_named(tiny_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "layers.3.up_proj.weight")
    offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    with (folder / "decoder.onnx.data").open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.float32(1e6).tobytes())
    _rehash(folder)
    with pytest.raises(UserError, match=r"layers\.3\.up_proj\.weight has a value of 1e\+06"):
        build(folder, tmp_path / "out", backend="tensorrt", tensorrt=options(dtype="float16", only_lower=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_lowers_by_its_own_rules(tiny_export: Path, tmp_path: Path, target: str) -> None:
    manifest = build(tiny_export, tmp_path / "out", backend="tensorrt", tensorrt=options(target, only_lower=True))
    assert manifest.lowering is not None
    assert manifest.lowering.tensorrt_min == TARGETS[target].version


def test_a_graph_that_would_not_parse_is_never_written(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dialect for 10.15 on a machine with 10.3."""
    old = dataclasses.replace(TARGETS["orin-jp7"], tensorrt=(10, 3))
    monkeypatch.setitem(TARGETS, "orin-jp7", old)
    with pytest.raises(UserError, match=r"TensorRT 10\.3 would not parse the decoder: graph: opset 24.*rule opset"):
        build(tiny_export, tmp_path / "out", backend="tensorrt", tensorrt=options(only_lower=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "change", "what"),
    [
        ("vision", {"grids": ((6, 6), (4, 9))}, "each grid"),
        ("text", {"deepstack": 3}, "deepstack"),
        ("schedule", {"pool": "image"}, "for each image"),
        ("schedule", {"heads": "max"}, "scores of several rows, or the largest of all heads"),
        ("schedule", {"rows": 3}, "scores of several rows, or the largest of all heads"),
    ],
)
def test_what_is_not_lowered_yet_is_refused_by_name(
    tiny_export: Path, part: str, change: dict[str, Any], what: str
) -> None:
    manifest = Manifest.load(tiny_export)
    if part == "schedule":
        other = dataclasses.replace(manifest, schedule=dataclasses.replace(manifest.schedule, **change))
    else:
        changed = dataclasses.replace(getattr(manifest.model, part), **change)
        other = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **{part: changed}))
    with pytest.raises(UserError, match=what) as error:
        require_fixed_shapes(other)
    assert "--backend ort" in error.value.hint


def test_an_engine_that_cannot_fit_is_refused_before_anything(tiny_export: Path, tmp_path: Path) -> None:
    lowering = LoweringOptions(target="orin-jp6", memory_bytes=4 * 2**20)
    with pytest.raises(UserError, match=r"running the engine needs about 0\.0 GiB"):
        build(tiny_export, tmp_path / "out", backend="tensorrt", tensorrt=TensorRTOptions(lowering=lowering))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", [{"target": "orin-jp8"}, {"form": "plugins"}, {"dtype": "int8"}])
def test_a_misspelt_option_names_the_nearest(word: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown") as caught:
        LoweringOptions(**{"target": "orin-jp6", **word})
    assert "supported: " in caught.value.hint


def test_without_tensorrt_the_rules_pass_first_and_the_hint_says_how(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["build", str(tiny_export), "-o", str(tmp_path / "out"), "--backend", "tensorrt", "--target", "orin-jp6"]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.index("both graphs pass the rules of TensorRT 10.3") < said.index("error: TensorRT cannot be imported")
    assert "--onnx-only" in said
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*argv, "--onnx-only"]) == 0
    assert "python3 out/build_engine.py out -o BUNDLE" in capsys.readouterr().err
    assert Manifest.load(tmp_path / "out").kind == "lowered"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--backend", "tensorrt"], "needs a target"),
        (["--target", "orin-jp6"], "--target has no meaning for the backend ort"),
        (["--dtype", "float16"], "--dtype has no meaning for the backend ort"),
        (["--backend", "tensorrt", "--target", "orin"], "did you mean 'orin-jp"),
    ],
)
def test_options_that_do_not_fit(
    tiny_export: Path, tmp_path: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(tiny_export), "-o", str(tmp_path / "out"), *argv]) == 2
    assert says in capsys.readouterr().err


def test_the_script_runs_without_reroute_and_says_what_is_missing(lowered: Path, tmp_path: Path) -> None:
    """As on a Jetson: the copied file, an interpreter that sees neither this package nor onnx, and no TensorRT."""
    command = [sys.executable, "-I", "-S", str(lowered / "build_engine.py"), str(lowered), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TensorRT cannot be imported" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def build_script(lowered: Path, bundle: Path, **chosen: Any) -> dict[str, Any]:
    return build_engine.build(lowered, bundle, build_engine.Options(**chosen), lambda line: None)


def test_the_script_and_the_command_build_the_same(
    lowered: Path, tiny_export: Path, tmp_path: Path, tensorrt: Any, plugin: Path
) -> None:
    build_script(lowered, tmp_path / "one", plugin=plugin)
    tensorrt.libraries.clear()
    chosen = options("orin-jp6", "plugin", "float16", plugin=plugin)
    build(tiny_export, tmp_path / "two", backend="tensorrt", tensorrt=chosen, check=False)
    assert (tmp_path / "one" / "reroute.json").read_bytes() == (tmp_path / "two" / "reroute.json").read_bytes()


def damaged(lowered: Path, tmp_path: Path) -> Path:
    shutil.copytree(lowered, tmp_path / "damaged")
    return tmp_path / "damaged"


def test_the_script_refuses_what_was_changed(lowered: Path, tmp_path: Path, tensorrt: Any) -> None:
    del tensorrt
    folder = damaged(lowered, tmp_path)
    weights = (folder / "decoder.onnx.data").read_bytes()
    (folder / "decoder.onnx.data").write_bytes(bytes([weights[0] ^ 1]) + weights[1:])
    with pytest.raises(build_engine.BuildError, match=r"decoder\.onnx\.data is missing or was changed"):
        build_script(folder, tmp_path / "out")
    (folder / "decoder.onnx.data").write_bytes(weights)
    data = json.loads((folder / "reroute.json").read_text())
    data["files"] = {"../outside": {"bytes": 0, "sha256": ""}, **data["files"]}
    (folder / "reroute.json").write_text(json.dumps(data))
    with pytest.raises(build_engine.BuildError, match="outside its folder"):
        build_script(folder, tmp_path / "out")
    with pytest.raises(build_engine.BuildError, match="is not a lowered folder"):
        build_script(tmp_path / "nowhere", tmp_path / "out")


def test_plugins_are_loaded_and_counted(lowered: Path, tmp_path: Path, tensorrt: Any, plugin: Path) -> None:
    with pytest.raises(build_engine.BuildError, match="no plugin library was given"):
        build_script(lowered, tmp_path / "out")
    plugin.write_bytes(b"something else")
    with pytest.raises(build_engine.BuildError, match="does not load"):
        build_script(lowered, tmp_path / "out", plugin=plugin)
    plugin.write_bytes(b"plugin")
    tensorrt.drop_plugins = True
    with pytest.raises(build_engine.BuildError, match="0 plugin layers, expected are 8"):
        build_script(lowered, tmp_path / "out", plugin=plugin)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_parser_error_names_the_node(lowered: Path, tmp_path: Path, tensorrt: Any, plugin: Path) -> None:
    tensorrt.refuse = {"vision.onnx"}
    with pytest.raises(build_engine.BuildError, match=r"vision\.onnx: node_7 \(TopK\): K must be positive"):
        build_script(lowered, tmp_path / "out", plugin=plugin)


@pytest.mark.parametrize(
    ("version", "ok"), [("10.2.0", False), ("10.3.0.26", True), ("11.4.0", True), ("9.3.0", False), ("12.0.0", False)]
)
def test_the_version_has_to_be_one_that_was_checked(
    tensorrt: Any, monkeypatch: pytest.MonkeyPatch, version: str, ok: bool
) -> None:
    del tensorrt
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", version)
    if ok:
        assert build_engine.import_tensorrt("10.3").__version__ == version
    else:
        with pytest.raises(build_engine.BuildError, match=version):
            build_engine.import_tensorrt("10.3")


def test_too_little_memory_on_the_device(
    lowered: Path, tmp_path: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tensorrt
    small = build_engine.Device("8.7", "Tiny", 2**20)
    monkeypatch.setattr(build_engine, "cuda_device", lambda: small)
    with pytest.raises(build_engine.BuildError, match=r"needs about 0\.0 GiB, Tiny has"):
        build_script(lowered, tmp_path / "out")


def test_the_timing_cache_is_read_and_written(lowered: Path, tmp_path: Path, tensorrt: Any, plugin: Path) -> None:
    cache = tmp_path / "tactics"
    build_script(lowered, tmp_path / "one", plugin=plugin, timing_cache=cache)
    assert cache.read_bytes() == b".."  # once for each part
    build_script(lowered, tmp_path / "one", plugin=plugin, timing_cache=cache, force=True, workspace_mib=8)
    assert cache.read_bytes() == b"...."
    assert tensorrt.configs[-1].pools == {0: 8 * 2**20}
    cache.write_bytes(b"another device")
    with pytest.raises(build_engine.BuildError, match="of another device"):
        build_script(lowered, tmp_path / "two", plugin=plugin, timing_cache=cache)


def test_an_existing_output_is_safe(lowered: Path, tmp_path: Path, tensorrt: Any, plugin: Path) -> None:
    del tensorrt
    (tmp_path / "out").mkdir()
    with pytest.raises(build_engine.BuildError, match="is not a bundle"):
        build_script(lowered, tmp_path / "out", plugin=plugin, force=True)
    build_script(lowered, tmp_path / "bundle", plugin=plugin)
    with pytest.raises(build_engine.BuildError, match="exists already"):
        build_script(lowered, tmp_path / "bundle", plugin=plugin)
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    with pytest.raises(build_engine.BuildError, match=r"holds notes\.txt"):
        build_script(lowered, tmp_path / "bundle", plugin=plugin, force=True)


def test_a_failed_build_through_the_command_is_an_ordinary_error(
    tiny_export: Path, tmp_path: Path, tensorrt: Any
) -> None:
    tensorrt.refuse = {"decoder.onnx"}
    with pytest.raises(RerouteError, match="does not parse") as caught:
        build(tiny_export, tmp_path / "out", backend="tensorrt", tensorrt=options())
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def _rehash(folder: Path) -> None:
    from reroute.manifest import file_table

    dataclasses.replace(Manifest.load(folder), files=file_table(folder)).save(folder)
