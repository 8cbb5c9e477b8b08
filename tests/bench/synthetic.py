"""Runs that were never measured: times and memory with the noise of a shared machine, from a seed.

A round's times share what the machine does in it: a slow walk (heat, clock) and a level that differs from run to run.
Each time has lognormal noise of its own, one in twenty is an outlier, and in each run each figure of each candidate has
a bias that lasts (where its memory happens to lie).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from reroute.bench import document
from reroute.bench.document import Candidate
from reroute.bench.measure import MEMORY_RUNS, Settings
from reroute.bench.statistics import spread

MEBIBYTE = 2**20
DENSE, ROUTED = "dense", "reroute@2,4:keep=7,4"
TIMES = {
    DENSE: {"vision_ms": 7.0, "prefill_ms": 50.0, "decode_ms": 2.2, "end_to_end_ms": 130.0},
    ROUTED: {"vision_ms": 7.0, "prefill_ms": 12.0, "decode_ms": 1.5, "end_to_end_ms": 70.0},
}
MEMORY = {
    "peak_rss_bytes": 180 * MEBIBYTE,
    "cache_bytes": 12 * MEBIBYTE,
    "weight_bytes": 70 * MEBIBYTE,
}
Factors = dict[tuple[str, str], float]  # (candidate, quantity) -> planted change; "*" is every candidate


def run_of(
    seed: int,
    planted: Factors | None = None,
    *,
    times: Mapping[str, Mapping[str, float]] = TIMES,
    repeat: int = 30,
    text: tuple[int, ...] = (64,),
    device: str = "cpu-2c-8gib",
    noise: float = 0.025,
    **settings: Any,
) -> dict[str, Any]:
    """A whole bench.json."""
    random = np.random.default_rng(seed)
    planted = planted or {}

    def factor(name: str, quantity: str) -> float:
        return planted.get((name, quantity), 1.0) * planted.get(("*", quantity), 1.0)

    level = random.lognormal(0, 0.1)
    walk = np.exp(np.cumsum(random.normal(0, 0.01, repeat)))  # of the machine, in all candidates alike
    cells = []
    for length in text:
        for name, quantities in times.items():
            samples = {}
            for quantity, median in quantities.items():
                own = random.lognormal(0, noise, repeat) * random.lognormal(0, 0.005)
                hit = np.where(random.random(repeat) < 0.05, random.uniform(1.3, 4.0, repeat), 1.0)
                values = median * factor(name, quantity) * (length / 64) ** 0.3 * level * walk * own * hit
                samples[quantity] = values.tolist()
            cells.append(document.cell(name, length, samples))
    candidates = []
    for name in times:
        peaks = random.normal(1.0, 0.003, MEMORY_RUNS) * MEMORY["peak_rss_bytes"] * factor(name, "peak_rss_bytes")
        exact = {key: MEMORY[key] * factor(name, key) for key in ("cache_bytes", "weight_bytes")}
        candidates.append(
            Candidate(
                name=name,
                folder=f"{name[:7]}-folder",
                routing=name,
                action="dense" if name == DENSE else "reroute",
                checkpoint_sha256="0" * 64,
                memory={"peak_rss_bytes": spread(peaks.tolist()).median, **exact},
                load_ms=50.0,
                memory_samples=tuple({"peak_rss_bytes": peak} for peak in peaks),
            )
        )
    machine = {
        "cpu": "a processor",
        "cores_usable": 2,
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "system": "Linux",
        "governor": None,
        "load_average_before": [0.5, 0.5, 0.5],
        "fingerprint": device,
    }
    return document.make(
        candidates, cells, settings=asdict(Settings(text=text, repeat=repeat, **settings)), machine=machine
    )
