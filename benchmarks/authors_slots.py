"""The Reroute authors' PyTorch code beside ours, on equal weights and inputs: which visual tokens each decision keeps.

Theirs is `elmma/mllm-reroute`, made for transformers 5.4.0; ours is the decoder that is exported. Random weights with
the depth of LLaVA-1.5-7B (32) and Qwen2.5-VL-7B (28), 576 visual tokens, the published schedules of the PyramidDrop
pair.

    python benchmarks/authors_slots.py make DIR
    pip install --target TF --no-deps transformers==5.4.0
    git clone https://github.com/elmma/mllm-reroute CODE
    PYTHONPATH=TF:CODE python benchmarks/authors_slots.py theirs DIR
    python benchmarks/authors_slots.py ours DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROWS = COLUMNS = 24
VISUAL = ROWS * COLUMNS
SEEDS = 3
MODELS = {"llava": "llava15", "qwen2_5_vl": "qwen25"}
TIERS = ("avg192", "avg128", "avg64")
WAYS = {"pdrop": "physical_delete", "reroute-pdrop": "compact_route"}


def make(folder: Path) -> None:
    """Random checkpoints, and for each a prompt with one image."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.conftest import TinyLlava, make_llava
    from tests.qwen import CELL, IMAGE_TOKEN, SPECIAL, make_qwen

    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        size = TinyLlava(layers=32, kv_heads=4, image_size=8 * ROWS, seed=seed)
        make_llava(folder / f"llava-{seed}", size)
        make_qwen(folder / f"qwen2_5_vl-{seed}", seed=seed, layers=28)
        before, after = rng.integers(10, 170, 20), rng.integers(10, 170, 44)
        start, end = (SPECIAL.index(f"<|vision_{side}|>") for side in ("start", "end"))
        ids = {
            "llava": [*before, *[4] * VISUAL, *after],
            "qwen2_5_vl": [*before, start, *[IMAGE_TOKEN] * VISUAL, end, *after],
        }
        for name, sides in (("llava", 8), ("qwen2_5_vl", CELL)):
            pixels = torch.from_numpy(rng.standard_normal((1, 3, ROWS * sides, COLUMNS * sides)).astype(np.float32))
            place = folder / f"{name}-{seed}" / "input.npz"
            np.savez(place, ids=np.asarray(ids[name], dtype=np.int64), pixels=pixels.numpy())


def specs(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Spec name, the authors' action, and the schedule's layers and shares, of one model."""
    from reroute.published import PUBLISHED

    found = []
    for tier in TIERS:
        for way, action in WAYS.items():
            spec = f"{MODELS[name]}/{tier}/{way}"
            head, keep = PUBLISHED[spec].split(":keep=")
            layers = [int(layer) for layer in head.partition("@")[2].split(",")]
            found.append((spec, action, {"layers": layers, "keep": [float(share) for share in keep.split(",")]}))
    return found


def theirs(folder: Path) -> None:
    """Run the authors' code; writes theirs.json: spec -> for each decision the kept visual tokens."""
    import torch
    import transformers
    from models.dispatcher import TokenDispatcher  # pyright: ignore[reportMissingImports]
    from models.patching import patch_model_for_routing, unpatch_model  # pyright: ignore[reportMissingImports]
    from models.router import PDropRouter  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    result: dict[str, Any] = {"transformers": transformers.__version__}
    kinds = {
        "llava": (transformers.LlavaForConditionalGeneration, "llava"),
        "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, "qwen25vl"),
    }
    for name, (kind, family) in kinds.items():
        for seed in range(SEEDS):
            place = folder / f"{name}-{seed}"
            data = np.load(place / "input.npz")
            ids, pixels = torch.from_numpy(data["ids"])[None], torch.from_numpy(data["pixels"])
            inputs: dict[str, Any] = {"pixel_values": pixels}
            if name == "qwen2_5_vl":
                patch = pixels.shape[2] // ROWS // 2
                flat = pixels[0].reshape(3, ROWS, 2, patch, COLUMNS, 2, patch).permute(1, 4, 2, 5, 0, 3, 6)
                flat = flat[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(4 * VISUAL, -1)
                inputs = {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]])}
                inputs["mm_token_type_ids"] = (ids == torch.mode(ids).values).int()
            model: Any = kind.from_pretrained(place, dtype=torch.float32, attn_implementation="sdpa").eval()
            if name == "llava":
                # The tower's tensors had another prefix then.
                tensors = load_file(place / "model.safetensors")
                tower = {key[13:]: tensor for key, tensor in tensors.items() if key.startswith("vision_tower.")}
                model.model.vision_tower.vision_model.load_state_dict(tower)
            else:
                # 5.4.0 multiplies the time of a still image, which later versions mend (transformers issue 45325).
                places, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
                image = inputs["mm_token_type_ids"][0].bool()
                places[0, :, image] = places[1, 0, image].min()
                inputs["position_ids"] = places
            for spec, action, schedule in specs(name):
                router = PDropRouter(
                    drop_layers=schedule["layers"],
                    keep_ratios=schedule["keep"],
                    monotonic=action == "physical_delete",
                )
                context = patch_model_for_routing(model, router, TokenDispatcher(), action, family)
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
                left = np.arange(VISUAL)
                kept = []
                for layer in schedule["layers"]:
                    chosen = context.routing_log[layer].selected_indices[0].numpy()
                    now = left[chosen]
                    left = now if action == "physical_delete" else left
                    kept.append(now.tolist())
                result[f"{seed}:{spec}"] = {"kept": kept, "logits": logits.tolist()}
                unpatch_model(model, family)
    (folder / "theirs.json").write_text(json.dumps(result))


