"""A worker for the tests: `python fake_worker.py MODE`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.shared.worker import serve


def load() -> tuple[dict[str, Any], dict[str, Any]]:
    mode = sys.argv[1]
    if mode == "does-not-load":
        raise RuntimeError("no such model")
    print("noise of a library on stdout")

    def add(*, name: str, a: int, b: int) -> dict[str, Any]:
        print("more noise")
        return {"name": name, "sum": a + b, "process": os.getpid()}

    def refuse() -> None:
        raise ValueError("not with me")

    def die() -> None:
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)

    def environment() -> dict[str, str]:
        return {name: os.environ[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH")}

    return {"add": add, "refuse": refuse, "die": die, "environment": environment, "now": time.monotonic}, {"mode": mode}


if __name__ == "__main__":
    serve(load)
