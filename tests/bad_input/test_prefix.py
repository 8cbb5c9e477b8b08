"""`reroute run` with system texts and prefixes that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reroute.runtime import Prefix, Session
from tests.bad_input import damage as d
from tests.bad_input.conftest import Refused
from tests.runtime.test_chat import LLAVA

ASK = ("--prompt", "what is there ?")


@pytest.fixture
def talking(bundle: Path) -> Path:
    """A bundle to damage, whose chat template has a system role."""
    d.then(d.text("chat_template.jinja", LLAVA), d.rehash)(bundle)
    return bundle


@pytest.fixture
def saved(talking: Path, tmp_path: Path) -> Path:
    """A good prefix of `talking`."""
    with Session.open(talking, threads=1) as session:
        session.prefix("is there a red star ?").save(tmp_path / "good.npz")
    return tmp_path / "good.npz"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--save-prefix", "new.npz"], ["--save-prefix needs a system text", "--system"]),
        (["--system", "x", "--prefix", "good.npz"], ["--prefix has its own system text", "leave --system out"]),
        (["--prefix", "nowhere.npz"], ["there is no prefix", "nowhere.npz", "--save-prefix"]),
        (["--system", "@nowhere.txt"], ["cannot read the system text", "nowhere.txt"]),
        (["--system", "@latin.txt"], ["latin.txt is not UTF-8"]),
        (["--system", " "], ["the system text is empty"]),
        (["--system", "the <image> here"], ["holds <image>", "text only"]),
        (["--system", "x", "--save-prefix", "good.npz/new.npz"], ["good.npz is not a folder", "system.npz"]),
        (["--system", "x", "--save-prefix", "bundle"], ["bundle is a folder", "system.npz"]),
        (["--system", "star " * 600], ["needs", "cache rows"]),
    ],
)
def test_options(
    options: list[str],
    says: list[str],
    talking: Path,
    saved: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert saved.is_file()
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    monkeypatch.chdir(tmp_path)
    refused("run", talking, *ASK, *options, says=says)


def test_a_template_without_a_system_role(bundle: Path, tmp_path: Path, refused: Refused) -> None:
    options = ("--system", "x", "--save-prefix", tmp_path / "new.npz")
    refused("run", bundle, *ASK, *options, says=["no system role", "first question"])


def test_damaged(talking: Path, saved: Path, refused: Refused) -> None:
    d.truncate(saved.name)(saved.parent)
    refused("run", talking, *ASK, "--prefix", saved, says=["cannot read good.npz", "--save-prefix"])


def test_another_archive(talking: Path, saved: Path, refused: Refused) -> None:
    np.savez(saved, a=np.zeros(3))
    refused("run", talking, *ASK, "--prefix", saved, says=["is not a saved prefix", "--save-prefix"])


def test_another_engine(talking: Path, saved: Path, refused: Refused) -> None:
    d.set_json("reroute.json", "schedule.stages", _other_stages(talking))(talking)
    mine = Prefix.load(saved).decoder_sha256[:12]
    refused("run", talking, *ASK, "--prefix", saved, says=["another engine", mine, "--save-prefix"])


def _other_stages(bundle: Path) -> object:
    import json

    stages = json.loads((bundle / "reroute.json").read_text())["schedule"]["stages"]
    stages[1]["keep"] = 6
    return stages