def ours(folder: Path) -> None:
    """Run our decoder on the same and print how many kept tokens are equal."""
    import torch

    from reroute.cost import resolve
    from reroute.export.checkpoint import Checkpoint
    from reroute.export.models import family_of
    from reroute.export.reference import RecordingDecoder, encode, mrope_offsets
    from reroute.routing import RoutingSpec

    expected = json.loads((folder / "theirs.json").read_text())
    print(f"theirs with transformers {expected.pop('transformers')}; {SEEDS} random checkpoints of each model\n")
    print("| schedule | decisions | decisions with equal slots | kept tokens equal | largest difference of logits |")
    print("|---|---:|---:|---:|---:|")
    for name in MODELS:
        for spec, _, _ in specs(name):
            equal = total = same = decisions = 0
            worst = 0.0
            for seed in range(SEEDS):
                place = folder / f"{name}-{seed}"
                data = np.load(place / "input.npz")
                opened = Checkpoint.open(place)
                family = family_of(opened)
                model = family.read(opened)
                if model.vision.grids:
                    # Beyond the small processor's max_pixels: the same tower, on the grid of this comparison.
                    from dataclasses import replace

                    vision = replace(
                        model.vision, grid=(ROWS, COLUMNS), grids=((ROWS, COLUMNS),), tokens_per_image=VISUAL
                    )
                    model = replace(model, vision=vision)
                schedule = resolve(RoutingSpec.parse(f"published:{spec}"), model)
                decoder = family.build_decoder(opened, model, schedule)
                visual = encode(family.build_vision(opened, model, schedule), torch.from_numpy(data["pixels"]))
                ids = data["ids"]
                image = ids == model.tokens.image_token_id
                run = RecordingDecoder(decoder, len(ids) + 1)
                offsets = None
                if model.text.mrope is not None:
                    first = int(np.flatnonzero(image)[0])
                    short = np.concatenate([ids[:first], ids[first : first + 1], ids[first + VISUAL :]])
                    offsets, _ = mrope_offsets(short, model.tokens.image_token_id, [(ROWS, COLUMNS)])
                slots = torch.from_numpy(np.flatnonzero(image))
                text = torch.from_numpy(np.flatnonzero(~image))
                output = run.step(torch.from_numpy(ids[~image])[None], visual.embeds, text, slots, offsets=offsets)
                want = expected[f"{seed}:{spec}"]
                worst = max(worst, float((output.logits[0] - torch.tensor(want["logits"])).abs().max()))
                for route, kept in zip(output.routes, want["kept"], strict=True):
                    have = set((route[0][torch.isin(route[0], slots)] - slots[0]).tolist())
                    equal, total = equal + len(have & set(kept)), total + len(kept)
                    same, decisions = same + (have == set(kept)), decisions + 1
            print(f"| `{spec}` | {decisions} | {same} | {equal} of {total} | {worst:.1e} |")


def main() -> None:
    """One of the three steps."""
    parser = argparse.ArgumentParser(description="The authors' code beside ours.")
    parser.add_argument("step", choices=("make", "theirs", "ours"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    {"make": make, "theirs": theirs, "ours": ours}[args.step](args.folder)


if __name__ == "__main__":
    main()
