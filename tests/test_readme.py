"""The commands and the Python of the README are real: they parse, and every name in them exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from reroute.cli import build_parser
from reroute.routing import RoutingSpec

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("reroute ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    args = build_parser().parse_args(shlex.split(command)[1:])
    if routing := getattr(args, "routing", None):
        RoutingSpec.parse(routing)


def test_there_are_commands_to_check() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} == {
        "export",
        "build",
        "run",
        "eval",
        "bench",
        "compare",
        "check",
        "inspect",
        "doctor",
        "tune",
    }


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shell = "".join(block for language, block in BLOCKS if language == "bash")
    used = set(re.findall(r"^make (\w+)", shell, flags=re.MULTILINE))
    assert used == {"demo", "test"}
    assert used <= targets


def test_ci_runs_the_test_command() -> None:
    assert "exec make test" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_python_uses_the_real_api() -> None:
    """Attributes used in the README's example exist on the objects they are used on."""
    from reroute.runtime import Answer, Session, Timings, Token

    known = {
        "Session": Session,
        "session": Session,
        "answer": Answer,
        "timings": Timings,
        "token": Token,
    }
    (source,) = (block for language, block in BLOCKS if language == "python")
    used = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            kind = known[name]
            fields = getattr(kind, "__dataclass_fields__", {})
            assert hasattr(kind, node.attr) or node.attr in fields, f"{kind.__name__}.{node.attr}"
            used += 1
    assert used >= 6


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (REPOSITORY / path).exists()
