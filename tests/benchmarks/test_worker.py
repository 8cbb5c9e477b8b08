"""The protocol between a measurement and the processes of foreign environments."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.shared.worker import Worker, WorkerError

SCRIPT = Path(__file__).with_name("fake_worker.py")


def start(tmp_path: Path, mode: str = "plain", **options: object) -> Worker:
    settings = {"threads": 3, "settle_s": 0.0, **options}
    return Worker([sys.executable, str(SCRIPT), mode], log=tmp_path / "logs" / "fake.log", **settings)  # type: ignore[arg-type]


def test_calls_are_answered_by_one_process_whatever_it_prints(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        assert worker.facts == {"mode": "plain"}
        first = worker.call("add", name="a", a=1, b=2)
        second = worker.call("add", name="b", a=3, b=4)
    assert (first["sum"], second["sum"], second["name"]) == (3, 7, "b")
    assert first["process"] == second["process"] != os.getpid()
    assert (tmp_path / "logs" / "fake.log").read_text().count("noise") == 3


def test_an_error_of_a_handler_is_told_and_the_worker_goes_on(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        with pytest.raises(WorkerError, match="ValueError: not with me"):
            worker.call("refuse")
        with pytest.raises(WorkerError, match="KeyError: 'unheard-of'"):
            worker.call("unheard-of")
        assert worker.call("add", name="", a=1, b=1)["sum"] == 2


def test_a_worker_that_does_not_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="RuntimeError: no such model"):
        start(tmp_path, "does-not-load")


def test_a_worker_that_dies_leaves_its_status_and_last_words(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        with pytest.raises(WorkerError, match="status 7: the last words"):
            worker.call("die")
        with pytest.raises(WorkerError, match="status 7"):
            worker.call("add", name="", a=1, b=1)


def test_threads_and_import_path_reach_the_worker(tmp_path: Path) -> None:
    with start(tmp_path, path=[tmp_path / "first"]) as worker:
        found = worker.call("environment")
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "first")


def test_every_call_waits_for_the_threads_of_the_one_before(tmp_path: Path) -> None:
    with start(tmp_path, settle_s=0.05) as worker:
        before = time.monotonic()  # of the same clock on Linux, for every process
        assert worker.call("now") - before >= 0.05
