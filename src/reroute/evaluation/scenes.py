"""Generated scenes as a question set: nothing is downloaded, and every seed is a set of its own.

Scenes are taken in the order of their random streams (`reroute.demo.scenes.scene_rng`), and of each scene in this
order: where every object is, then one question of every one-word kind that the scene allows. So a smaller set is the
beginning of a larger one of the same split, seed and objects.

The demo model answers with four numbers and one word, as it was trained to. Models that write boxes in pixels or
thousandths (Qwen-VL) are asked in their own words (see `reroute.evaluation.datasets.protocol`), may write JSON, and
a word of theirs counts whatever its case, with or without a full stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from reroute.boxes import iou
from reroute.demo import questions as drawn
from reroute.demo.scenes import SPLITS, Scene, make_scene, render, scene_rng
from reroute.demo.scenes import Question as SceneQuestion
from reroute.errors import UserError, nearest
from reroute.evaluation.datasets.protocol import LOCATE, SHORT_ANSWER
from reroute.evaluation.questions import Box, Grade, Question, Writing
from reroute.evaluation.writing import read_written
from reroute.manifest import Boxes
from reroute.runtime import parse_box

MIN_IOU = 0.5
MAX_QUESTIONS = 100_000
MAX_OBJECTS = 12  # more of them hardly fit on a scene
SCORED_SPLITS = tuple(sorted(SPLITS.keys() - {"train"}))


class SceneSet:
    """`grounding` questions for a box and `vqa` one-word questions on generated scenes."""

    def __init__(
        self,
        *,
        grounding: int = 1000,
        vqa: int = 1000,
        objects: tuple[int, int] = (3, 7),
        seed: int = 0,
        split: str = "heldout",
        boxes: Boxes = "shares",
    ) -> None:
        """Draw the scenes; they are rendered when asked for.

        Args:
            grounding: number of questions for a box.
            vqa: number of one-word questions.
            objects: fewest and most objects of a scene.
            seed: of the scenes.
            split: "heldout", which training never saw in any form, or "validation".
            boxes: how the models that are asked write boxes: all in shares, or all otherwise.

        Raises:
            UserError: a split, a number of questions or a number of objects that there is not.
        """
        if split not in SCORED_SPLITS:
            raise UserError(f"unknown split {split!r} of the generated scenes", hint=nearest(split, SCORED_SPLITS))
        for name, number in (("grounding", grounding), ("vqa", vqa)):
            if not 0 <= number <= MAX_QUESTIONS:
                raise UserError(f"{number} {name} questions are impossible", hint=f"ask for 0 to {MAX_QUESTIONS}")
        if grounding + vqa == 0:
            raise UserError("0 grounding and 0 vqa questions leave nothing to ask", hint="ask for at least one")
        low, high = objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise UserError(
                f"scenes of {low} to {high} objects are impossible", hint=f"give 1 to {MAX_OBJECTS}, for example 3-7"
            )
        if seed < 0:
            raise UserError(f"the seed {seed} is negative", hint="give 0 or more")
        self.json_boxes = boxes != "shares"
        self.name = f"scenes/{split}, seed {seed}, {low} to {high} objects" + (" (qwen)" if self.json_boxes else "")
        # A box of the demo is four tokens, and what goes on after six is wrong anyway; JSON takes some forty.
        self.max_new_tokens = 128 if self.json_boxes else 6
        self._scenes: list[Scene] = []
        self._questions: list[Question] = []
        left = {"grounding": grounding, "vqa": vqa}
        while any(left.values()):
            index = len(self._scenes)
            scene, asked = scene_questions(split, seed, index, objects)
            self._scenes.append(scene)
            for question in asked:
                if left[question.skill]:
                    left[question.skill] -= 1
                    self._questions.append(_in_words(question) if self.json_boxes else question)

    def __len__(self) -> int:
        return len(self._questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._questions)

    def image(self, key: str) -> Image.Image:
        """Draw a scene, 384 x 384 pixels."""
        return render(self._scenes[int(key)])

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """Judge an answer; see `grade`."""
        return grade(question, answer, writing)


def scene_questions(split: str, seed: int, index: int, objects: tuple[int, int]) -> tuple[Scene, list[Question]]:
    """One scene of a random stream and everything asked about it, in a fixed order."""
    rng = scene_rng(split, seed, index)
    scene = make_scene(rng, *objects)
    asked = [drawn.where(thing) for thing in scene.objects] + one_of_each(scene, rng)
    return scene, [_question(index, number, question) for number, question in enumerate(asked)]


def one_of_each(scene: Scene, rng: np.random.Generator) -> list[SceneQuestion]:
    """One question of every one-word kind that the scene allows."""
    asked = (drawn.questions(scene, rng, 1, (kind,))[0] for kind in drawn.KINDS[1:])
    return [question for question in asked if question.kind != "where"]


def grade(question: Question, answer: str, writing: Writing | None = None) -> Grade:
    """Judge an answer about a scene: a box by its IoU, at least 0.5 is right, and a word by equality."""
    if question.skill == "vqa":
        word = answer.strip() if writing is None else answer.strip().removesuffix(".").lower()
        return Grade(score=float(word in question.answers))
    box = parse_box(answer) if writing is None else read_written(answer, writing)
    overlap = iou(_hundredths(box), _hundredths(question.box)) if box and question.box else 0.0
    return Grade(score=float(overlap >= MIN_IOU), iou=overlap, box=box)


def _hundredths(box: Box) -> tuple[float, ...]:
    """What was drawn and answered: whole numbers, in which an IoU of one half is exactly 0.5."""
    return tuple(round(100 * side, 6) for side in box)


def _in_words(question: Question) -> Question:
    """The question as Qwen-VL is asked."""
    if question.skill == "grounding":
        name = question.prompt.removeprefix("where is ").removesuffix(" ?")
        return replace(question, prompt=LOCATE.format(name))
    words = question.prompt.replace(" ,", ",").replace(" ?", "?")
    return replace(question, prompt=words[:1].upper() + words[1:] + SHORT_ANSWER)


def _question(index: int, number: int, asked: SceneQuestion) -> Question:
    box: Box | None = None
    if asked.box is not None:
        x1, y1, x2, y2 = (side / 100 for side in asked.box)
        box = (x1, y1, x2, y2)
    grounding = asked.kind == "where"
    return Question(
        id=f"{index}/{number}",
        image=str(index),
        skill="grounding" if grounding else "vqa",
        kind=asked.kind,
        prompt=asked.text,
        answers=() if grounding else (asked.answer,),
        box=box,
    )
