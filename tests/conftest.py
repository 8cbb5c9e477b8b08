"""Checkpoints and bundles that the tests share. Everything is made here; nothing is downloaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_MODEL = REPOSITORY / "demo" / "model"
DEMO_ROUTING = "reroute-pdrop:avg=1/9"
TINY_ROUTING = "reroute@2,4:keep=7,4"
# Beside TINY_ROUTING, the default tier `7-4`: everything, more, and budgets that grow.
TINY_TIERS = ("dense", "wide=reroute@2,4:keep=20,9", "2/9=reroute@2,4:keep=3,12")


@dataclass(frozen=True, kw_only=True)
class TinyLlava:
    """Size of a random-weight LLaVA. The grid is (image_size / patch_size) squared: 36 visual tokens."""

    layers: int = 6
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    image_size: int = 48
    patch_size: int = 8
    vision_layers: int = 3
    tied: bool = False
    attention_bias: bool = False
    text: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    feature_layer: int | tuple[int, ...] = -2
    strategy: Literal["default", "full"] = "default"
    seed: int = 0
    max_shard_size: str = "5GB"


def make_llava(folder: Path, size: TinyLlava | None = None) -> Path:
    """Write a random LLaVA checkpoint in the real format, with the demo model's tokenizer and chat template."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )
    from transformers import LlavaForConditionalGeneration as Llava

    size = size or TinyLlava()
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    own = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 24}}
    text = kinds[size.text](
        **own[size.text],
        vocab_size=176,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        attention_bias=size.attention_bias,
        tie_word_embeddings=size.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=2,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    layer = size.feature_layer
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=layer if isinstance(layer, int) else list(layer),
        vision_feature_select_strategy=size.strategy,
        image_seq_length=(size.image_size // size.patch_size) ** 2,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(size.seed)
    model = Llava(config).eval()
    # The default initialisation is so small that all rows score alike: spread the weights, or nothing is tested.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    model.save_pretrained(folder, max_shard_size=size.max_shard_size)
    edge = size.image_size
    CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA: 6 layers, grouped-query attention, 36 visual tokens. Do not change it."""
    return make_llava(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `tiny_checkpoint` with `TINY_ROUTING`. Do not change it."""
    from reroute.export import export_checkpoint

    output = tmp_path_factory.mktemp("tiny-export") / "export"
    export_checkpoint(tiny_checkpoint, output, routing=TINY_ROUTING)
    return output


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine bundle of `tiny_export`. Do not change it."""
    from reroute.engines import build

    output = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
    build(tiny_export, output)
    return output


@pytest.fixture(scope="session")
def tiny_dense_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense engine of `tiny_checkpoint`, unchecked. Do not change it."""
    from reroute.engines import build
    from reroute.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tiny-dense")
    export_checkpoint(tiny_checkpoint, folder / "export", routing="dense")
    build(folder / "export", folder / "bundle", check=False)
    return folder / "bundle"


@pytest.fixture(scope="session")
def tiered_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `tiny_checkpoint` with `TINY_ROUTING` and `TINY_TIERS`. Do not change it."""
    from reroute.export import export_checkpoint

    output = tmp_path_factory.mktemp("tiered-export") / "export"
    export_checkpoint(tiny_checkpoint, output, routing=TINY_ROUTING, tiers=TINY_TIERS)
    return output


@pytest.fixture(scope="session")
def tiered_bundle(tiered_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine bundle of `tiered_export`. Do not change it."""
    from reroute.engines import build

    output = tmp_path_factory.mktemp("tiered-bundle") / "bundle"
    build(tiered_export, output)
    return output


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The committed demo model. Do not change it."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model exported with a reroute schedule at 1/9 of its visual tokens. Do not change it."""
    from reroute.export import export_checkpoint

    folder = tmp_path_factory.mktemp("demo-export") / "export"
    export_checkpoint(DEMO_MODEL, folder, routing=DEMO_ROUTING)
    return folder


@pytest.fixture(scope="session")
def demo_bundle(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_export` built and checked. Do not change it."""
    from reroute.engines import build

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    build(demo_export, folder)
    return folder
