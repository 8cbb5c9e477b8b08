"""The demo model's configuration, construction and files: a real ``LlavaForConditionalGeneration``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

try:  # without torchvision the PIL backend is the one there is; where both exist, PIL is what training mirrors
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

from .tokenizer import BOS, EOS, IMAGE, NUMBER_0, PAD, VOCAB_SIZE, build_fast_tokenizer

IMAGE_SIZE, PATCH = 192, 8
GRID = IMAGE_SIZE // PATCH
VISUAL_TOKENS = GRID * GRID
HIDDEN = 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# LLaVA-1.5's layout. A message's content is a plain string or a list of parts; the image goes before the text.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}{%- else -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{- ' ' -}}{%- else -%}{{- '</s>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def build_config(layers: int = 24, tower_layers: int = 4) -> LlavaConfig:
    """Configuration with ``layers`` decoder layers; the tower has one more layer than is used (LLaVA reads -2)."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=tower_layers + 1,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def number_features(dim: int = HIDDEN) -> torch.Tensor:
    """Smooth code of 0..99: [100, dim] of sines and cosines, so that neighbouring numbers start out alike."""
    value = torch.arange(100, dtype=torch.float32)[:, None] / 100
    freq = torch.exp(torch.linspace(0, 3.2, dim // 2))[None]
    return torch.cat([torch.sin(value * freq * 3.1416), torch.cos(value * freq * 3.1416)], 1)


def build_model(layers: int = 24, tower_layers: int = 4, seed: int = 0) -> LlavaForConditionalGeneration:
    """Freshly initialised model in fp32; number rows of both embeddings hold a smooth code of their value."""
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(build_config(layers, tower_layers))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "language_model.layers" in name:
                scale = 1.0 / (2 * layers) ** 0.5 if ("o_proj" in name or "down_proj" in name) else 1.0
                p.normal_(0, scale / p.shape[1] ** 0.5)
            elif p.ndim == 2 and "vision_tower" in name and "embedding" not in name:
                scale = 0.35 if ("out_proj" in name or "fc2" in name) else 1.0
                p.normal_(0, scale / p.shape[1] ** 0.5)
            elif p.ndim == 2 and "multi_modal_projector" in name:
                p.normal_(0, 1.0 / p.shape[1] ** 0.5)
            elif "position_embedding" in name:
                p.copy_(grid_features())
            elif "patch_embedding" in name:
                p.normal_(0, 1.0 / (3 * PATCH * PATCH) ** 0.5)
        embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for weight, scale in ((embed, 0.5), (head, 0.1)):
            weight.normal_(0, scale)
            code = number_features() * 2**0.5
            weight[NUMBER_0 : NUMBER_0 + 100] = scale * (0.95 * code + 0.3 * torch.randn_like(code))
    return model


def grid_features() -> torch.Tensor:
    """Start of the tower's position table, [1 + GRID * GRID, HIDDEN]: sines and cosines of row and column."""
    place = (torch.arange(GRID, dtype=torch.float32)[:, None] + 0.5) / GRID
    freq = torch.exp(torch.linspace(0, 3.2, HIDDEN // 4))[None]
    one = torch.cat([torch.sin(place * freq * 3.1416), torch.cos(place * freq * 3.1416)], 1)
    rows = one[:, None].expand(GRID, GRID, -1)
    cols = one[None].expand(GRID, GRID, -1)
    table = torch.cat([rows, cols], -1).reshape(VISUAL_TOKENS, HIDDEN)
    return 0.5 * torch.cat([torch.zeros(1, HIDDEN), table])


def build_processor() -> LlavaProcessor:
    """CLIP image processor at 192 x 192 (576 patches; the additional token is CLS, which LLaVA drops) and tokenizer."""
    images = ImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_fast_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in fp16 with everything ``AutoProcessor`` and ``AutoModelForImageTextToText`` load."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict({k: v.detach().to("cpu", torch.float16) for k, v in model.state_dict().items()})
    half.config.dtype = torch.float16
    half.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=8
    )
    half.save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    # transformers 5 keeps the image processor inside processor_config.json; older readers look for its own file.
    image = processor.image_processor.to_dict()
    image.pop("processor_class", None)
    image["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2, sort_keys=True) + "\n")
