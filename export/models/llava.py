"""LLaVA-1.5 (arXiv 2310.03744): CLIP tower, two-layer projector, a text model of the Llama family (MHA or GQA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from reroute.errors import UserError, nearest
from reroute.export import llama, nuwa
from reroute.export.checkpoint import Checkpoint, read_json
from reroute.export.decoder import RoutedDecoder
from reroute.export.weights import Weight, streamed
from reroute.manifest import ImageProcessing, Model, VisionModel
from reroute.schedule import Schedule


def parse_config(checkpoint: Checkpoint) -> Any:
    """A `LlavaConfig` with transformers' defaults filled in. Raises UserError for what we do not support, by name.

    Typed as Any: transformers declares the configs inside as `dict | PreTrainedConfig | None`.
    """
    try:
        config: Any = LlavaConfig.from_dict(checkpoint.config)
    except Exception as error:  # transformers raises many types for a bad config; all are the user's to mend
        raise UserError(f"config.json is not a valid LLaVA config: {error}", hint="copy config.json again") from error
    llama.refuse_quantized(checkpoint)
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters or {})
    if text.model_type not in llama.TEXT_MODELS:
        raise UserError(
            f"the text model {text.model_type!r} is not supported in a LLaVA model",
            hint=f"supported: {', '.join(llama.TEXT_MODELS)}",
        )
    for what, value, supported in (
        ("sliding window", llama.window_of(text), None),
        ("text activation", text.hidden_act, "silu"),
        ("vision tower", vision.model_type, "clip_vision_model"),
        ("rotary type", rope.get("rope_type", "default"), "default"),
        ("partial rotary factor", float(rope.get("partial_rotary_factor") or 1.0), 1.0),
    ):
        if value != supported:
            raise UserError(f"the {what} {value!r} is not supported in a LLaVA model", hint=f"supported: {supported}")
    for what, activation in (
        ("vision activation", vision.hidden_act),
        ("projector activation", config.projector_hidden_act),
    ):
        if activation not in ACT2FN:
            raise UserError(f"the {what} {activation!r} is unknown", hint=nearest(str(activation), ACT2FN))
    strategy = config.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy {strategy!r} is unknown", hint="supported: default, full")
    return config


def read(checkpoint: Checkpoint) -> Model:
    """Check config, tensors' names and shapes, tokenizer and processor, and describe the model."""
    config = parse_config(checkpoint)
    qk_norm = config.text_config.model_type == "qwen3"
    text, vision = llama.text_model(checkpoint, config, qk_norm=qk_norm), vision_model(config)
    image = image_processing(checkpoint)
    if (image.crop_height, image.crop_width) != (vision.image_size, vision.image_size):
        raise UserError(
            f"the image processor crops to {image.crop_height} x {image.crop_width}, the vision tower takes "
            f"{vision.image_size} x {vision.image_size}",
            hint="preprocessor_config.json and config.json do not match",
        )
    llama.require(checkpoint, text, llama.biases(config.text_config))
    with torch.device("meta"):
        tower = VisionTower(config)
    for name, tensor in tower.state_dict().items():
        checkpoint.require(name, tuple(tensor.shape))
    vision_parameters = sum(tensor.numel() for tensor in tower.state_dict().values())
    return Model(
        model_type="llava",
        text=text,
        vision=vision,
        image=image,
        tokens=llama.tokens(checkpoint, config),
        num_parameters={
            "decoder": llama.count_parameters(checkpoint),
            "vision": vision_parameters,
        },
    )


