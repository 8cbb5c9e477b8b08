"""docs/tuning.md is real: its commands parse, its TOML is a space, and what it counts is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from reroute.cli import build_parser
from reroute.manifest import Capacity
from reroute.routing import RoutingSpec
from reroute.tuning import budgets, command, screening
from reroute.tuning.command import bounds_of
from reroute.tuning.space import Space, entries_of, parse_space, read_space
from tests.conftest import REPOSITORY
from tests.model_descriptions import model_of

PAGE = (REPOSITORY / "docs" / "tuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line.partition(" #")[0].removeprefix("$ ").strip()
    for language, block in BLOCKS
    if language != "toml"
    for line in block.replace("\\\n", " ").splitlines()
    if line.removeprefix("$ ").startswith("reroute ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse_and_their_spaces_resolve(line: str):
    args = build_parser().parse_args(shlex.split(line)[1:])
    if args.command == "tune":
        assert bounds_of(args).words()
        names = ("methods", "averages", "layers", "shapes")
        space = parse_space(args.space, **{name: getattr(args, name) for name in names})
        assert len(entries_of(space, model_of(), Capacity(), num_text=args.text)) > 1


def test_there_are_commands():
    assert len(COMMANDS) == 6


def test_the_file_is_a_space(tmp_path: Path):
    (block,) = (block for language, block in BLOCKS if language == "toml")
    (tmp_path / "space.toml").write_text(block)
    space = read_space(tmp_path / "space.toml")
    assert len(space.texts()) == 2 * 2 * 2 + 2
    for text in space.texts():
        RoutingSpec.parse(text)


def test_the_numbers_of_the_page_are_those_of_the_code():
    assert f"{len(Space().texts())} schedules" in PAGE
    assert f"and {screening.MAX_BATCH} candidates" in PAGE
    assert f"After {screening.PROBE_ROUNDS} rounds" in PAGE
    assert screening.MARGIN == 1.25  # "by more than a quarter"
    assert budgets.FINALISTS == 3  # "at most three"
    assert f"{command.QUESTIONS} questions of each" in PAGE
