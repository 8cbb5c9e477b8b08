"""Which questions are asked when."""

from __future__ import annotations

import pytest

from reroute.errors import UserError
from reroute.tuning.budgets import FINALISTS, LEAST_FIRST, answers_of, rounds_of, split, within
from tests.tuning.fakes import PlainSet


def test_no_image_is_in_both_halves_and_every_question_is_in_one():
    whole = PlainSet(100)
    parts = split(whole, seed=3)
    images = [{question.image for question in part} for part in (parts.search, parts.fresh)]
    assert not images[0] & images[1]
    assert sorted(q.id for q in (*parts.search, *parts.fresh)) == sorted(q.id for q in whole)
    assert (len(images[0]), len(images[1])) == (17, 17)
    for part in (parts.search, parts.fresh):
        order = [question.image for question in part]
        assert len(list(dict.fromkeys(order))) == sum(a != b for a, b in zip(order, ["", *order], strict=False))


def test_the_seed_decides_which():
    assert split(PlainSet(100), seed=1) == split(PlainSet(100), seed=1)
    assert split(PlainSet(100), seed=1) != split(PlainSet(100), seed=2)


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="about 1 image"):
        split(PlainSet(3), seed=0)


def test_questions_double_as_candidates_halve():
    found = rounds_of(24, 400)
    assert [(one.candidates, one.questions) for one in found] == [(24, 50), (12, 100), (6, 200), (3, 400)]
    assert [(one.candidates, one.questions) for one in rounds_of(5, 100, 40)] == [(5, 40), (3, 80)]
    assert [(one.candidates, one.questions) for one in rounds_of(7, 50, 30)] == [(7, 30), (4, 50), (2, 50)]
    assert [(one.candidates, one.questions) for one in rounds_of(2, 100)] == [(2, 100)]
    assert answers_of(found) == 24 * 50 + 12 * 50 + 6 * 100 + 3 * 200


@pytest.mark.parametrize("count", range(1, 60))
def test_the_last_round_has_few_enough(count: int):
    found = rounds_of(count, 1000)
    assert found[0].candidates == count
    assert 1 <= found[-1].candidates <= FINALISTS
    assert found[-1].questions > 500


def test_a_first_round_larger_than_the_pool_is_refused():
    with pytest.raises(UserError, match=r"a first round of 101 questions .* there are 100"):
        rounds_of(4, 100, 101)


def test_a_time_limit_scales_search_and_final_score_alike():
    given = {"candidates": 12, "search": 400, "fresh": 400, "per_answer": 0.1}
    assert within(1e6, **given) == (400, 400)
    whole = 0.1 * (answers_of(rounds_of(12, 400)) + 400 * 4)
    search, fresh = within(whole / 4, **given)
    assert (search, fresh) == (100, 100)
    assert 0.1 * (answers_of(rounds_of(12, search)) + fresh * 4) <= whole / 4
    least = within(-1.0, **given)
    assert least == (LEAST_FIRST * 4, LEAST_FIRST)
    assert rounds_of(12, least[0])[0].questions == LEAST_FIRST
    assert within(0.0, candidates=12, search=5, fresh=4, per_answer=0.1) == (5, 4)
