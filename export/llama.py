"""The text models of the Llama family, from a checkpoint's config and tensors: what all model families share.

Llama, Qwen2 and Qwen3 differ in what has a bias and in the norm of queries and keys, both of which
`reroute.export.decoder` has. Tensor names are canonical (`reroute.export.checkpoint.canonical_name`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from tokenizers import Tokenizer

from reroute.errors import UserError
from reroute.export.checkpoint import Checkpoint, read_json
from reroute.export.decoder import RoutedDecoder
from reroute.export.weights import Weight, streamed
from reroute.manifest import MRope, TextModel, Tokens
from reroute.schedule import Schedule, Stage

# Our parameter -> the checkpoint's tensor, for one decoder layer. Linear weights are stored transposed, [in, out].
_LAYER_NAMES = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


# transformers' names of the text models that the decoder is.
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def biases(text: Any) -> frozenset[str]:
    """The projections with a bias, of a transformers config whose model type is one of `TEXT_MODELS`."""
    if text.model_type == "qwen2":
        return ATTENTION - {"o_proj"}
    attention = ATTENTION if getattr(text, "attention_bias", False) else frozenset()
    return attention | (MLP if getattr(text, "mlp_bias", False) else frozenset())


def window_of(text: Any) -> int | None:
    """Tokens that a row attends to, where that is fewer than all."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return window if window is not None and window < text.max_position_embeddings else None


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise UserError for weights that need scales to be read."""
    if quantization := checkpoint.config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"the weights are quantized ({method})", hint="supported: checkpoints of float32, float16 or bfloat16"
        )


def ties(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether lm_head is the embedding. As in transformers, an lm_head of its own in the weights is the last word."""
    wanted = config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False)
    return bool(wanted) and "lm_head.weight" not in checkpoint.entries


def text_model(
    checkpoint: Checkpoint, config: Any, *, mrope: MRope | None = None, qk_norm: bool = False, deepstack: int = 0
) -> TextModel:
    """Shape of the decoder of a transformers config with a `text_config`."""
    text = config.text_config
    return TextModel(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=ties(checkpoint, config),
        mrope=mrope,
        qk_norm=qk_norm,
        deepstack=deepstack,
    )


def require(checkpoint: Checkpoint, text: TextModel, biased: Collection[str]) -> None:
    """Check names, shapes and dtypes of all decoder tensors. Raises UserError."""
    with torch.device("meta"):
        decoder = RoutedDecoder(text, dense(text), biased)
    for name, tensor in decoder.state_dict().items():
        source = decoder_source(name, tied=text.tie_word_embeddings)
        checkpoint.require(source, tuple(reversed(tensor.shape)) if is_linear(name) else tuple(tensor.shape))


def dense(text: TextModel) -> Schedule:
    """A schedule without decisions."""
    return Schedule(action="dense", stages=(Stage(start=0, stop=text.num_layers, keep=None),))


def count_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the decoder."""
    return checkpoint.count("language_model.") + checkpoint.count("lm_head.")


def is_linear(name: str) -> bool:
    """Whether a parameter of `RoutedDecoder` is a matrix that is stored transposed, [in, out]."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def decoder_source(name: str, *, tied: bool) -> str:
    """Canonical checkpoint name of a parameter of `RoutedDecoder`."""
    if name == "embed.weight" or (tied and name == "lm_head.weight"):
        return "language_model.embed_tokens.weight"
    if not name.startswith("layers."):
        return name if name.startswith("lm_head") else f"language_model.{name}"
    _, layer, part, leaf = name.split(".")
    return f"language_model.layers.{layer}.{_LAYER_NAMES[part]}.{leaf}"


def build_decoder(
    checkpoint: Checkpoint, text: TextModel, schedule: Schedule, biased: Collection[str]
) -> RoutedDecoder:
    """The routed decoder, matrices transposed to [in, out]; weights are read when they are used."""
    with torch.device("meta"):
        decoder = RoutedDecoder(text, schedule, biased)
    weights = {
        name: Weight(
            checkpoint=checkpoint,
            name=decoder_source(name, tied=text.tie_word_embeddings),
            transposed=is_linear(name),
        )
        for name, _ in decoder.named_parameters()
    }
    return streamed(decoder, weights)


def tokens(checkpoint: Checkpoint, config: Any) -> Tokens:
    """Special tokens from config, generation config and tokenizer files. Raises UserError."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{checkpoint.folder} holds no tokenizer.json",
            hint="write it once: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise UserError(f"cannot read tokenizer.json: {error}", hint="the file is damaged: copy it again") from error
    image_token = tokenizer.id_to_token(config.image_token_id)
    if image_token is None:
        raise UserError(
            f"the tokenizer has no token {config.image_token_id}, config.json's image token",
            hint="tokenizer.json and config.json do not match",
        )
    settings = read_json(checkpoint.folder, "tokenizer_config.json")
    generation = read_json(checkpoint.folder, "generation_config.json")
    eos: Any = generation.get("eos_token_id", getattr(config.text_config, "eos_token_id", None))
    if eos is None:
        raise UserError(
            "neither generation_config.json nor config.json names an end token",
            hint="set eos_token_id: without it no answer would end",
        )
    eos_ids = tuple(eos) if isinstance(eos, list) else (int(eos),)
    return Tokens(
        image_token=image_token,
        image_token_id=config.image_token_id,
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
        eos_token_ids=eos_ids,
    )


def _token_text(value: Any) -> str:
    """Tokenizer configs hold a token as a string, as {"content": ...}, or not at all."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def three(data: dict[str, Any], key: str) -> tuple[float, float, float]:
    """Three numbers of an image processor, one for each colour. Raises ValueError, TypeError or KeyError."""
    values = data[key]
    if len(values) != 3:
        raise ValueError(f"{key} is {values}, not three numbers")
    return float(values[0]), float(values[1]), float(values[2])
