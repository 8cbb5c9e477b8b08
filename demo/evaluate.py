"""Score the model in torch on held-out scenes: ``python -m demo.evaluate demo/model --scenes 500 --objects 3-7``.

A model folder runs as shipped through the transformers classes: dense, greedy, one question per prompt, fp32 or what
``--dtype`` says. Scenes, questions and grades are those of ``reroute eval``, which scores bundles: held-out scenes come
from their own random streams, which training and validation never draw from.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from reroute.demo.scenes import render
from reroute.evaluation.questions import Question
from reroute.evaluation.scenes import grade, one_of_each, scene_questions

from .questions import KINDS
from .tokenizer import EOS

__all__ = ["answer", "evaluate", "one_of_each", "table"]


@torch.no_grad()
def answer(model, processor, image: Image.Image, asked: list[Question], limit: int = 6) -> list[str]:
    """Greedy answers to single-turn questions about one image.

    What the prompts have in common (``<s> USER:`` and the image) runs once and its cache is shared; questions of
    one length then run together, so that there is no padding and every answer is that of its prompt alone.
    """
    talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.prompt}]}] for q in asked]
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


def evaluate(folder: str, scenes: int, low: int, high: int, seed: int, split: str, dtype: str, device: str) -> dict:
    """Scores of a model folder; every object of every scene is asked for, and one question of each other kind."""
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval().to(device)
    ious: list[float] = []
    right: dict[str, list[float]] = {k: [] for k in KINDS[1:]}
    malformed = 0
    began = time.time()
    for index in range(scenes):
        scene, asked = scene_questions(split, seed, index, (low, high))
        for q, text in zip(asked, answer(model, processor, render(scene), asked), strict=True):
            verdict = grade(q, text)
            if q.skill == "grounding":
                malformed += verdict.box is None
                ious.append(verdict.iou or 0.0)
            else:
                right[q.kind].append(verdict.score)
    words = [ok for v in right.values() for ok in v]
    return {
        "split": split,
        "seed": seed,
        "scenes": scenes,
        "objects": [low, high],
        "answered_by": f"transformers {dtype}, dense",
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
    p.add_argument("model", help="folder of a model; `reroute eval` scores bundles")
    p.add_argument("--scenes", type=int, default=500)
    p.add_argument("--objects", default="3-7", help="fewest-most objects of a scene")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("heldout", "validation"), default="heldout")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", type=Path, help="also write the scores there")
    a = p.parse_args()
    if (Path(a.model) / "reroute.json").is_file():
        p.error(f"{a.model} is a bundle or an export: score bundles with `reroute eval`")
    low, _, high = a.objects.partition("-")
    result = evaluate(a.model, a.scenes, int(low), int(high or low), a.seed, a.split, a.dtype, a.device)
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    print(table(result))


if __name__ == "__main__":
    main()
