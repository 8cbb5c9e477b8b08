"""A random checkpoint in LLaVA's layout, of a named shape, for measurements that need a size and no training.

    python benchmarks/make_checkpoint.py llava-1.5-7b -o out/random7b              # 14.1 GB of bfloat16
    python benchmarks/make_checkpoint.py small24 -o out/small24 --dtype float32

Shards are written one tensor at a time, so memory is that of the largest tensor (0.5 GB of a 7B model's embedding in
fp32), whatever the model's size. The folder is a checkpoint like any other: `reroute export` and transformers'
`from_pretrained` load it. Its tokenizer knows bytes and one special token each for begin, end, padding and image; every
other id is a made-up word, so that any answer can be printed.

Matrices are normal with a standard deviation of 1 / sqrt(inputs), what is added to the residual stream of a decoder of
L layers 1 / sqrt(2 L) of that, and norms are near 1: activations keep their size in every layer and attention has likes
and dislikes. The same shape, dtype and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reroute.errors import RerouteError
from reroute.folders import check_output, whole_folder
from reroute.report import print_error

TEMPLATE = Path(__file__).resolve().parent.parent / "demo" / "model" / "chat_template.jinja"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK = 1 << 24  # numbers drawn at once


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder of the Llama family and of a CLIP tower."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    tower_heads: int
    image_size: int
    patch: int


SHAPES = {
    "llava-1.5-7b": Shape(
        layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32064, positions=4096,
        tower_layers=24, tower_hidden=1024, tower_intermediate=4096, tower_heads=16, image_size=336, patch=14,
    ),
    "small24": Shape(
        layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=32000, positions=4096,
        tower_layers=4, tower_hidden=128, tower_intermediate=256, tower_heads=4, image_size=336, patch=14,
    ),
}  # fmt: skip


def make_checkpoint(
    folder: Path, shape: Shape, *, dtype: str = "bfloat16", seed: int = 0, shard_bytes: int = 2 << 30
) -> None:
    """Write a random checkpoint into the empty folder `folder`.

    Args:
        folder: exists.
        shape: sizes of the model.
        dtype: of all weights: float32, float16 or bfloat16.
        seed: of the weights.
        shard_bytes: a shard is closed before it gets larger than this, unless one tensor is.
    """
    from transformers import LlavaForConditionalGeneration

    config = make_config(shape, dtype)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    width = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        length = math.prod(size) * width
        if shards[-1] and filled + length > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += length
    places: dict[str, str] = {}
    numbers = {name: number for number, name in enumerate(sizes)}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            stream.write(header({name: sizes[name] for name in names}, dtype))
            for name in names:
                rng = np.random.default_rng([seed, numbers[name]])
                for block in draw(rng, name, sizes[name], shape.layers):
                    stream.write(torch.from_numpy(block).to(getattr(torch, dtype)).view(torch.uint8).numpy().data)
    total = sum(math.prod(size) * width for size in sizes.values())
    save_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    save_processor(folder, shape)


def header(sizes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """The beginning of a safetensors file: length of a JSON header, then the header."""
    width = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in sizes.items():
        stop = start + math.prod(size) * width
        table[name] = {"dtype": DTYPES[dtype], "shape": list(size), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw(rng: np.random.Generator, name: str, size: tuple[int, ...], layers: int) -> Iterator[np.ndarray]:
    """The numbers of a tensor in blocks of float32, row-major."""
    mean, std = 0.0, 0.02
    if "norm" in name and name.endswith("weight"):
        mean, std = 1.0, 0.1
    elif "embed_tokens" in name or "position_embedding" in name or "class_embedding" in name:
        std = 0.5
    elif len(size) > 1:
        std = math.prod(size[1:]) ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            std *= (2 * layers) ** -0.5
    left = math.prod(size)
    while left:
        block = rng.standard_normal(min(left, _BLOCK), dtype=np.float32)
        block *= np.float32(std)
        block += np.float32(mean)
        yield block
        left -= len(block)


def make_config(shape: Shape, dtype: str) -> Any:
    """The transformers config."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=shape.tower_intermediate,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image_size,
        patch_size=shape.patch,
        projection_dim=shape.tower_hidden,
    )
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=(shape.image_size // shape.patch) ** 2,
        tie_word_embeddings=False,
    )
    config.dtype = getattr(torch, dtype)
    return config


def save_processor(folder: Path, shape: Shape) -> None:
    """Tokenizer, chat template, image processor and generation settings."""
    make_tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": shape.positions,
    }
    save_json(folder / "tokenizer_config.json", settings)
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)
    side = shape.image_size
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    image |= dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    save_json(folder / "preprocessor_config.json", image)
    save_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})


def make_tokenizer(vocab: int) -> Any:
    """Bytes, the special tokens in front, made-up words behind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"\u0120w{number}" for number in range(len(words), vocab)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def save_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON to read."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gib", type=float, default=2.0, metavar="N", help="largest shard (default 2)")
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    args = parser.parse_args()
    try:
        check_output(args.output, force=args.force, written=_written)
        with whole_folder(args.output, force=args.force, written=_written) as folder:
            make_checkpoint(
                folder, SHAPES[args.shape], dtype=args.dtype, seed=args.seed, shard_bytes=int(args.shard_gib * 2**30)
            )
    except RerouteError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
    print(f"wrote {args.output}", file=sys.stderr)


def _written(folder: Path) -> set[str]:
    """What a folder that this script wrote consists of; nothing where it did not."""
    names = {path.name for path in folder.iterdir()}
    return names if {"model.safetensors.index.json", "config.json"} <= names else set()


if __name__ == "__main__":
    main()
