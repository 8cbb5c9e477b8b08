"""`reroute run` with a system text: --system, --save-prefix, --prefix."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from reroute.cli import main
from reroute.runtime import Prefix
from tests.conftest import REPOSITORY
from tests.runtime.test_chat import LLAVA
from tests.runtime.test_prefix import with_template

IMAGE = str(REPOSITORY / "demo" / "images" / "scene1.png")
SYSTEM = "is there a blue square ?"
ASK = ["--prompt", "where is the red star ?", "--image", IMAGE, "--max-new-tokens", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with a chat template that has a system role. Do not change it."""
    return with_template(tiny_bundle, tmp_path_factory.mktemp("system") / "bundle", LLAVA)


def test_a_saved_prefix_answers_as_the_text_that_it_was_made_of(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, saved = tmp_path / "system.txt", tmp_path / "new" / "system.npz"
    text.write_text(SYSTEM + "\n", encoding="utf-8")
    runs = [["--system", f"@{text}", "--save-prefix", str(saved)], ["--system", SYSTEM], ["--prefix", str(saved)], []]
    turns = []
    for options in runs:
        assert main(["run", str(bundle), *ASK, *options, "--json"]) == 0
        out, err = capsys.readouterr()
        turns.append(json.loads(out)["turns"][0])
        assert ("wrote" in err) == ("--save-prefix" in options)
    prefix = Prefix.load(saved)
    assert prefix.system == SYSTEM
    assert [path.name for path in saved.parent.iterdir()] == ["system.npz"]
    assert [turn["prefix_tokens"] for turn in turns] == [len(prefix.token_ids)] * 3 + [0]
    assert [turn["token_ids"] for turn in turns[1:3]] == [turns[0]["token_ids"]] * 2
    # The prompt without a system text is two tokens longer: <s> and USER: are in the prefix.
    assert [turn["prompt_tokens"] for turn in turns] == [turns[3]["prompt_tokens"] - 2] * 3 + [
        turns[3]["prompt_tokens"]
    ]


def test_the_report_says_what_was_taken_and_reused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["--prompt", "how many stars are there ?", "--image", IMAGE]
    assert main(["run", str(bundle), *ASK, *again, "--system", SYSTEM]) == 0
    err = capsys.readouterr().err
    assert "8 prompt tokens were taken from it and not run" in err
    assert "1, whose features were taken again" in err
    assert main(["run", str(bundle), *ASK]) == 0
    err = capsys.readouterr().err
    assert "saved prefix" not in err
    assert "taken again" not in err


def test_reset_goes_back_to_the_prefix(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "where is the red star ?\nhow many ?\n/reset\nwhere is the red star ?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["run", str(bundle), "--interactive", "--system", SYSTEM, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    first, _, third = out.splitlines()
    assert first == third
    assert "16 prompt tokens were taken" in err
