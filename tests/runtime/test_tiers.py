"""Sessions that change their tier: the answers of fresh ones, in the memory of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute.errors import UserError
from reroute.manifest import Capacity
from reroute.runtime import Answer, Session
from reroute.runtime.backend import open_backend
from reroute.runtime.bundle import Bundle
from tests.conftest import TinyLlava, make_llava
from tests.runtime.fakes import FakeBackend

pytest.importorskip("onnxruntime")

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
TIERS = ("7-4", "dense", "wide", "2/9")
KEPT = {"7-4": [7, 4], "dense": [36, 36], "wide": [20, 9], "2/9": [3, 12]}


def dialogue(session: Session) -> list[Answer]:
    """Three turns from empty caches, the last with a second image."""
    turns = [("where is the red circle ?", PICTURE), ("how many stars are there ?", None), ("is it blue ?", PICTURE)]
    return [session.ask(question, image, max_new_tokens=12) for question, image in turns]


def content(answers: list[Answer]) -> list[object]:
    """Everything of answers but their times."""
    return [
        (a.text, a.token_ids, a.stop_reason, a.prompt_tokens, [r.tolist() for r in (a.entered, *a.routes)])
        for a in answers
    ]


@pytest.fixture(scope="module")
def fresh(tiered_bundle: Path) -> dict[str, list[object]]:
    """What a session of its own answers in each tier."""
    found: dict[str, list[object]] = {}
    for tier in TIERS:
        with Session.open(tiered_bundle, tier=tier, threads=1) as session:
            assert session.tier == tier
            answers = dialogue(session)
            assert [len(route) for route in answers[0].routes] == KEPT[tier]
            found[tier] = content(answers)
    assert len({repr(answers) for answers in found.values()}) == 4
    return found


def test_a_session_that_changes_its_tier_answers_as_fresh_ones(
    tiered_bundle: Path, fresh: dict[str, list[object]]
) -> None:
    with Session.open(tiered_bundle, threads=1) as session:
        assert session.tier == "7-4"
        for tier in (*TIERS, *reversed(TIERS), "dense", "2/9", "dense"):
            session.reset(tier=tier)
            assert (session.tier, session.manifest.tier, session.bundle.manifest.tier) == (tier,) * 3
            assert content(dialogue(session)) == fresh[tier]
            session.reset()
            assert session.tier == tier
            assert content(dialogue(session)) == fresh[tier]


def test_the_default_tier_answers_as_the_bundle_of_its_budget_alone(
    tiny_bundle: Path, fresh: dict[str, list[object]]
) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        assert session.tier == ""
        assert content(dialogue(session)) == fresh["7-4"]


def test_figures_are_those_of_the_tier_in_use(tiered_bundle: Path) -> None:
    """Capacity, bytes and room: 512 text tokens and two images, of which a tier keeps its budgets."""
    row = 2 * 2 * 16 * 4
    with Session.open(tiered_bundle, threads=1) as session:
        for tier, (first, second) in KEPT.items():
            session.reset(tier=tier)
            rows = np.asarray([512 + 2 * 36, 512 + 2 * first, 512 + 2 * second])
            assert session.manifest.cache_rows == tuple(rows)
            assert session.cache_bytes == row * 2 * rows.sum()
            answer = session.ask("where ?", PICTURE, max_new_tokens=1)
            used = 3 * answer.prompt_tokens + 36 + first + second
            assert session.cache_bytes_used == row * 2 * used
            with pytest.raises(UserError, match=f"of {512 + 2 * 36} are left"):
                session.ask("x " * 600)


def test_an_unknown_tier_leaves_the_dialogue_as_it_was(tiered_bundle: Path, fresh: dict[str, list[object]]) -> None:
    with Session.open(tiered_bundle, tier="wide", threads=1) as session:
        first = session.ask("where is the red circle ?", PICTURE, max_new_tokens=12)
        with pytest.raises(UserError, match="unknown tier 'wild'") as caught:
            session.reset(tier="wild")
        assert "did you mean 'wide'? supported: 2/9, 7-4, dense, wide" in caught.value.hint
        second = session.ask("how many stars are there ?", max_new_tokens=12)
        assert content([first, second]) == fresh["wide"][:2]
    with pytest.raises(UserError, match="unknown tier 'wild'"):
        Session.open(tiered_bundle, tier="wild")


def test_a_bundle_without_tiers_has_none_to_change_to(tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match="there is no tier 'dense'"):
        Session.open(tiny_bundle, tier="dense")
    with Session.open(tiny_bundle, threads=1) as session, pytest.raises(UserError, match="there is no tier 'dense'"):
        session.reset(tier="dense")


def test_a_stream_of_another_tier_ends(tiered_bundle: Path) -> None:
    with Session.open(tiered_bundle, threads=1) as session:
        stream = session.stream("where ?", PICTURE)
        next(stream)
        session.reset(tier="dense")
        with pytest.raises(RuntimeError, match="the session was reset"):
            next(stream)


def test_a_session_tells_its_backend_only_when_the_tier_changes(tiered_bundle: Path) -> None:
    bundle = Bundle.open(tiered_bundle)
    backend = FakeBackend(bundle.manifest)
    session = Session(bundle, backend)
    used: list[str] = []
    backend.use = used.append  # type: ignore[method-assign]
    for tier in ("7-4", None, "dense", "dense", None, "7-4"):
        session.reset(tier)
    assert used == ["dense", "7-4"]


def test_tiers_share_the_memory_of_their_caches(tiered_bundle: Path) -> None:
    """Each cache of a tier begins where the largest tier's does, in memory that is as large as that one."""
    bundle = Bundle.open(tiered_bundle)
    backend = open_backend(bundle)
    places: dict[str, list[tuple[int, int]]] = {}
    for tier in TIERS:
        backend.use(tier)
        arrays = [array for layer in range(6) for array in backend.cache(layer)]
        bases = [array.base if array.base is not None else array for array in arrays]
        places[tier] = [
            (array.__array_interface__["data"][0], base.nbytes) for array, base in zip(arrays, bases, strict=True)
        ]
    assert all(found == places["dense"] for found in places.values())
    largest = sum(size for _, size in places["dense"])
    backend.use("dense")
    assert largest == backend.cache_bytes