def build_decoder(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> RoutedDecoder:
    """The routed decoder with its weights."""
    biased = llama.biases(parse_config(checkpoint).text_config)
    return llama.build_decoder(checkpoint, model.text, schedule, biased)


def vision_model(config: Any) -> VisionModel:
    """Grid and size of the tower; only the layers up to the last feature layer are counted, because only they run."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    extra = 1 if config.vision_feature_select_strategy == "full" else 0
    return VisionModel(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        grid=(side, side),
        tokens_per_image=side * side + extra,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_attention_heads,
        num_layers=max(feature_layers(config)),
        depth=vision.num_hidden_layers,
    )


def feature_layers(config: Any) -> list[int]:
    """Indices into the tower's hidden states (0 = embeddings), as non-negative numbers."""
    chosen = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers + 1
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    if any(not -count <= layer < count for layer in layers):
        raise UserError(
            f"vision_feature_layer {chosen} does not exist in a tower of {count - 1} layers",
            hint="see config.json",
        )
    return [layer % count for layer in layers]


def image_processing(checkpoint: Checkpoint) -> ImageProcessing:
    """Constants of the CLIP image processor. Raises UserError for steps that the runtime does not have."""
    data = read_json(checkpoint.folder, "preprocessor_config.json")
    data = data or read_json(checkpoint.folder, "processor_config.json").get("image_processor", {})
    if not data:
        raise UserError(f"{checkpoint.folder} holds no preprocessor_config.json", hint="copy the processor files too")
    kind = str(data.get("image_processor_type", "CLIPImageProcessor"))
    if not kind.startswith("CLIPImageProcessor"):
        raise UserError(f"the image processor {kind!r} is not supported", hint="supported: CLIPImageProcessor")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    off = [step for step in steps if not data.get(step, True)]
    if off or data.get("do_pad"):
        what = ", ".join(f"{step}=false" for step in off) or "do_pad=true"
        raise UserError(f"the image processor has {what}", hint="supported: resize, centre crop, rescale, normalise")
    try:
        return _clip_constants(data)
    except (TypeError, ValueError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"the image processor's settings are not valid: {what}",
            hint="copy preprocessor_config.json again",
        ) from error


def _clip_constants(data: dict[str, Any]) -> ImageProcessing:
    """The constants of a checked image processor; ValueError, TypeError or KeyError where one is not a number."""
    size, crop = data.get("size", 224), data.get("crop_size", 224)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    if edge is None:
        raise UserError(f"the image processor resizes to {size}", hint="supported: shortest_edge")
    height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    mean, std = llama.three(data, "image_mean"), llama.three(data, "image_std")
    return ImageProcessing(
        shortest_edge=int(edge),
        crop_height=int(height),
        crop_width=int(width),
        resample=int(data.get("resample", 3)),
        rescale_factor=float(data.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
    )


class VisionTower(nn.Module):
    """The checkpoint's own CLIP tower up to the last feature layer, and its projector."""

    outputs: tuple[str, ...] = ("visual_embeds",)

    def __init__(self, config: Any, depth: int | None = None) -> None:
        super().__init__()
        self.features = feature_layers(config)
        self.drop_cls = config.vision_feature_select_strategy == "default"
        settings = config.vision_config.to_dict() | {"num_hidden_layers": depth or max(self.features)}
        clip = CLIPVisionConfig.from_dict(settings)
        clip._attn_implementation = "sdpa"
        self.vision_tower = CLIPVisionModel(clip)
        # Only the pooled output uses this norm, and nobody asks for it.
        self.vision_tower.post_layernorm = nn.Identity()  # type: ignore[assignment]
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    def states(self, pixel_values: Tensor) -> list[Tensor]:
        """Hidden states [M, 1 + P, C] of the embeddings and of every layer, the class token first."""
        states = [self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixel_values))]
        for layer in self.vision_tower.encoder.layers:
            output = layer(states[-1], attention_mask=None)
            states.append(output[0] if isinstance(output, tuple) else output)
        return states

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, H, W] float to [M, N, D] float."""
        states = self.states(pixel_values)
        chosen = [states[index][:, 1:] if self.drop_cls else states[index] for index in self.features]
        return self.multi_modal_projector(torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0])


class NuwaTower(VisionTower):
    """The whole tower with Nüwa's first stage before the projector, see `reroute.export.nuwa`."""

    outputs = ("visual_embeds", "visual_places")

    def __init__(self, config: Any, keep: int) -> None:
        super().__init__(config, depth=config.vision_config.num_hidden_layers)
        if len(self.features) != 1 or self.features[0] < 1 or not self.drop_cls:
            raise UserError(
                f"Nüwa cannot prune this tower: its features are those of layers {self.features}, class token "
                f"{'left out' if self.drop_cls else 'included'}",
                hint="supported: one vision_feature_layer behind the first, vision_feature_select_strategy default",
            )
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.keep, self.grid = keep, (side, side)
        self.near: Tensor
        with torch.device("cpu"):  # a constant, also where the parameters have no data
            self.register_buffer("near", nuwa.closeness(self.grid), persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[M, 3, H, W] float to visual tokens [M, K, D] float and their places on the grid, int64 [M, K]."""
        states = self.states(pixel_values)
        feature = self.features[0]
        salience = self.class_attention(states[feature - 1], feature - 1)
        late = states[nuwa.first_similar_state(len(states) - 1) :]
        similar = torch.stack([state[:, 1:] for state in late]).mean(0)
        kept = nuwa.select(salience, self.grid, self.keep)
        tokens = nuwa.collect(states[feature][:, 1:], similar, salience, kept, self.near)
        return self.multi_modal_projector(tokens), kept

    def class_attention(self, state: Tensor, index: int) -> Tensor:
        """Attention of the class token on each patch in tower layer `index`, summed over heads: [M, P]."""
        layer: Any = self.vision_tower.encoder.layers[index]
        heads = layer.self_attn.num_heads
        x = layer.layer_norm1(state)
        query = layer.self_attn.q_proj(x[:, :1]).unflatten(-1, (heads, -1))[:, 0]
        keys = layer.self_attn.k_proj(x).unflatten(-1, (heads, -1))
        logits = torch.einsum("mhd,mphd->mhp", query, keys) * layer.self_attn.scale
        return logits.softmax(-1).sum(1)[:, 1:]


def build_vision(checkpoint: Checkpoint, model: Model, schedule: Schedule) -> nn.Module:
    """The tower, with Nüwa's first stage where the schedule has it; weights are read when they are used."""
    config = parse_config(checkpoint)
    with torch.device("meta"):
        tower = VisionTower(config) if schedule.nuwa is None else NuwaTower(config, schedule.nuwa)
    embeddings: Any = tower.vision_tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    names = (name for name, _ in tower.named_parameters())
    return streamed(tower, {name: Weight(checkpoint=checkpoint, name=name) for name in names})
