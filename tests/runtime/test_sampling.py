import numpy as np
import pytest

from reroute.errors import UserError
from reroute.runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.asarray([0.1, 0.4, 0.05, 0.25, 0.2], dtype=np.float32))


def frequencies(sampling: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.pick(LOGITS)[0] for _ in range(count)], minlength=5) / count


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    token, logprob = Sampler(Sampling()).pick(np.asarray([1.0, 3.0, 3.0, 0.0], dtype=np.float32))
    assert token == 1
    assert logprob == pytest.approx(3 - np.log(np.exp([1, 3, 3, 0]).sum()))


def test_frequencies_follow_the_softmax() -> None:
    np.testing.assert_allclose(frequencies(Sampling(temperature=1.0)), [0.1, 0.4, 0.05, 0.25, 0.2], atol=0.03)


def test_temperature_sharpens() -> None:
    expected = np.asarray([0.1, 0.4, 0.05, 0.25, 0.2]) ** 2
    np.testing.assert_allclose(frequencies(Sampling(temperature=0.5)), expected / expected.sum(), atol=0.03)


def test_top_k_leaves_the_k_most_likely() -> None:
    found = frequencies(Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(found, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.03)
    assert set(np.flatnonzero(found)) == {1, 3}


def test_top_k_breaks_ties_towards_the_lower_id() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=2))
    assert {sampler.pick(np.zeros(6))[0] for _ in range(100)} == {0, 1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.8, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_is_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(np.flatnonzero(frequencies(Sampling(temperature=1.0, top_p=top_p)))) == kept


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(LOGITS)[0] for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_logprob_is_the_models_own() -> None:
    sampler = Sampler(Sampling(temperature=0.3, top_k=3))
    token, logprob = sampler.pick(LOGITS)
    assert logprob == pytest.approx(float(LOGITS[token]), abs=1e-6)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_without_a_maximum_are_an_error(bad: list[float]) -> None:
    with pytest.raises(FloatingPointError):
        Sampler(Sampling()).pick(np.asarray(bad))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_refuses_by_name(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert caught.value.hint
