"""Model descriptions that several test modules use."""

from __future__ import annotations

from reroute.manifest import ImageProcessing, Model, TextModel, Tokens, VisionModel

IMAGE = ImageProcessing(
    shortest_edge=336,
    crop_height=336,
    crop_width=336,
    resample=3,
    rescale_factor=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
TOKENS = Tokens(image_token="<image>", image_token_id=4, bos_token="<s>", eos_token="</s>", eos_token_ids=(2,))

LLAVA_7B_TEXT = TextModel(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
CLIP_L_336 = VisionModel(
    image_size=336,
    patch_size=14,
    grid=(24, 24),
    tokens_per_image=576,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    num_layers=23,
    depth=24,
)


def model_of(text: TextModel = LLAVA_7B_TEXT, vision: VisionModel = CLIP_L_336, **parameters: int) -> Model:
    """A model description around `text` and `vision`."""
    return Model(
        model_type="llava",
        text=text,
        vision=vision,
        image=IMAGE,
        tokens=TOKENS,
        num_parameters=parameters or {"decoder": 6_738_939_904, "vision": 303_507_456},
    )
