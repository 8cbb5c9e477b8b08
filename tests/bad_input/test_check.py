"""`reroute check`, `reroute inspect` and the command line itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import damage as d
from tests.bad_input.conftest import Refused
from tests.conftest import TinyLlava, make_llava


def test_another_checkpoint(tiny_bundle: Path, tmp_path: Path, refused: Refused) -> None:
    """Same shapes, other weights: only the fingerprint can tell."""
    other = make_llava(tmp_path / "other", TinyLlava(seed=1))
    says = ["is not the checkpoint of this bundle", "fingerprint", "the bundle's"]
    refused("check", tiny_bundle, "--checkpoint", other, says=says)


def test_checkpoint_with_one_bit_changed(tiny_bundle: Path, checkpoint: Path, refused: Refused) -> None:
    d.flip(d.WEIGHTS)(checkpoint)
    refused("check", tiny_bundle, "--checkpoint", checkpoint, says="is not the checkpoint of this bundle")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--image", "x.png"], ["needs the reference to run", "--checkpoint"], id="image alone"),
        pytest.param(["--prompt", "what"], ["needs the reference to run", "--checkpoint"], id="prompt alone"),
        pytest.param(["--tokens", "0"], ["--tokens", "less than 1"], id="no tokens"),
        pytest.param(["--checkpoint", "nowhere"], ["nowhere is not a directory"], id="no checkpoint"),
    ],
)
def test_arguments(argv: list[str], says: list[str], tiny_bundle: Path, refused: Refused) -> None:
    refused("check", tiny_bundle, *argv, says=says)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--image", "nowhere.png"], ["there is no image nowhere.png"], id="no image"),
        pytest.param(["--prompt", "two <image>"], ["2 <image> placeholders, but 1 images"], id="placeholder"),
        pytest.param(["--tokens", "600"], ["631 text tokens", "512", "--tokens"], id="too many tokens"),
        pytest.param(["--prompt", "red " * 600], ["text tokens", "512", "--max-text"], id="long prompt"),
        pytest.param(["--prompt", " "], ["the prompt is empty"], id="empty prompt"),
    ],
)
def test_live_reference(
    argv: list[str], says: list[str], tiny_bundle: Path, tiny_checkpoint: Path, refused: Refused
) -> None:
    refused("check", tiny_bundle, "--checkpoint", tiny_checkpoint, *argv, says=says)


def test_export_for_a_bundle(exported: Path, refused: Refused) -> None:
    refused("check", exported, says=["is an export, not an engine bundle", "reroute build"])


def test_no_bundle(tmp_path: Path, refused: Refused) -> None:
    refused("check", tmp_path / "nowhere", says=["nowhere", "does not exist", "bundle"])


def test_changed_bundle(bundle: Path, refused: Refused) -> None:
    d.flip("reference.npz")(bundle)
    refused("check", bundle, says=["reference.npz has sha256", "the manifest says"])


def test_inspect_of_nothing(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused("inspect", tmp_path / "nowhere", says=["does not exist"])
    refused("inspect", tmp_path / "empty", says=["neither reroute.json nor config.json"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param([], ["COMMAND", "reroute --help"], id="none"),
        pytest.param(["exprot", "x"], ["'exprot'", "export", "reroute --help"], id="misspelt"),
        pytest.param(["export", "x"], ["--routing", "reroute export --help"], id="argument missing"),
        pytest.param(["build", "x", "y"], ["y", "--help"], id="argument too many"),
    ],
)
def test_command(argv: list[str], says: list[str], refused: Refused) -> None:
    refused(*argv, says=says)
