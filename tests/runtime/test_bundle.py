import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reroute.errors import UserError
from reroute.runtime.backend import BACKENDS, BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from tests.runtime import fakes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fakes.write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "reroute.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens_and_gives_its_parts(folder: Path) -> None:
    bundle = Bundle.open(str(folder))
    assert bundle.part("decoder") == folder / "decoder.onnx"
    assert bundle.tokenizer().token_to_id("<image>") == fakes.IMAGE
    assert bundle.chat().first_turn([fakes_message()])[0] == fakes.BOS


def fakes_message() -> dict[str, object]:
    return {"role": "user", "content": [{"type": "text", "text": "where"}]}


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        Bundle.open(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(UserError, match=r"reroute\.json"):
        Bundle.open(tmp_path)


def test_an_export_is_not_a_bundle(folder: Path) -> None:
    edit(folder, kind="export")
    with pytest.raises(UserError, match="is an export") as caught:
        Bundle.open(folder)
    assert "reroute build" in caught.value.hint


@pytest.mark.parametrize("name", ["tokenizer.json", "decoder.onnx", "chat_template.jinja"])
def test_a_changed_file_is_found_before_loading(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b" ")
    with pytest.raises(UserError, match=f"{name} has"):
        Bundle.open(folder)
    assert Bundle.open(folder, verify=False).path == folder


def test_a_file_changed_at_equal_size_is_found(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("ASSISTANT", "ASSISTANU"))
    with pytest.raises(UserError, match="sha256"):
        Bundle.open(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "vision.onnx").unlink()
    with pytest.raises(UserError, match=r"lacks vision\.onnx"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../elsewhere.onnx", "other.onnx"])
def test_a_part_outside_the_file_table_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    part = {"file": name, "inputs": [], "outputs": []}
    edit(folder, parts={"decoder": part, "vision": part})
    with pytest.raises(UserError, match=r"elsewhere|does not list"):
        Bundle.open(folder)


def test_a_missing_part_is_refused(folder: Path) -> None:
    edit(folder, parts={"decoder": {"file": "decoder.onnx", "inputs": [], "outputs": []}})
    with pytest.raises(UserError, match="no part 'vision'"):
        Bundle.open(folder)


def test_a_broken_tokenizer_is_a_user_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Bundle.open(folder, verify=False).tokenizer()


def test_truncation_and_padding_of_the_checkpoint_are_off(tmp_path: Path) -> None:
    tokenizer = fakes.word_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    fakes.write_bundle(tmp_path / "bundle", tokenizer=tokenizer)
    ids = Bundle.open(tmp_path / "bundle").tokenizer().encode("where is the cat").ids
    assert len(ids) == 5


def test_an_unknown_backend_names_the_known_ones(make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle(backend="tpu")
    with pytest.raises(UserError, match="'tpu'") as caught:
        open_backend(bundle)
    assert all(name in caught.value.hint for name in BACKENDS)


@pytest.mark.parametrize("options", [{"threads": 0}, {"provider": "tpu"}])
def test_options_are_validated(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        BackendOptions(**options)  # type: ignore[arg-type]


def test_a_graph_that_onnxruntime_cannot_load_is_a_user_error(make_bundle: Callable[..., Bundle]) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=r"cannot load vision\.onnx"):
        open_backend(make_bundle())


def test_without_onnxruntime_the_hint_installs_it(
    make_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="ONNX Runtime") as caught:
        open_backend(make_bundle())
    assert "reroute[ort]" in caught.value.hint


def test_a_missing_provider_names_the_available_ones(make_bundle: Callable[..., Bundle]) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UserError, match=r"no CUDAExecutionProvider, only .*CPUExecutionProvider"):
        open_backend(make_bundle(), BackendOptions(provider="cuda"))
