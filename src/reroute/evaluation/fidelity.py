"""What quantisation does to routing and answers: a bundle beside the float32 bundle of its export, on questions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from reroute.evaluation.questions import Question, QuestionSet
from reroute.evaluation.runner import Engine, writing_of
from reroute.gates import QUESTION_SLOTS
from reroute.manifest import Model
from reroute.parity import CheckRow
from reroute.runtime import Answer


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far two engines agree, 0..1.

    Attributes:
        questions: what was asked.
        count: how many.
        slots: visual tokens kept that float32 keeps too, of all decisions of all questions.
        by_decision: the same for each decision layer.
        answers: equal answers, as text.
        scores: by skill, the mean score of float32 and of this engine.
    """

    questions: str
    count: int
    slots: float
    by_decision: dict[int, float]
    answers: float
    scores: dict[str, tuple[float, float]]

    def rows(self) -> list[CheckRow]:
        """As rows of a check; only the slots are a gate."""
        what = f"{self.count} questions"
        rows = []
        if self.by_decision:
            worst = min(self.by_decision, key=lambda layer: self.by_decision[layer])
            rows.append(
                CheckRow(
                    part=what,
                    quantity="slots of float32",
                    measured=f"{self.slots:.2%}, layer {worst}: {self.by_decision[worst]:.2%}",
                    gate=f"of all decisions >= {QUESTION_SLOTS:.0%}",
                    passed=self.slots >= QUESTION_SLOTS,
                )
            )
        rows.append(
            CheckRow(
                part=what, quantity="answers of float32", measured=f"{self.answers:.1%}", gate="reported", passed=True
            )
        )
        for skill, (base, own) in self.scores.items():
            measured = f"{own:.1%}, float32 {base:.1%}"
            rows.append(CheckRow(part=what, quantity=skill, measured=measured, gate="reported", passed=True))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        by_decision = {str(layer): share for layer, share in self.by_decision.items()}
        return {
            **asdict(self),
            "by_decision": by_decision,
            "scores": {s: list(pair) for s, pair in self.scores.items()},
        }


def fidelity(
    base: Callable[[], Engine],
    engine: Callable[[], Engine],
    questions: QuestionSet,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Fidelity:
    """Ask two engines of one export the same questions about the same features.

    Args:
        base: opens the float32 engine.
        engine: opens the quantised one.
        questions: to ask.
        advance: called after each question.
    """
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(one())) for one in (base, engine)]
        model, layers = engines[0].manifest.model, engines[0].manifest.schedule.decision_layers
        equal, kept = np.zeros(len(layers)), np.zeros(len(layers))
        same = 0
        scores: dict[str, list[list[float]]] = {}
        for key, asked in groupby(questions, key=lambda question: question.image):
            features = engines[0].encode(questions.image(key))
            for question in asked:
                first, second = (_ask(one, question, features, questions.max_new_tokens) for one in engines)
                equal += [np.isin(b, a).sum() for a, b in zip(first.routes, second.routes, strict=True)]
                kept += [len(route) for route in first.routes]
                same += first.text == second.text
                grades = [_score(questions, question, answer, model) for answer in (first, second)]
                scores.setdefault(question.skill, []).append(grades)
                advance()
    return Fidelity(
        questions=questions.name,
        count=len(questions),
        slots=float(equal.sum() / kept.sum()) if len(layers) else 1.0,
        by_decision={layer: float(share) for layer, share in zip(layers, equal / kept, strict=True)},
        answers=same / len(questions),
        scores={skill: _means(pairs) for skill, pairs in scores.items()},
    )


def _ask(engine: Engine, question: Question, features: Any, max_new_tokens: int) -> Answer:
    engine.reset()
    return engine.ask(question.prompt, features, max_new_tokens=max_new_tokens)


def _score(questions: QuestionSet, question: Question, answer: Answer, model: Model) -> float:
    return questions.grade(question, answer.text.strip(), writing_of(model, answer)).score


def _means(pairs: list[list[float]]) -> tuple[float, float]:
    base, own = np.mean(pairs, axis=0)
    return float(base), float(own)
