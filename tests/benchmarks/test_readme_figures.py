"""The figures of the README's tables are those of the results beside them."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import fidelity
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def medians(name: str, quantity: str) -> dict[str, float]:
    return {cell["candidate"]: cell["summary"][quantity]["median"] for cell in result(name)["cells"]}


def row(label: str) -> list[str]:
    """The cells behind a row's label."""
    line = next(line for line in README.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_what_profiles_keep() -> None:
    assert fidelity.to_markdown(result("fidelity")) in README
    assert all(one["tries"][-1]["slots"] >= 0.99 for one in result("fidelity")["rows"])


def test_prefill() -> None:
    found = medians("prefill", "prefill_ms")
    names = {"int8 with": "int8+kernels", "int4 with": "int4+kernels", "int8 |": "int8"}
    for label, profile in names.items():
        wanted = [f"{found[f'own {profile}, {tier}']:.0f}" for tier in ("dense", "192", "128", "64")]
        assert row(f"Reroute {label}") == wanted
    assert row("transformers bf16")[0] == f"{found['transformers bfloat16, dense']:.0f}"
    authors = [
        min(time for name, time in found.items() if name.startswith("authors bfloat16") and name.endswith(f", {tier}"))
        for tier in ("192", "128", "64")
    ]
    assert row("the authors' code, bf16")[1:] == [f"{time:.0f}" for time in authors]
    speedups = result("prefill")["speedup_over_authors_bf16"]
    text = re.sub(r"\s+", " ", README)
    assert f"it is {speedups['dense']:.2f}x as fast as transformers' bf16 dense" in text
    assert ", ".join(f"{speedups[tier]:.2f}x" for tier in ("192", "128")) + f" and {speedups['64']:.2f}x" in text


def test_scaling() -> None:
    cells = result("scaling")["visual"]["cells"]
    found = {cell["candidate"]: cell["summary"]["prefill_ms"]["median"] for cell in cells if cell["size"] == 2304}
    routed, dense = f"{found['own int8+kernels, 64']:,.0f}", f"{found['own int8+kernels, dense']:,.0f}"
    text = re.sub(r"\s+", " ", README)
    assert f"int8 with kernels takes {routed} ms for 2,304 visual tokens, dense {dense}" in text


def test_footprint() -> None:
    sessions = result("footprint")["sessions"]
    text = re.sub(r"\s+", " ", README)

    def largest(profile: str, key: str, unit: int) -> float:
        return max(one[key] for name, one in sessions.items() if name.startswith(f"own {profile},")) / unit

    names = ("int8+kernels", "int4+kernels")
    peaks = [f"{largest(name, 'peak_rss_bytes', 2**20):.0f} MiB in {name.split('+')[0]}" for name in names]
    assert f"{largest('fp32', 'peak_rss_bytes', 2**30):.2f} GiB in fp32, and with kernels {' and '.join(peaks)}" in text
    weights = " and ".join(f"{largest(name, 'weight_bytes', 2**20):.0f} MiB" for name in names)
    assert f"with {largest('fp32', 'weight_bytes', 2**30):.2f} GiB, {weights} of weights" in text


def test_decode() -> None:
    found = medians("decode", "decode_ms")
    names = {
        "Reroute |": ("own fp32", "own int8+kernels", "own int4+kernels"),
        "onnxruntime-genai": ("genai fp32", "genai int8", "genai int4"),
        "llama.cpp": ("llama.cpp f16", "llama.cpp Q8_0", "llama.cpp Q4_0"),
    }
    for label, candidates in names.items():
        assert [cell.split()[0] for cell in row(label)] == [f"{found[name]:.1f}" for name in candidates]
