"""Score a model or an engine on held-out scenes: ``python -m demo.evaluate demo/model --scenes 500 --objects 3-7``.

A model folder runs as shipped through the transformers classes: dense, greedy, one question per prompt, fp32 or what
``--dtype`` says. A bundle of ``reroute build`` runs through ``reroute.runtime``, routed as it was built.
Held-out scenes come from their own random streams, which training and validation never draw from.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from reroute.boxes import iou

from .questions import KINDS, questions, where
from .scenes import Question, make_scene, render, scene_rng
from .tokenizer import EOS

Answerer = Callable[[Image.Image, list[Question]], list[str]]


def parse_box(text: str) -> tuple[int, ...] | None:
    """The box in an answer, or None unless it is exactly four numbers."""
    words = text.split()
    return tuple(map(int, words)) if len(words) == 4 and all(w.isdigit() for w in words) else None


def one_of_each(scene, rng: np.random.Generator) -> list[Question]:
    """One question of every one-word kind that the scene allows."""
    asked = (questions(scene, rng, 1, (kind,))[0] for kind in KINDS[1:])
    return [q for q in asked if q.kind != "where"]


@torch.no_grad()
def answer(model, processor, image: Image.Image, asked: list[Question], limit: int = 6) -> list[str]:
    """Greedy answers to single-turn questions about one image.

    What the prompts have in common (``<s> USER:`` and the image) runs once and its cache is shared; questions of
    one length then run together, so that there is no padding and every answer is that of its prompt alone.
    """
    talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for q in asked]
    prompts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in talks]
    first = processor(images=image, text=prompts[0], return_tensors="pt").to(model.device)
    shared = int((first["input_ids"][0] == model.config.image_token_index).nonzero().max()) + 1
    front = model(
        input_ids=first["input_ids"][:, :shared], pixel_values=first["pixel_values"].to(model.dtype), use_cache=True
    ).past_key_values
    # Outside the image the processor changes nothing, so the rest of a prompt is what follows its placeholder.
    rests = [processor.tokenizer(p.split("<image>")[1])["input_ids"][1:] for p in prompts]
    answers = [""] * len(asked)
    for length in sorted({len(r) for r in rests}):
        rows = [i for i, r in enumerate(rests) if len(r) == length]
        cache = copy.deepcopy(front)
        cache.batch_repeat_interleave(len(rows))
        step = torch.tensor([rests[i] for i in rows], device=model.device)
        made: list[torch.Tensor] = []
        for _ in range(limit):
            step = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            made.append(step)
        for i, row in zip(rows, torch.cat(made, 1).tolist(), strict=True):
            end = row.index(EOS) if EOS in row else limit
            answers[i] = processor.tokenizer.decode(row[:end]).strip()
    return answers


def answerer(folder: str, dtype: str, device: str) -> tuple[Answerer, str]:
    """What answers questions about an image, and what it is: a model folder, or a bundle in its engine."""
    if (Path(folder) / "reroute.json").is_file():
        from reroute.runtime import Session

        session = Session.open(folder)

        def ask(image: Image.Image, asked: list[Question]) -> list[str]:
            answers = []
            for question in asked:
                session.reset()
                answers.append(session.ask(question.text, image, max_new_tokens=6).text.strip())
            return answers

        return ask, f"engine, {session.manifest.routing}"
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval().to(device)
    return partial(answer, model, processor), f"transformers {dtype}, dense"


def evaluate(folder: str, scenes: int, low: int, high: int, seed: int, split: str, dtype: str, device: str) -> dict:
    """Scores of a model folder; every object of every scene is asked for, and one question of each other kind."""
    ask, what = answerer(folder, dtype, device)
    ious: list[float] = []
    right: dict[str, list[bool]] = {k: [] for k in KINDS[1:]}
    malformed = 0
    began = time.time()
    for index in range(scenes):
        rng = scene_rng(split, seed, index)
        scene = make_scene(rng, low, high)
        asked = [where(t) for t in scene.objects] + one_of_each(scene, rng)
        for q, text in zip(asked, ask(render(scene), asked), strict=True):
            if q.box and q.kind == "where":
                box = parse_box(text)
                malformed += box is None
                ious.append(iou(box, q.box) if box else 0.0)
            else:
                right[q.kind].append(text == q.answer)
    words = [ok for v in right.values() for ok in v]
    return {
        "split": split,
        "seed": seed,
        "scenes": scenes,
        "objects": [low, high],
        "answered_by": what,
        "where": {
            "questions": len(ious),
            "iou50": round(float(np.mean(np.array(ious) >= 0.5)), 4),
            "iou75": round(float(np.mean(np.array(ious) >= 0.75)), 4),
            "mean_iou": round(float(np.mean(ious)), 4),
            "malformed": malformed,
        },
        "one_word": {
            "questions": len(words),
            "accuracy": round(float(np.mean(words)), 4),
            "by_kind": {k: {"questions": len(v), "accuracy": round(float(np.mean(v)), 4)} for k, v in right.items()},
        },
        "seconds": round(time.time() - began, 1),
    }


def table(result: dict) -> str:
    """The scores as a Markdown table."""
    low, high = result["objects"]
    w, o = result["where"], result["one_word"]
    lines = [
        f"| {result['scenes']} {result['split']} scenes of {low}-{high} objects | questions | score |",
        "|---|---|---|",
        f"| where: IoU >= 0.5 | {w['questions']} | {w['iou50']:.1%} |",
        f"| where: IoU >= 0.75 | {w['questions']} | {w['iou75']:.1%} |",
        f"| where: mean IoU | {w['questions']} | {w['mean_iou']:.3f} |",
        f"| one-word answers | {o['questions']} | {o['accuracy']:.1%} |",
    ]
    lines += [f"| - {k} | {v['questions']} | {v['accuracy']:.1%} |" for k, v in o["by_kind"].items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="folder of a model or of a bundle")
    p.add_argument("--scenes", type=int, default=500)
    p.add_argument("--objects", default="3-7", help="fewest-most objects of a scene")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("heldout", "validation"), default="heldout")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", type=Path, help="also write the scores there")
    a = p.parse_args()
    low, _, high = a.objects.partition("-")
    result = evaluate(a.model, a.scenes, int(low), int(high or low), a.seed, a.split, a.dtype, a.device)
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    print(table(result))


if __name__ == "__main__":
    main()
