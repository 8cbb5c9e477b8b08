"""Processes that measure: one for each environment, so that libraries which exclude each other run in the same rounds.

A worker loads its models once and then runs one repetition for each request; it times itself, so the pipe is in no
figure. Both sides of the protocol are here. A message is one line of JSON:

    worker  {"ready": {...}}                      once, with facts such as versions
    parent  {"call": "NAME", "with": {...}}       the name of a handler and its keyword arguments
    worker  {"result": ...} or {"error": "..."}

This module needs the standard library only: foreign environments import it (Python 3.10).

What is not running must not take a core. ONNX Runtime's idle threads spin between runs unless told to stop at their end
(`session.force_spinning_stop`), as every session here is unless --spinning asks for it on all sides.
OpenMP's threads (torch, llama.cpp) spin for a few milliseconds after a parallel region and then sleep; with
OMP_WAIT_POLICY=passive they would sleep at once, which slows their own small regions down. So they keep their default,
and the parent waits `SETTLE_S` before every call. Intel's OpenMP spins for 200 ms: KMP_BLOCKTIME cuts that to
`SETTLE_S` too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTLE_S = 0.1
REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker that did not start, ended, or refused a call; the message has its own words."""


class Worker:
    """The parent's side: a process that answers `call`. Close it, or use it in a `with`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        threads: int,
        path: Sequence[Path] = (),
        settle_s: float = SETTLE_S,
    ) -> None:
        """Start the process and wait until it has loaded.

        Args:
            command: program and arguments.
            log: file for everything that it prints to stderr, and to stdout outside the protocol.
            threads: CPU threads of its libraries.
            path: folders in front of its import path; the repository's root and `src` come after them.
            settle_s: seconds to wait before each call.

        Raises:
            WorkerError: it ended or said something else first.
        """
        self._log, self._settle_s = log, settle_s
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY, REPOSITORY / "src"))),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "KMP_BLOCKTIME": str(round(1e3 * settle_s)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, env=environment, text=True
            )
        self.facts: dict[str, Any] = self._read("ready")

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Run a handler and return its result. Raises WorkerError."""
        time.sleep(self._settle_s)
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise self._dead()
        try:
            self._process.stdin.write(json.dumps({"call": name, "with": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._dead() from error
        return self._read("result")

    def close(self) -> None:
        """End the process: its input closes, and if that is not enough it is killed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, wanted: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._dead()
        message = json.loads(line)
        if wanted not in message:
            words = message.get("error", f"answered {sorted(message)} instead of {wanted}")
            if wanted == "ready":
                self.close()
            raise WorkerError(f"{words} (log: {self._log})")
        return message[wanted]

    def _dead(self) -> WorkerError:
        self.close()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        return WorkerError(f"a worker ended with status {self._process.returncode}: {last} (log: {self._log})")


def serve(load: Callable[[], tuple[Mapping[str, Callable[..., Any]], Mapping[str, Any]]]) -> None:
    """The worker's side: load, say so, and answer until the input ends.

    `load` returns the handlers by name and the facts for `ready`. What libraries print to stdout goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        handlers, facts = load()
    except Exception as error:  # whatever a foreign library raises: the parent is told, and ends
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
        return
    say(ready=dict(facts))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(result=handlers[request["call"]](**request["with"]))
        except Exception as error:
            traceback.print_exc()
            say(error=f"{type(error).__name__}: {error}")
