"""Where the last prompt row looks, layer by layer: ``python -m demo.attention demo/model --scenes 64``.

For ``where`` questions on validation scenes: the attention probability (mean over heads) that the last prompt row
gives to the visual tokens of the object asked about, to all visual tokens, and the share of questions for which
tokens of that object are among the ``--top`` visual tokens.
"""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .data import patch_labels
from .questions import where
from .scenes import make_scene, render, scene_rng


@torch.no_grad()
def measure(folder: str, scenes: int, top: int, seed: int) -> list[dict[str, float]]:
    """One row per layer: mass on the object, on the image, best rank, hit rate and coverage of the top tokens."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    found: list[list[tuple[float, ...]]] = []
    for index in range(scenes):
        scene = make_scene(scene_rng("validation", seed, index), 3, 7)
        owner = torch.from_numpy(patch_labels(scene)[3])
        image = render(scene)
        cache = None
        for number, thing in enumerate(scene.objects):
            talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": where(thing).text}]}]
            prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            spots = (inputs["input_ids"][0] == model.config.image_token_index).nonzero().flatten()
            shared = int(spots[-1]) + 1
            if cache is None:
                front = {"input_ids": inputs["input_ids"][:, :shared], "pixel_values": inputs["pixel_values"]}
                cache = model(**front, use_cache=True).past_key_values
            out = model(
                input_ids=inputs["input_ids"][:, shared:],
                past_key_values=copy.deepcopy(cache),
                use_cache=True,
                output_attentions=True,
            )
            own = owner == number
            rows = []
            for probability in out.attentions:
                score = probability[0, :, -1].mean(0)[spots]
                order = score.argsort(descending=True, stable=True)
                hits = own[order]
                rows.append(
                    (
                        float(score[own].sum()),
                        float(score.sum()),
                        float(hits.nonzero()[0]) + 1,
                        float(hits[:top].any()),
                        float(hits[:top].sum() / min(top, int(own.sum()))),
                    )
                )
            found.append(rows)
    table = np.asarray(found)
    mean, median = table.mean(0), np.median(table, 0)
    return [
        {
            "layer": i,
            "object_mass": round(float(m[0]), 4),
            "image_mass": round(float(m[1]), 4),
            "best_rank_median": float(median[i, 2]),
            "hit": round(float(m[3]), 4),
            "coverage": round(float(m[4]), 4),
        }
        for i, m in enumerate(mean)
    ]


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--scenes", type=int, default=64)
    p.add_argument("--top", type=int, default=22)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    for row in measure(a.model, a.scenes, a.top, a.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
