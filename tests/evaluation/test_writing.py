"""Boxes in pixels and in thousandths, from what a model wrote to the grade, and how such models are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reroute.errors import UserError
from reroute.evaluation.command import boxes_of
from reroute.evaluation.datasets import DATASETS
from reroute.evaluation.questions import Box, Grade, Question, Writing
from reroute.evaluation.runner import run_bundles
from reroute.evaluation.scenes import SceneSet, grade
from reroute.evaluation.writing import read_written
from reroute.manifest import Boxes
from reroute.runtime import Answer, Bundle
from reroute.runtime.answer import View
from tests.evaluation import dataset_files as d
from tests.evaluation.fakes import FakeEngine, FakeSet, bundle_of

# An image of any size, seen as 140 x 280 pixels.
PIXELS, THOUSANDTHS = (Writing(boxes=boxes, size=(140, 280)) for boxes in ("pixels", "thousandths"))
TENTHS = (0.1, 0.2, 0.5, 0.7)


@pytest.mark.parametrize(
    ("answer", "writing", "box"),
    [
        ('```json\n[\n\t{"bbox_2d": [14, 56, 70, 196], "label": "cat 1"}\n]\n```', PIXELS, TENTHS),
        ('{"bbox_2d": [14, 56, 70, 196], "label": "the 2 cats"}', PIXELS, TENTHS),
        ("{'bbox_2d': [14, 56, 70, 196]}", PIXELS, TENTHS),
        ('{"bbox": [14.0, 56.0, 70.0, 196.0]}', PIXELS, TENTHS),
        ("[14, 56, 70, 196]", PIXELS, TENTHS),
        ("```json\n[14,56,70,196]\n```", PIXELS, TENTHS),
        ("[[14, 56], [70, 196]]", PIXELS, TENTHS),
        ("The cat is at (14, 56, 70, 196).", PIXELS, TENTHS),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(500,700)<|box_end|>", THOUSANDTHS, TENTHS),
        ("(100, 200), (500, 700)", THOUSANDTHS, TENTHS),
        ('{"bbox_2d": [100, 200, 500, 700]}', THOUSANDTHS, TENTHS),
        # The named box counts, not an earlier list; then the first of several.
        ('[1, 2, 3, 4] {"bbox_2d": [14, 56, 70, 196]} {"bbox_2d": [0, 0, 9, 9]}', PIXELS, TENTHS),
        # Shares, whoever writes them.
        ("[0.1, 0.2, 0.5, 0.7]", PIXELS, TENTHS),
        ("[0.1, 0.2, 0.5, 0.7]", THOUSANDTHS, TENTHS),
        # As written, so it may leave the image or be turned inside out.
        ("[-14, 56, 280, 196]", PIXELS, (-0.1, 0.2, 2.0, 0.7)),
        ("[70, 196, 14, 56]", PIXELS, (0.5, 0.7, 0.1, 0.2)),
        # Cut short, too few, too many, words.
        ('```json\n[{"bbox_2d": [14, 56, 70, 1', PIXELS, None),
        ('{"bbox_2d": [14, 56, 70]}', PIXELS, None),
        ('{"bbox_2d": [14, 56, 70, 196, 3]}', PIXELS, None),
        ('{"bbox_2d": ["a", "b", "c", "d"]}', PIXELS, None),
        ("14, 56, 70, 196", PIXELS, None),
        ('{"point_2d": [14, 56]}', PIXELS, None),
        ("There is no cat.", PIXELS, None),
        ("", PIXELS, None),
    ],
)
def test_a_box_is_read_as_shares_of_the_image(answer: str, writing: Writing, box: Box | None) -> None:
    assert read_written(answer, writing) == (box if box is None else pytest.approx(box))


@pytest.mark.parametrize(
    ("answer", "overlap"),
    [
        ('{"bbox_2d": [14, 56, 70, 196], "label": "lady"}', 1.0),
        ('{"bbox_2d": [14, 56, 42, 196], "label": "lady"}', 0.5),
        ('{"bbox_2d": [14, 56, 41, 196], "label": "lady"}', 27 / 56),
        ('{"bbox_2d": [70, 196, 14, 56]}', 0.0),
        ("no", 0.0),
    ],
)
def test_refcoco_is_asked_and_graded_as_qwens_authors_do(tmp_path: Path, answer: str, overlap: float) -> None:
    asked = DATASETS["refcoco"](d.write_refcoco(tmp_path / "RefCOCO"), split="val", protocol="qwen")
    first = next(iter(asked))
    assert first.prompt == (
        "Locate the lady with the blue shirt in this image and output the bbox coordinates in JSON format."
    )
    assert (asked.name, asked.max_new_tokens) == ("refcoco/val (qwen)", 512)
    assert asked.image(first.image).size == (640, 426)
    question = replace(first, box=TENTHS)
    judged = asked.grade(question, answer, PIXELS)
    assert judged.iou == pytest.approx(overlap, abs=1e-9)
    assert judged.score == (overlap >= 0.5)
    # The same numbers are another box for a model that writes thousandths.
    assert asked.grade(question, answer, THOUSANDTHS).iou != pytest.approx(overlap) or overlap == 0


def test_scenes_are_asked_in_qwens_words_and_graded_in_its_units() -> None:
    plain, asked = (SceneSet(grounding=4, vqa=3, boxes=boxes) for boxes in ("shares", "pixels"))
    assert (plain.max_new_tokens, asked.max_new_tokens) == (6, 128)
    assert asked.name == plain.name + " (qwen)"
    for ours, theirs in zip(plain, asked, strict=True):
        assert (ours.id, ours.box, ours.answers) == (theirs.id, theirs.box, theirs.answers)
        if ours.skill == "grounding":
            name = ours.prompt.removeprefix("where is ").removesuffix(" ?")
            assert theirs.prompt == f"Locate {name} in this image and output the bbox coordinates in JSON format."
        else:
            assert theirs.prompt.endswith("?\nAnswer the question using a single word or phrase.")
            assert theirs.prompt[0].isupper()
    where = Question(id="0", image="0", skill="grounding", kind="where", prompt="", box=TENTHS)
    assert asked.grade(where, '{"bbox_2d": [14, 56, 70, 196]}', PIXELS).iou == pytest.approx(1)
    assert grade(where, '{"bbox_2d": [100, 200, 500, 700]}', THOUSANDTHS).score == 1.0
    assert grade(where, "[14, 56, 70", PIXELS).score == 0.0
    word = Question(id="1", image="0", skill="vqa", kind="colour", prompt="", answers=("red",))
    assert [grade(word, text, PIXELS).score for text in ("Red.", "red", "Blue")] == [1.0, 1.0, 0.0]
    assert grade(word, "Red.").score == 0.0


def qwen_bundle(boxes: Boxes, path: str = "bundle") -> Bundle:
    bundle = bundle_of("dense", path=path)
    return replace(bundle, manifest=replace(bundle.manifest, model=replace(bundle.manifest.model, boxes=boxes)))


@pytest.mark.parametrize(("boxes", "size"), [("pixels", (140, 280)), ("thousandths", (140, 280)), ("shares", None)])
def test_the_runner_tells_a_set_how_the_model_saw_the_image(boxes: Boxes, size: tuple[int, int] | None) -> None:
    told: list[Writing | None] = []

    class Seeing(FakeEngine):
        def ask(self, prompt: str, image: object, *, max_new_tokens: int) -> Answer:
            answer = super().ask(prompt, image, max_new_tokens=max_new_tokens)
            return replace(answer, views=(View(original=(640, 420), pixels=(140, 280), grid=(4, 4)),))

    class Asking(FakeSet):
        def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
            told.append(writing)
            return super().grade(question, answer, writing)

    run_bundles([qwen_bundle(boxes)], Asking([1]), open_engine=lambda bundle: Seeing(bundle, str, []))
    assert told == [None if size is None else Writing(boxes=boxes, size=size)]


def test_bundles_that_write_boxes_differently_are_not_asked_together() -> None:
    assert boxes_of([qwen_bundle("pixels"), qwen_bundle("pixels", "other")]) == "pixels"
    with pytest.raises(UserError, match="one writes boxes in shares, two in pixels"):
        boxes_of([qwen_bundle("shares", "one"), qwen_bundle("pixels", "two")])


def test_pope_and_gqa_judge_qwens_protocol_as_lmms_eval() -> None:
    from reroute.evaluation.datasets.gqa import normalise
    from reroute.evaluation.datasets.pope import read_answer

    for text in ("Yes, there is.", "No", "the red car.", "yes"):
        assert read_answer(text, "qwen") == read_answer(text, "lmms-eval")
        assert normalise(text, "qwen") == normalise(text, "lmms-eval")