MEASURE = """
import json, sys
import numpy as np
from PIL import Image
from reroute.bench.memory import peak_rss_bytes
from reroute.runtime import Session
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
with Session.open(sys.argv[1], tier=sys.argv[2], threads=1) as session:
    peaks = []
    for tier in sys.argv[2:]:
        session.reset(tier=tier)
        for _ in range(2):
            session.ask("where is the red circle ?", picture, max_new_tokens=8)
        peaks.append(peak_rss_bytes())
print(json.dumps(peaks))
"""


def test_four_tiers_take_the_memory_of_the_largest(tmp_path: Path) -> None:
    """Peak memory of a fresh process: what three more tiers add is small beside the weights and the caches."""
    from reroute.engines import build
    from reroute.export import export_checkpoint

    checkpoint = make_llava(tmp_path / "checkpoint", TinyLlava(layers=2, hidden=768, vision_layers=2))
    tiers = ("mid=reroute@0,1:keep=20,9", "low=reroute@0,1:keep=3,2", "dense")
    capacity = Capacity(max_text=1500, max_images=8)
    export_checkpoint(checkpoint, tmp_path / "export", routing="reroute@0,1:keep=7,4", tiers=tiers, capacity=capacity)
    manifest = build(tmp_path / "export", tmp_path / "bundle", check=False)

    def peaks(*tiers: str) -> list[int]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "bundle"), *tiers]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    (alone,) = peaks("dense")
    *_, whole = peaks("dense", "7-4", "mid", "low", "dense")
    weights = manifest.files["decoder.onnx.data"].bytes
    assert weights > 30 << 20
    # A second copy of the weights would show many times over.
    assert whole - alone < weights / 8
    assert whole < 1.03 * alone
