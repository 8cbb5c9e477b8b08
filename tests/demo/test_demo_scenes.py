"""Scenes, questions, tokenizer and chat template of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from demo.questions import KINDS, questions
from demo.scenes import COLOURS, SHAPES, Scene, Thing, make_scene, render, scene_rng
from demo.tokenizer import NUMBER_0, UNK, build_fast_tokenizer, build_tokenizer, encode_words
from reroute.boxes import iou

HERE = Path(__file__).parents[2] / "demo"


@pytest.mark.parametrize("index", range(30))
def test_scenes_and_their_questions_are_true(index: int) -> None:
    """Objects lie inside, hardly overlap and are named once; answers follow from them; the vocabulary covers all."""
    rng = scene_rng("validation", 7, index)
    scene = make_scene(rng, 1, 7)
    names = [t.name for t in scene.objects]
    assert len(set(names)) == len(names)
    for i, t in enumerate(scene.objects):
        assert 0 <= t.box[0] < t.box[2] <= 99
        assert 0 <= t.box[1] < t.box[3] <= 99
        assert all(iou(t.box, o.box) < 0.05 for o in scene.objects[:i])
    for q in questions(scene, rng, 40):
        assert UNK not in encode_words(f"{q.text} {q.answer}")
        words = q.text.split()
        if q.kind == "where":
            assert q.answer == " ".join(map(str, next(t.box for t in scene.objects if t.name in q.text)))
        elif q.kind == "exists":
            assert q.answer == ("yes" if f"{words[-3]} {words[-2]}" in names else "no")
        elif q.kind == "colour":
            assert [q.answer] == [t.colour for t in scene.objects if t.shape == words[-2]]
        elif q.kind == "count":
            asked = words[2] if words[3] == "objects" else words[2][: -2 if words[2] == "crosses" else -1]
            assert int(q.answer) == sum(asked in (t.colour, t.shape) for t in scene.objects)
        else:
            pair = [t for t in scene.objects if f"the {t.name}" in q.text]
            assert q.answer == min(pair, key=lambda t: t.box[0] + t.box[2]).shape


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_shape_fills_its_box(shape: str) -> None:
    """The pixels of an object touch all four sides of its true box, and none lies outside."""
    picture = np.asarray(render(Scene((Thing("blue", shape, (20, 30, 50, 56)),)), 400, supersample=4)).astype(int)
    rows, cols = np.nonzero(np.abs(picture - picture[0, 0]).max(-1) > 60)
    found = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    assert np.abs(found - np.array([80, 120, 200, 224])).max() <= 4


def test_splits_never_share_a_stream() -> None:
    """The same seed and index give another scene in every split."""
    scenes = [make_scene(scene_rng(split, 0, 5), 3, 7) for split in ("train", "validation", "heldout")]
    assert scenes[0] != scenes[1] != scenes[2] != scenes[0]


def test_tokenizer_ignores_case_spelling_and_space_before_marks() -> None:
    """People do not write ``circle ?``."""
    tok = build_tokenizer()
    plain = tok.encode("what color is the red circle ? , 12 .").ids
    assert tok.encode("What colour is the red circle?, 12.").ids == plain
    assert UNK not in plain
    assert build_fast_tokenizer().decode([NUMBER_0 + 12, NUMBER_0 + 7], skip_special_tokens=True) == "12 7"
    assert tok.encode("USER: <image>\nhi</s>USER:").tokens[:3] == ["<s>", "user:", "<image>"]


@pytest.mark.parametrize("parts", [True, False])
def test_chat_template_is_that_of_llava(parts: bool) -> None:
    """Lists of parts and plain strings both render; an answer is closed before the next turn."""
    from demo.model import build_processor

    def say(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}

    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]} if parts else None
    talk = [first or say("user", "<image>\na"), say("assistant", "1 2"), say("user", "b")]
    made = build_processor().apply_chat_template(talk, add_generation_prompt=True)
    assert made == "USER: <image>\na ASSISTANT: 1 2</s>USER: b ASSISTANT:"


def test_bundled_pictures_have_true_boxes() -> None:
    """``demo/images/scenes.json`` names pictures that are there, with known colours and shapes."""
    for entry in json.loads((HERE / "images" / "scenes.json").read_text()):
        assert (HERE / "images" / entry["image"]).is_file()
        for thing in entry["objects"]:
            colour, shape = thing["object"].split()
            assert colour in COLOURS
            assert shape in SHAPES
            assert len(thing["box"]) == 4


def test_kinds_cover_what_is_asked() -> None:
    """Every kind is drawn."""
    rng = scene_rng("validation", 1, 1)
    assert {q.kind for q in questions(make_scene(rng, 5, 7), rng, 300)} == set(KINDS)
