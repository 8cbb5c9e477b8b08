"""Errors that a user can act on. Everything else is a defect and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_GATE = 3


class RerouteError(Exception):
    """One clear sentence and one hint; the command line prints both and exits with `exit_code`.

    Attributes:
        message: what is wrong, with both numbers where two numbers disagree.
        hint: what to do about it, or an empty string.
        exit_code: process exit code.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class UserError(RerouteError):
    """Bad input: a wrong argument, file, checkpoint, image or bundle (exit code 2)."""

    exit_code = EXIT_USAGE


class GateError(RerouteError):
    """A comparison or a regression gate failed (exit code 3)."""

    exit_code = EXIT_GATE


def nearest(word: str, choices: Iterable[str]) -> str:
    """A phrase for an unknown `word`: the nearest of `choices` if one is near, and all of them."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1)
    start = f"did you mean {close[0]!r}? " if close else ""
    return f"{start}supported: {', '.join(names)}"
