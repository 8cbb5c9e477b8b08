"""Features of images that were encoded before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute.errors import UserError
from reroute.runtime import Session
from reroute.runtime.bundle import Bundle
from reroute.runtime.features import FeatureCache
from reroute.runtime.positions import VisualTokens, join, split
from tests.runtime import fakes
from tests.runtime.fakes import VISUAL, FakeBackend

RED, BLUE, GREEN = (Image.new("RGB", (40, 30), colour) for colour in ((200, 30, 30), (30, 30, 200), (30, 200, 30)))
ONE_IMAGE = VISUAL * fakes.HIDDEN * 4  # bytes of its features


@pytest.fixture
def opened(make_bundle: Callable[..., Bundle]) -> Callable[..., tuple[Session, FakeBackend]]:
    def make(mib: float = 1.0, **options: object) -> tuple[Session, FakeBackend]:
        bundle = make_bundle(**options)
        backend = FakeBackend(bundle.manifest)
        return Session(bundle, backend, image_cache_mib=mib), backend

    return make


def shapes(backend: FakeBackend) -> list[int]:
    """Images of each run of the vision graph."""
    return [len(pixels) for pixels in backend.encoded]


def test_an_image_is_encoded_once_across_resets(opened: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = opened()
    first = session.ask("where ?", RED, max_new_tokens=1)
    session.reset()
    again = session.ask("where ?", RED.copy(), max_new_tokens=1)
    assert shapes(backend) == [1]
    assert [answer.timings.images_reused for answer in (first, again)] == [0, 1]
    np.testing.assert_array_equal(backend.steps[0].visual_embeds, backend.steps[1].visual_embeds)
    assert again.token_ids == first.token_ids
    assert again.views == first.views


def test_the_key_is_what_the_tower_sees_not_where_it_came_from(
    opened: Callable[..., tuple[Session, FakeBackend]], tmp_path: Path
) -> None:
    session, backend = opened()
    path = tmp_path / "image.png"
    RED.save(path)
    session.ask("where ?", path, max_new_tokens=1)
    session.reset()
    session.ask("where ?", np.asarray(RED), max_new_tokens=1)
    assert shapes(backend) == [1]
    BLUE.save(path)  # another picture under the same name
    session.reset()
    session.ask("where ?", path, max_new_tokens=1)
    assert shapes(backend) == [1, 1]
    assert (backend.steps[0].visual_embeds != backend.steps[2].visual_embeds).all()


def test_of_several_images_only_the_missing_are_encoded_together(
    opened: Callable[..., tuple[Session, FakeBackend]],
) -> None:
    session, backend = opened(max_images=4)
    session.ask("where ?", RED, max_new_tokens=1)
    session.reset()
    answer = session.ask("where ?", [BLUE, RED, GREEN, BLUE], max_new_tokens=1)
    assert shapes(backend) == [1, 2]
    assert answer.timings.images_reused == 2
    other, fresh = opened(0, max_images=4)
    other.ask("where ?", [BLUE, RED, GREEN, BLUE], max_new_tokens=1)
    assert shapes(fresh) == [4]
    np.testing.assert_array_equal(backend.steps[-1].visual_embeds, fresh.steps[-1].visual_embeds)


def test_encode_uses_the_same_features(opened: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = opened()
    features = session.encode(RED)
    assert session.ask("where ?", RED, max_new_tokens=1).timings.images_reused == 1
    session.reset()
    assert session.ask("where ?", features, max_new_tokens=1).timings.images_reused == 1
    session.encode([RED])
    assert shapes(backend) == [1]


def test_zero_keeps_nothing(opened: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = opened(0)
    for _ in range(2):
        session.reset()
        assert session.ask("where ?", [RED, RED], max_new_tokens=1).timings.images_reused == 0
    assert shapes(backend) == [2, 2]
    with pytest.raises(UserError, match="image_cache_mib is -1"):
        opened(-1)


def test_the_image_asked_about_longest_ago_goes_first(opened: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = opened(2.5 * ONE_IMAGE / 2**20)

    def ask(image: Image.Image) -> int:
        session.reset()
        return session.ask("where ?", image, max_new_tokens=1).timings.images_reused

    assert [ask(image) for image in (RED, BLUE, RED, GREEN, RED, BLUE)] == [0, 0, 1, 0, 1, 0]
    assert session._features.nbytes == 2 * ONE_IMAGE
    small, _ = opened(0.5 * ONE_IMAGE / 2**20)
    for _ in range(2):
        small.reset()
        assert small.ask("where ?", RED, max_new_tokens=1).timings.images_reused == 0
    assert small._features.nbytes == 0
    del backend


def test_close_frees_and_a_failure_keeps_nothing(opened: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = opened()

    def fail(pixels: np.ndarray) -> VisualTokens:
        raise RuntimeError("the engine failed")

    encode, backend.encode = backend.encode, fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        session.ask("where ?", RED)
    assert session._features.nbytes == 0
    backend.encode = encode  # type: ignore[method-assign]
    session.ask("where ?", RED, max_new_tokens=1)
    assert session._features.nbytes == ONE_IMAGE
    session.close()
    assert session._features.nbytes == 0


def test_where_the_tower_drops_tokens_their_places_come_back_too(
    opened: Callable[..., tuple[Session, FakeBackend]],
) -> None:
    session, backend = opened(routing="nuwa:avg=1/2")
    first = session.ask("where ?", [RED, BLUE], max_new_tokens=1)
    session.reset()
    again = session.ask("where ?", [BLUE, RED], max_new_tokens=1)
    assert shapes(backend) == [2]
    assert 0 < first.visual_tokens < 2 * VISUAL
    np.testing.assert_array_equal(first.entered, again.entered)
    np.testing.assert_array_equal(backend.steps[0].rope_cos, backend.steps[1].rope_cos)
    (a, b), (c, d) = (step.visual_embeds.reshape(2, -1, fakes.HIDDEN) for step in backend.steps)
    np.testing.assert_array_equal((a, b), (d, c))


def test_images_of_several_grids_are_kept_one_by_one() -> None:
    rng = np.random.default_rng(0)
    grids = {(3, 4, 6): (2, 3), (3, 6, 4): (3, 2), (3, 2, 4): (1, 2)}
    runs: list[tuple[int, ...]] = []

    def run(pixels: np.ndarray) -> VisualTokens:
        runs.append(pixels.shape)
        grid = grids[pixels.shape[1:]]
        count = grid[0] * grid[1]
        mean = pixels.mean(axis=(1, 2, 3), dtype=np.float64)[:, None, None] + np.arange(count)[None, :, None]
        deep = np.stack([mean + layer for layer in (10, 20)])
        return VisualTokens(embeds=mean, grids=(grid,) * len(pixels), deepstack=deep)

    images = [rng.normal(size=shape).astype(np.float32) for shape in (*grids, (3, 4, 6))]
    cache = FeatureCache(1)
    cache.encode(images[:1], run)
    found, reused = cache.encode(images, run)
    assert reused == 1
    assert runs == [(1, 3, 4, 6), (1, 3, 6, 4), (1, 3, 2, 4), (1, 3, 4, 6)]
    expected = join([run(image[None]) for image in images])
    assert found.grids == expected.grids == ((2, 3), (3, 2), (1, 2), (2, 3))
    np.testing.assert_array_equal(found.embeds, expected.embeds)
    assert found.deepstack is not None
    assert expected.deepstack is not None
    assert found.deepstack.shape == (2, 1, 20, 1)
    np.testing.assert_array_equal(found.deepstack, expected.deepstack)
    # Two of one grid in one run come apart, in memory of their own, and together again.
    pair = run(np.stack([images[0], images[3]]))
    parts = split(pair)
    assert [part.grids for part in parts] == [((2, 3),), ((2, 3),)]
    assert not any(np.shares_memory(part.embeds, pair.embeds) for part in parts)
    np.testing.assert_array_equal(join(parts).embeds.ravel(), pair.embeds.ravel())
    assert parts[1].deepstack is not None
    assert pair.deepstack is not None
    np.testing.assert_array_equal(parts[1].deepstack, pair.deepstack[:, 1:])


def test_an_engine_answers_the_same_from_reused_features(tiny_bundle: Path) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        answers = []
        for _ in range(2):
            session.reset()
            answers.append(session.ask("where is the red circle ?", RED, max_new_tokens=4))
        assert answers[0].token_ids == answers[1].token_ids
        assert [answer.timings.images_reused for answer in answers] == [0, 1]
        # Nothing wrote into what is kept: a step reads it in place.
        (kept,) = session._features._kept.values()
        np.testing.assert_array_equal(kept.embeds, session.backend.encode(_pixels(session)).embeds)


def _pixels(session: Session) -> np.ndarray:
    from reroute.runtime.features import see

    (pixels,), _ = see([RED], session.manifest.model)
    return pixels[None]
