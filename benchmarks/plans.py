"""Plans of full-size models from their public configs, without weights: FLOPs, KV cache and memory as a table.

    python benchmarks/plans.py            # docs/plans.md on stdout
    python benchmarks/plans.py --json

The configs in the script hold the values of config.json and preprocessor_config.json of the public checkpoints that
shapes follow from; the public files they were compared with stand beside them. Everything is counted as `reroute export
--dry-run` counts it (see `reroute.cost`), for float16 weights and caches, 64 text tokens and one image, a session of
512 text tokens and 2 images. An engine of this size was not built.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from reroute.cost import Plan, plan_for, resolve
from reroute.export import llama
from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import RoutedDecoder
from reroute.export.grids import with_grids
from reroute.export.models import llava, qwen2_5_vl, qwen_vl
from reroute.manifest import Capacity, GridProcessing, ImageProcessing, Model, TextModel, Tokens, VisionModel
from reroute.report import format_bytes, format_flops
from reroute.routing import RoutingSpec

# Compared value by value with these files on huggingface.co, as far as a value is there. What they leave away is
# transformers' default: LlamaConfig's 4096, 11008, 32, 32 for LLaVA-1.5-7B, Qwen2_5_VLVisionConfig's depth, heads,
# intermediate size, windows and layers without windows where a file names only what differs.
# LLaVA-1.5-7B: mohitsha/llava-1.5-7b-hf config.json, whose _name_or_path is llava-hf/llava-1.5-7b-hf.
# LLaVA-1.5-13B: the text model is lmsys/vicuna-13b-v1.5 (TheBloke/vicuna-13B-v1.5-GPTQ config.json), tower and
#   vocabulary (32000 and 64 for the image token) as for 7B; the checkpoint's own config.json was not to be had.
# Qwen2.5-VL-7B: Qwen/Qwen2.5-VL-7B-Instruct config.json; its vocabulary by the module's print in
#   github.com/acproject/duorou docs/qwen2.5vl_graph.md.
# Qwen2.5-VL-3B: dahwinsingularity/vllm2 config.json, whose _name_or_path is Qwen/Qwen2.5-VL-3B-Instruct, and
#   vbdai/CPPO-3B, which has the tower written out; vocabulary: vinayakk2/parseo-1.
# Processor: mlx-community/Qwen2.5-VL-3B-Instruct-6bit preprocessor_config.json; its means do not matter here.
_CLIP = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
         "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}  # fmt: skip
_VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"}  # fmt: skip
_QWEN = {"model_type": "qwen2_5_vl", "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu"}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "LLaVA-1.5-7B": {
        "model_type": "llava", "vision_config": _CLIP, "vision_feature_layer": -2,
        "text_config": {**_VICUNA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                        "num_attention_heads": 32, "num_key_value_heads": 32},
    },
    "LLaVA-1.5-13B": {
        "model_type": "llava", "vision_config": _CLIP, "vision_feature_layer": -2,
        "text_config": {**_VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                        "num_attention_heads": 40, "num_key_value_heads": 40},
    },
    "Qwen2.5-VL-3B": {
        **_QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 2048},
    },
    "Qwen2.5-VL-7B": {
        **_QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 3584},
    },
}  # fmt: skip
_HALVES = (0.5, 0.5, 0.5)
CLIP_PROCESSING = ImageProcessing(
    shortest_edge=336, crop_height=336, crop_width=336, resample=3, rescale_factor=1 / 255, mean=_HALVES, std=_HALVES
)
QWEN_PROCESSING = GridProcessing(
    cell=28, min_pixels=3136, max_pixels=12845056, resample=3, rescale_factor=1 / 255, mean=_HALVES, std=_HALVES
)
SCHEDULES = {
    "llava": ("dense", "published:llava15/avg192/reroute-pdrop", "reroute-pdrop:avg=1/9"),
    "qwen2_5_vl": (
        "dense", "published:qwen25/avg192/reroute-pdrop", "reroute-pdrop:avg=1/9", "published:qwen25/keep25/nuwa",
        "reroute-nuwa:avg=1/9",
    ),
}  # fmt: skip
# Memory that processor and GPU share; the system and other processes need some of it.
BOARDS = {"Orin Nano 8 GB": 8, "Orin NX 16 GB": 16, "AGX Orin 64 GB": 64}
USABLE = 0.8
CAPACITY = Capacity()
SHOWN_GRIDS = ((24, 24), (18, 32), (20, 27), (12, 12))


def model_of(name: str) -> Model:
    """The description that a checkpoint with this config has."""
    config = CONFIGS[name]
    checkpoint = Checkpoint(Path(name), config, {})
    with torch.device("meta"):
        if config["model_type"] == "llava":
            parsed = llava.parse_config(checkpoint)
            text, vision = llama.text_model(checkpoint, parsed), llava.vision_model(parsed)
            biased, tower = llama.biases(parsed.text_config), llava.VisionTower(parsed)
            return _model(config, text, vision, CLIP_PROCESSING, biased, tower)
        parsed = qwen2_5_vl.parse_config(checkpoint)
        text = llama.text_model(checkpoint, parsed, mrope=qwen_vl.mrope(parsed))
        vision = qwen2_5_vl.vision_model(parsed)
        tower = qwen2_5_vl.tower(parsed, vision)
        model = _model(config, text, vision, QWEN_PROCESSING, qwen2_5_vl.BIASED, tower)
    return with_grids(model, qwen_vl.default_grids(QWEN_PROCESSING))


def _model(
    config: dict[str, Any],
    text: TextModel,
    vision: VisionModel,
    image: ImageProcessing | GridProcessing,
    biased: frozenset[str],
    tower: torch.nn.Module,
) -> Model:
    decoder = RoutedDecoder(text, llama.dense(text), biased)
    tied = text.vocab_size * text.hidden_size if text.tie_word_embeddings else 0
    return Model(
        model_type=config["model_type"],
        text=text,
        vision=vision,
        image=image,
        tokens=Tokens(image_token="", image_token_id=0, bos_token="", eos_token="", eos_token_ids=()),
        num_parameters={
            "decoder": sum(tensor.numel() for tensor in decoder.state_dict().values()) - tied,
            "vision": sum(tensor.numel() for tensor in tower.state_dict().values()),
        },
    )


def plans() -> list[tuple[str, Model, str, Plan]]:
    """Model name, model, routing and plan of every row."""
    rows = []
    for name in CONFIGS:
        model = model_of(name)
        for routing in SCHEDULES[model.model_type]:
            schedule = resolve(RoutingSpec.parse(routing), model)
            rows.append((name, model, routing, plan_for(model, schedule, CAPACITY, dtype="float16")))
    return rows


def markdown(rows: list[tuple[str, Model, str, Plan]]) -> str:
    """The page docs/plans.md."""
    head = (__doc__ or "").split("\n\n")
    lines = [
        "# Plans of full-size models",
        "",
        "Made by `python benchmarks/plans.py > docs/plans.md` from public config values; no weights, nothing measured.",
        "",
        " ".join(head[2].split()),
        "",
        "| model | parameters | routing | visual tokens per layer | decoder prefill | vision tower | KV, prompt | "
        "KV, capacity | weights | peak | " + " | ".join(BOARDS) + " |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|" + "---|" * len(BOARDS),
    ]
    for name, model, routing, plan in rows:
        cells = (
            name,
            f"{sum(model.num_parameters.values()) / 1e9:.2f} B",
            f"`{routing}`",
            f"{plan.average_visual_tokens:.1f} of {plan.num_visual}",
            f"{format_flops(plan.decoder_flops)} ({plan.decoder_ratio:.3f})",
            format_flops(plan.vision_flops),
            f"{format_bytes(plan.kv_bytes)} ({plan.kv_ratio:.3f})",
            format_bytes(plan.cache_bytes),
            format_bytes(plan.weight_bytes),
            format_bytes(plan.peak_bytes),
            *("fits" if plan.peak_bytes <= USABLE * gigabytes * 2**30 else "no" for gigabytes in BOARDS.values()),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"A board fits a plan whose estimated peak is at most {USABLE:.0%} of its memory. Routing makes the prefill "
        "and the caches smaller, not the weights: only quantised weights would put a 7B model on 8 GB.",
        "",
        "## Images of other shapes",
        "",
        "Shares follow the visual tokens of a prompt, so that an image of any declared grid keeps the same share:",
        "",
        "| model | routing | grid | visual tokens | kept | visual tokens per layer | decoder of dense | vision tower |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for name, model, routing, _ in rows:
        if name == "Qwen2.5-VL-7B" and routing != "dense":
            small = with_grids(model, SHOWN_GRIDS)
            schedule = resolve(RoutingSpec.parse(routing), small)
            plan = plan_for(small, schedule, CAPACITY, dtype="float16")
            for one in plan.grids:
                kept = ", ".join(map(str, one.budgets))
                lines.append(
                    f"| {name} | `{routing}` | {one.grid[0]} x {one.grid[1]} | {one.num_visual} | {kept} | "
                    f"{one.average_visual_tokens:.1f} | {one.decoder_ratio:.3f} | {format_flops(one.vision_flops)} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the page, or the figures as JSON."""
    parser = argparse.ArgumentParser(description="Plans of full-size models from public configs.")
    parser.add_argument("--json", action="store_true", help="the figures instead of the page")
    rows = plans()
    if parser.parse_args().json:
        figures = [{"model": name, "routing": routing, "plan": plan.to_dict()} for name, _, routing, plan in rows]
        print(json.dumps(figures, indent=2))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
