"""The regression gate: what it must catch, and what must not disturb it. Times come from seeds, none are measured."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reroute.bench import compare_command
from reroute.bench.compare import Finding, Tolerance, compare_pair, compare_runs, confirm
from reroute.bench.document import parse, to_json
from reroute.cli import build_parser, main
from tests.bench.synthetic import DENSE, ROUTED, TIMES, Factors, run_of
from tests.conftest import REPOSITORY

SLOWER: Factors = {(ROUTED, "prefill_ms"): 1.10}
LARGER: Factors = {(ROUTED, "peak_rss_bytes"): 1.03}
PAIR = {"base": TIMES[ROUTED], "new": TIMES[ROUTED]}


def findings(base: dict[str, Any], new: dict[str, Any]) -> list[Finding]:
    return compare_runs(parse(base, where="BASE"), parse(new, where="NEW"), Tolerance())


def worse(found: list[Finding]) -> set[tuple[str, str]]:
    return {(one.candidate, one.quantity) for one in found if one.verdict == "worse"}


def save(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(data), encoding="utf-8")
    return path


def gate(*args: object) -> int:
    return main(["compare", *map(str, args)])


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[int]]:
    """Makes `reroute compare base new` on two bundles take its runs from seeds; hands out the rounds of each."""
    for name in ("base", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reroute.json").write_text("{}")
    bundle = SimpleNamespace(manifest=SimpleNamespace(routing=ROUTED, checkpoint_sha256="0"))
    monkeypatch.setattr(compare_command, "open_bundles", lambda *args, **options: [bundle, bundle])

    def plant(*runs: tuple[int, Factors]) -> list[int]:
        left: Iterator[tuple[int, Factors]] = iter(runs)
        rounds: list[int] = []

        def bench(_: object, settings: Any) -> dict[str, Any]:
            seed, planted = next(left)
            rounds.append(settings.repeat)
            return run_of(seed, planted, times=PAIR, repeat=settings.repeat)

        monkeypatch.setattr(compare_command, "bench", bench)
        return rounds

    return plant


# The planted cases.


@pytest.mark.parametrize("quantity", ["prefill_ms", "decode_ms"])
def test_catches_a_planted_10_percent_slowdown(quantity: str):
    planted = {(ROUTED, quantity): 1.10}
    for seed in range(20):
        base, first, second = run_of(seed), run_of(1000 + seed, planted), run_of(2000 + seed, planted, repeat=60)
        found = findings(base, first)
        assert all(one.suspected for one in found if one.quantity == quantity and one.text), seed
        assert worse(confirm(found, partial(findings, base, second))) == {(ROUTED, quantity)}, seed


@pytest.mark.parametrize("quantity", ["peak_rss_bytes", "cache_bytes", "weight_bytes"])
def test_catches_a_planted_3_percent_memory_growth(quantity: str):
    for seed in range(20):
        found = findings(run_of(seed), run_of(1000 + seed, {(ROUTED, quantity): 1.03}))
        assert worse(found) == {(ROUTED, quantity)}, seed


def test_stays_quiet_over_20_unchanged_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = save(tmp_path / "base.json", run_of(0))
    for seed in range(1, 21):
        assert gate(base, save(tmp_path / f"{seed}.json", run_of(seed))) == 0, seed
        out, err = capsys.readouterr()
        assert out.startswith("# Regression gate passed\n"), seed
        assert err == ""


def test_bundles_catch_a_planted_10_percent_slowdown(paired: Callable[..., list[int]], tmp_path: Path):
    for seed in range(20):
        planted = {("new", "prefill_ms"): 1.10}
        rounds = paired((seed, planted), (100 + seed, planted))
        assert gate(tmp_path / "base", tmp_path / "new", "--json") == 3, seed
        assert rounds == [20, 40]


def test_bundles_catch_a_planted_3_percent_memory_growth(paired: Callable[..., list[int]], tmp_path: Path):
    for seed in range(20):
        planted = {("new", "peak_rss_bytes"): 1.03}
        paired((seed, planted), (100 + seed, planted))
        assert gate(tmp_path / "base", tmp_path / "new", "--json") == 3, seed


def test_bundles_stay_quiet_over_20_unchanged_runs(paired: Callable[..., list[int]], tmp_path: Path):
    for seed in range(20):
        rounds = paired((seed, {}), (100 + seed, {}))
        assert gate(tmp_path / "base", tmp_path / "new", "--json") == 0, seed
        assert rounds in ([20], [20, 40])


def test_a_loud_machine_needs_more_rounds_and_no_other_verdict():
    """Noise of a machine with busy neighbours: 10 % between two candidates of a round."""
    planted = {(ROUTED, "prefill_ms"): 1.10}
    for seed in range(10):
        base, first, second = (
            run_of(s, p, noise=0.07, repeat=200) for s, p in ((seed, {}), (50, planted), (60, planted))
        )
        assert worse(confirm(findings(base, first), partial(findings, base, second))) == {(ROUTED, "prefill_ms")}, seed
        short, other = (run_of(s, noise=0.07, repeat=30) for s in (70 + seed, 80 + seed))
        assert worse(confirm(findings(short, other), partial(findings, short, run_of(90 + seed, noise=0.07)))) == set()


# What must not disturb it, and what it says.


def test_a_slower_machine_is_not_a_regression():
    slower = {("*", quantity): 1.4 for quantity in TIMES[DENSE]}
    for seed in range(20):
        assert worse(findings(run_of(seed), run_of(1000 + seed, slower))) == set()


def test_growth_within_the_tolerances_passes():
    for seed in range(20):
        little = {(ROUTED, "prefill_ms"): 1.02, (ROUTED, "peak_rss_bytes"): 1.01, (ROUTED, "cache_bytes"): 1.019}
        assert worse(findings(run_of(seed), run_of(1000 + seed, little))) == set()


def test_noise_that_hides_everything_is_called_unclear_and_not_ok():
    loud = [run_of(seed, noise=0.5, repeat=10) for seed in (1, 2)]
    latencies = [one for one in findings(*loud) if one.text is not None]
    assert {one.verdict for one in latencies} == {"unclear"}


def test_an_improvement_is_called_better():
    found = findings(run_of(1), run_of(2, {(ROUTED, "prefill_ms"): 0.7, (ROUTED, "cache_bytes"): 0.5}))
    better = {one.quantity for one in found if one.verdict == "better"}
    assert better == {"prefill_ms", "cache_bytes"}


def test_a_failed_gate_names_the_figure_the_change_and_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, new = save(tmp_path / "base.json", run_of(1)), save(tmp_path / "new.json", run_of(2, SLOWER))
    assert gate(base, new, "-o", tmp_path / "out") == 3
    out, err = capsys.readouterr()
    assert "**worse**" in out
    error = err.partition("error: ")[2].splitlines()[0]
    assert error.startswith(f"regression: prefill_ms of {ROUTED} at 64 text tokens is ")
    assert error.endswith("5 % are allowed")
    assert "--confirm" in err
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (data["kind"], data["mode"], data["passed"]) == ("comparison", "files", False)
    assert out == (tmp_path / "out" / "compare.md").read_text()
    (first, *_) = (one for one in data["findings"] if one["verdict"] == "worse")
    assert first["ratio"]["low"] > 1.05
    assert first["ratio"]["low"] <= first["ratio"]["value"] <= first["ratio"]["high"]


def test_the_tolerances_are_options(tmp_path: Path):
    base = save(tmp_path / "base.json", run_of(1))
    new = save(tmp_path / "new.json", run_of(2, SLOWER | LARGER))
    assert gate(base, new, "--latency", "20%", "--memory", "0.05") == 0
    assert gate(base, new, "--latency", "20%") == 3
    assert gate(base, new, "--memory", "5%") == 3


def test_a_regression_of_the_first_run_alone_is_not_confirmed(
    paired: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rounds = paired((1, {("new", "prefill_ms"): 1.2, ("new", "peak_rss_bytes"): 1.1}), (2, {}))
    assert gate(tmp_path / "base", tmp_path / "new") == 0
    assert rounds == [20, 40]
    out = capsys.readouterr().out
    assert out.count("| not confirmed |") == 2
    assert "measured again, in 40 rounds" in out


def test_a_confirmed_regression_says_so_and_keeps_both_runs(
    paired: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    planted = {("new", "prefill_ms"): 1.2}
    paired((1, planted), (2, planted))
    assert gate(tmp_path / "base", tmp_path / "new", "--repeat", "25", "--json") == 3
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert [run["settings"]["repeat"] for run in data["runs"]] == [25, 50]
    assert {one["quantity"] for one in data["findings"] if one["confirmed"]} == {"prefill_ms"}
    assert "--confirm" not in err


def test_files_are_confirmed_by_a_second_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, new = save(tmp_path / "base.json", run_of(1)), save(tmp_path / "new.json", run_of(2, SLOWER))
    assert gate(base, new, "--confirm", save(tmp_path / "again.json", run_of(3, SLOWER))) == 3
    assert "worse, twice" in capsys.readouterr().out
    assert gate(base, new, "--confirm", save(tmp_path / "again.json", run_of(3))) == 0
    assert "not confirmed" in capsys.readouterr().out


def test_nothing_is_measured_again_when_nothing_is_suspected():
    def again() -> list[Finding]:
        raise AssertionError("measured again")

    found = findings(run_of(1), run_of(2))
    assert confirm(found, again) == found


def test_what_only_the_second_run_has_is_not_taken():
    first, second = findings(run_of(1), run_of(2, SLOWER)), findings(run_of(1), run_of(3, SLOWER | LARGER))
    assert worse(confirm(first, lambda: second)) == {(ROUTED, "prefill_ms")}


def test_a_pair_is_compared_within_its_run():
    run = parse(run_of(1, {("new", "decode_ms"): 1.3}, times=PAIR), where="run")
    found = compare_pair(run, "base", "new", Tolerance())
    assert worse(found) == {("new", "decode_ms")}
    assert worse(compare_pair(run, "new", "base", Tolerance())) == set()


# Devices and baselines.


def test_a_folder_of_baselines_is_searched_for_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "baselines" / "orin.json", run_of(1, {(ROUTED, "prefill_ms"): 0.5}, device="orin"))
    save(tmp_path / "baselines" / "pc" / "bench.json", run_of(1, device="pc"))
    new = tmp_path / "new.json"
    assert gate(tmp_path / "baselines", save(new, run_of(2, device="pc"))) == 0
    assert gate(tmp_path / "baselines", save(new, run_of(2, device="orin"))) == 3
    capsys.readouterr()
    assert gate(tmp_path / "baselines", save(new, run_of(2, device="thor"))) == 2
    err = capsys.readouterr().err
    assert "no baseline of this device, thor; it has orin, pc" in err
    assert "baselines/thor.json" in err


def test_another_device_is_refused_unless_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, new = save(tmp_path / "base.json", run_of(1)), save(tmp_path / "new.json", run_of(2, device="orin"))
    assert gate(base, new) == 2
    assert "BASE was measured on cpu-2c-8gib, NEW on orin" in capsys.readouterr().err
    assert gate(base, new, "--any-device") == 0
    assert "BASE is of another device" in capsys.readouterr().out


def test_the_baseline_can_be_named_by_its_folder(tmp_path: Path):
    times = {DENSE: TIMES[DENSE], "dense (pinned)": TIMES[DENSE], ROUTED: TIMES[ROUTED]}
    base = save(tmp_path / "base.json", run_of(1, times=times))
    all_slower = {(name, "prefill_ms"): 1.3 for name in (DENSE, ROUTED)}
    new = save(tmp_path / "new.json", run_of(2, all_slower, times=times))
    # Against a dense bundle that became slower as well nothing shows; against the pinned one both do.
    assert gate(base, new, "--baseline", DENSE, "--json") == 0
    assert gate(base, new, "--baseline", "dense (-folder", "--json") == 3


def test_rows_that_are_new_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = save(tmp_path / "base.json", run_of(1))
    new = save(tmp_path / "new.json", run_of(2, times=TIMES | {"fastv:avg=1/9": TIMES[ROUTED]}))
    assert gate(base, new) == 0
    assert "Not in BASE, so not compared: fastv:avg=1/9." in capsys.readouterr().out


def broken(edit: Callable[[dict[str, Any]], Any], **options: Any) -> dict[str, Any]:
    data = run_of(2, **options)
    edit(data)
    return data


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (run_of(2, tokens=8), "BASE was measured with tokens 32, NEW with 8", "--tokens"),
        (run_of(2, threads=1), "BASE was measured with threads default, NEW with 1", "--threads"),
        (run_of(2, text=(256,)), "NEW lacks dense at 64 text tokens", "hide a regression"),
        (run_of(2, times={DENSE: TIMES[DENSE]}), f"NEW lacks {ROUTED} at 64", "same bundles"),
        (run_of(2, times={ROUTED: TIMES[ROUTED]}), "0 dense bundles are in both runs", "--baseline"),
        ({"kind": "evaluation"}, "is not a result of `reroute bench`", "bench.json"),
        (["bench"], "is not a result of `reroute bench`", "bench.json"),
        (broken(lambda d: d.update(schema_version=9)), "has schema version 9", "measure again"),
        (broken(lambda d: d.pop("cells")), "is not whole: 'cells'", "measure again"),
        (broken(lambda d: d["machine"].pop("fingerprint")), "is not whole: 'fingerprint'", "measure again"),
        (broken(lambda d: d["cells"][0].pop("samples")), "cells[0] lacks samples", "measure again"),
        (broken(lambda d: d["cells"][0]["samples"]["decode_ms"].pop()), "29 and 30 samples", "measure again"),
        (broken(lambda d: d["cells"][1]["samples"].update(decode_ms=[-1] * 30)), "not a positive", "measure again"),
        (broken(lambda d: d["candidates"][1]["memory"].pop("cache_bytes")), "NEW lacks cache_bytes", "same bundles"),
        (broken(lambda d: d["cells"][1]["samples"].pop("decode_ms")), f"NEW lacks decode_ms of {ROUTED}", "again"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(
    data: Any, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, new = save(tmp_path / "base.json", run_of(1)), save(tmp_path / "new.json", data)
    assert gate(base, new) == 2
    assert_one_error(capsys, message, hint)


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["{base}"], "required: NEW", "--help"),
        (["{base}", "nowhere.json"], "there is no nowhere.json", "reroute bench"),
        (["{base}", "{text}"], "cannot read", "measure again"),
        (["{base}", "{base}", "--latency", "5"], "'5' is not between 0 and 100 %", "--help"),
        (["{base}", "{base}", "--memory", "much"], "'much' is not a share", "--help"),
        (["{base}", "{base}", "--baseline", "dens"], "no single candidate 'dens'", "did you mean 'dense'"),
        (["{base}", "{base}", "--repeat", "5"], "--repeat has no meaning with two bench.json files", "leave it out"),
        (["{base}", "{base}", "--confirm", "nowhere"], "there is no nowhere", "reroute bench"),
        (["{base}", "{base}", "--confirm", "{base}", "{base}"], "it got 2 paths", "second run"),
        (["{base}", "{base}", "--confirm", "{other}"], "--confirm was measured on orin", "where NEW was"),
        (["{bundle}", "{base}"], "is a bundle,", "two bundles"),
        (["{bundle}", "{bundle}", "--any-device"], "--any-device has no meaning with two bundles", "leave it out"),
        (["{bundle}", "{bundle}", "--text", "64,x"], "'x' is not a whole number", "--help"),
        (["{bundle}", "{bundle}", "--tokens", "4000"], "64 text and 4000 decoded tokens do not fit", "--max-text"),
        (["{bundle}", "{bundle}", "--images", "9"], "9 images do not fit", "--max-images"),
        (["{base}", "{base}", "-o", "{text}"], "is not an earlier output", "another output"),
    ],
)
def test_bad_input_is_one_error_with_a_hint(
    args: list[str],
    message: str,
    hint: str,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "notes.txt").write_text("notes")
    places = {
        "base": save(tmp_path / "base.json", run_of(1)),
        "other": save(tmp_path / "other.json", run_of(1, device="orin")),
        "text": tmp_path / "notes.txt",
        "bundle": tiny_bundle,
    }
    assert gate(*(arg.format(**places) for arg in args)) == 2
    assert_one_error(capsys, message, hint)


def assert_one_error(capsys: pytest.CaptureFixture[str], message: str, hint: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    error, blank, advice = err.rstrip("\n").split("\n")
    assert error.startswith("error: ")
    assert message in error
    assert blank == ""
    assert hint in advice


def test_files_are_confirmed_by_measuring_the_bundles_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
):
    """With twice the rounds and the settings of NEW, and only when something is suspected."""
    asked: list[Any] = []

    def bench(bundles: Any, settings: Any) -> dict[str, Any]:
        asked.append((list(bundles), settings))
        return run_of(3, repeat=settings.repeat, **again)

    monkeypatch.setattr(compare_command, "bench", bench)
    times = {DENSE: TIMES[DENSE], ROUTED: TIMES[ROUTED]}
    base = save(tmp_path / "base.json", run_of(1, tokens=8))
    again: dict[str, Any] = {"tokens": 8}
    calm, slow = (save(tmp_path / f"{seed}.json", run_of(seed, p, tokens=8)) for seed, p in ((4, {}), (2, SLOWER)))
    assert gate(base, slow, "--confirm", tiny_bundle) == 2  # the bundle's own name is that of the routed row only
    assert "--confirm lacks dense" in capsys.readouterr().err
    monkeypatch.setattr(compare_command, "names_of", lambda bundles: list(times)[: len(bundles)])
    monkeypatch.setattr(compare_command, "open_bundles", lambda paths, settings: list(paths))
    both = [tiny_bundle, tiny_bundle]
    assert gate(base, calm, "--confirm", *both) == 0
    assert asked == []
    assert gate(base, slow, "--confirm", *both) == 0
    ((names, settings),) = asked
    assert names == [DENSE, ROUTED]
    assert (settings.repeat, settings.tokens, settings.text) == (60, 8, (64,))
    again["device"] = "orin"
    capsys.readouterr()
    assert gate(base, slow, "--confirm", *both) == 2
    assert_one_error(capsys, "this machine is orin, NEW was measured on cpu-2c-8gib", "confirm it there")


def test_the_commands_of_the_guide_parse():
    text = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?<![\w`#-] )\breroute (bench|compare) ([^|&`\n]+)", text)
    assert {name for name, _ in commands} == {"bench", "compare"}
    for name, words in commands:
        if not words.startswith("BASE"):
            build_parser().parse_args([name, *shlex.split(words)])
