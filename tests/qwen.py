"""Random Qwen-VL checkpoints in the real format, written with transformers; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

Kind = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
KINDS: tuple[Kind, ...] = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
IMAGE_TOKEN = SPECIAL.index("<|image_pad|>")
VOCAB = 300
CELL = 8  # pixels a side of a visual token: patches of 4, merged two by two
GRIDS = ((4, 6), (5, 3), (3, 3))
LAYERS = 6

# The template of the public Qwen2-VL and Qwen2.5-VL checkpoints, without video.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Byte-level, with Qwen's special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["You are a helpful assistant.", "system user assistant", "where is the red cat? what colour is it?"]
    tokenizer.train_from_iterator(words * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def make_config(kind: Kind, *, tied: bool = False, layers: int = LAYERS, full: tuple[int, ...] = (1,)) -> Any:
    """A small config with odd numbers: grouped queries, a window of 2 x 2 tokens, two deepstack layers.

    `full` are the layers of Qwen2.5-VL's tower without windows; those of the public checkpoints end with the last.
    """
    import transformers

    text: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": SPECIAL.index("<|endoftext|>"),
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": None,
        "tie_word_embeddings": tied,
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": CELL // 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    classes = {
        "qwen2_vl": transformers.Qwen2VLConfig,
        "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
        "qwen3_vl": transformers.Qwen3VLConfig,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif kind == "qwen2_5_vl":
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 44,
            "out_hidden_size": 64,
            "window_size": 2 * CELL,
            "fullatt_block_indexes": list(full),
        }
    else:
        text |= {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                 "mrope_section": [6, 3, 3], "mrope_interleaved": True}}  # fmt: skip
        del text["rope_scaling"], text["rope_theta"]
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 44,
            "out_hidden_size": 64,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 1],
        }
    return classes[kind](
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def model_class(kind: Kind) -> Any:
    """transformers' own model."""
    import transformers

    return {
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    }[kind]


def make_qwen(
    folder: Path,
    kind: Kind = "qwen2_5_vl",
    *,
    tied: bool = False,
    seed: int = 0,
    layers: int = LAYERS,
    full: tuple[int, ...] = (1,),
) -> Path:
    """Write a random checkpoint: config, weights, tokenizer, chat template, image processor."""
    import torch
    from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil  # noqa: F401

    torch.manual_seed(seed)
    model = model_class(kind)(make_config(kind, tied=tied, layers=layers, full=full)).eval()
    # The default initialisation is so small that all rows score alike: spread the weights, or nothing is tested.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=CELL // 2, merge_size=2, min_pixels=4 * CELL**2, max_pixels=40 * CELL**2
    ).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": "<|im_end|>", '
        '"pad_token": "<|endoftext|>"}'
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
