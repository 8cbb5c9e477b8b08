"""The generated set: exact counts, a fixed order, and grades."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from reroute.demo.scenes import make_scene, render, scene_rng
from reroute.errors import UserError
from reroute.evaluation.questions import Question
from reroute.evaluation.scenes import SceneSet, grade

WHERE = Question(id="0", image="0", skill="grounding", kind="where", prompt="where ?", box=(0.07, 0.29, 0.27, 0.43))
WORD = Question(id="1", image="0", skill="vqa", kind="count", prompt="how many ?", answers=("3",))


def skills(questions: SceneSet) -> dict[str, int]:
    return dict(Counter(question.skill for question in questions))


def test_as_many_questions_as_asked_for():
    questions = SceneSet(grounding=11, vqa=23)
    assert skills(questions) == {"grounding": 11, "vqa": 23}
    assert len(questions) == 34
    assert len({question.id for question in questions}) == 34
    assert skills(SceneSet(grounding=5, vqa=0)) == {"grounding": 5}
    assert skills(SceneSet(grounding=0, vqa=5)) == {"vqa": 5}


def test_the_published_scores_are_of_the_first_200_scenes():
    questions = list(SceneSet(grounding=996, vqa=757))
    assert {question.image for question in questions} == {str(index) for index in range(200)}


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    small, large = SceneSet(grounding=12, vqa=9), SceneSet(grounding=40, vqa=30)
    for skill in ("grounding", "vqa"):
        few, many = ([q for q in questions if q.skill == skill] for questions in (small, large))
        assert few == many[: len(few)]
    images = [question.image for question in large]
    assert images == sorted(images, key=int), "questions of one image must follow each other"


def test_every_object_is_asked_for_and_the_answers_are_true():
    questions = SceneSet(grounding=16, vqa=16, objects=(4, 4))
    for index in range(4):
        scene = make_scene(scene_rng("heldout", 0, index), 4, 4)
        asked = [q for q in questions if q.image == str(index)]
        boxes = {q.prompt: q.box for q in asked if q.skill == "grounding"}
        assert boxes == {f"where is the {t.name} ?": tuple(s / 100 for s in t.box) for t in scene.objects}
        kinds = Counter(q.kind for q in asked if q.skill == "vqa")
        assert max(kinds.values()) == 1
        assert {"exists", "count"} <= kinds.keys()
        for question in asked:
            if question.kind == "exists":
                named = question.prompt.removeprefix("is there a").removeprefix("n").removesuffix(" ?").strip()
                assert question.answers == ("yes" if named in {t.name for t in scene.objects} else "no",)
                assert (question.box is not None) == (question.answers == ("yes",))
        assert np.array_equal(np.asarray(questions.image(str(index))), np.asarray(render(scene)))


def test_sets_differ_by_seed_and_split():
    sets = [
        SceneSet(grounding=3, vqa=0, seed=seed, split=split) for seed in (0, 1) for split in ("heldout", "validation")
    ]
    assert len({tuple(questions) for questions in sets}) == 4
    assert len({questions.name for questions in sets}) == 4
    assert list(SceneSet(grounding=3, vqa=0)) == list(sets[0])


@pytest.mark.parametrize(
    ("answer", "iou", "score"),
    [
        ("7 29 27 43", 1.0, 1.0),
        ("7 29 27 36", 0.5, 1.0),  # exactly one half, which is right
        ("7 29 27 35", 120 / 280, 0.0),
        ("60 60 70 70", 0.0, 0.0),
        ("27 43 7 29", 0.0, 0.0),
        ("a box", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_boxes_are_graded_by_their_overlap(answer: str, iou: float, score: float):
    graded = grade(WHERE, answer)
    assert graded.iou == pytest.approx(iou, abs=1e-12)
    assert graded.score == score
    assert (graded.box is None) == (answer in ("27 43 7 29", "a box", ""))


def test_words_are_graded_by_equality():
    assert [grade(WORD, answer).score for answer in ("3", " 3 ", "4", "3 3", "")] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert grade(WORD, "3").iou is None
    assert grade(replace(WORD, answers=("three", "3")), "three").score == 1.0


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"split": "train"}, "unknown split 'train'", "heldout, validation"),
        ({"split": "held-out"}, "unknown split", "did you mean 'heldout'"),
        ({"grounding": -1}, "-1 grounding questions", "ask for 0 to"),
        ({"vqa": 10**9}, "1000000000 vqa questions", "ask for 0 to"),
        ({"grounding": 0, "vqa": 0}, "leave nothing to ask", "at least one"),
        ({"objects": (5, 4)}, "scenes of 5 to 4 objects", "3-7"),
        ({"objects": (0, 4)}, "scenes of 0 to 4 objects", "3-7"),
        ({"objects": (3, 80)}, "scenes of 3 to 80 objects", "1 to 12"),
        ({"seed": -1}, "the seed -1", "0 or more"),
    ],
)
def test_impossible_sets_are_refused(options: dict, message: str, hint: str):
    with pytest.raises(UserError) as caught:
        SceneSet(**options)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_the_fullest_scene_can_be_drawn():
    assert len(SceneSet(grounding=24, vqa=0, objects=(12, 12))) == 24
