"""Quick greedy scores on a few validation scenes while training; the held-out scores come from ``evaluate``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from reroute.boxes import iou

from .data import IMAGE_SIZE
from .packed import Packed
from .questions import KINDS, questions, where
from .scenes import make_scene, render, scene_rng
from .tokenizer import NUMBER_0, PAD, encode_words


class Validation:
    """``scenes`` scenes of 3 to 7 objects from the validation split, prepared once."""

    def __init__(self, seed: int, device: str, scenes: int = 64) -> None:
        self.device = device
        pixels, ids, self.boxes, self.words = [], [], [], []
        for i in range(scenes):
            rng = scene_rng("validation", seed, i)
            scene = make_scene(rng, 3, 7)
            picture = render(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(picture))
            asked = [where(t) for t in scene.objects]
            asked += [asked[0]] * (7 - len(asked))
            self.boxes.append([q.box for q in asked][: len(scene.objects)])
            one_word = questions(scene, rng, 8, KINDS[1:])
            rows = np.full((15, 15), PAD)
            for r, q in enumerate(asked + one_word):
                prompt = encode_words(q.text + " assistant:")
                rows[r, : len(prompt)] = prompt
            ids.append(rows)
            self.words.append([(q.kind, len(encode_words(q.text)), encode_words(q.answer)[0]) for q in one_word])
        self.pixels, self.ids = torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(ids))

    @torch.no_grad()
    def __call__(self, model: LlavaForConditionalGeneration) -> dict[str, float]:
        """Share of boxes with IoU of at least 0.5, their mean IoU, and one-word accuracy by kind."""
        packed = Packed(model)
        hits: dict[str, list[float]] = {"where": [], "mean_iou": []}
        keep = torch.arange(576, device=self.device)[None]
        for b in range(0, len(self.ids), 8):
            ids = self.ids[b : b + 8].to(self.device)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                first = ids
                visual = packed.visual(self.pixels[b : b + 8].to(self.device))
                for turn in range(4):
                    # Later passes only extend the boxes: the one-word answers are read off the first.
                    part = ids if turn == 0 else ids[:, :7]
                    best = packed.answers(visual, keep.expand(len(ids), -1), part)[0].float().argmax(-1)
                    ids[:, :7, 7 + turn] = best[:, :7, 6 + turn]
                    first = best if turn == 0 else first
            for i, row in enumerate(ids.tolist()):
                for r, box in enumerate(self.boxes[b + i]):
                    score = iou(tuple(v - NUMBER_0 for v in row[r][7:11]), box)
                    hits["where"].append(score >= 0.5)
                    hits["mean_iou"].append(score)
                for r, (kind, at, answer) in enumerate(self.words[b + i]):
                    if kind != "where":
                        hits.setdefault(kind, []).append(int(first[i, 7 + r, at]) == answer)
        return {f"val_{k}": round(float(np.mean(v)), 4) for k, v in hits.items()}
