"""The supported model families: a file each, one entry here, and what the Qwen-VL models share in `qwen_vl`.

A family says how to read a config and how to build the modules that are traced; it never appears by name in the
decoder, the engines or the runtime. `docs/adding-a-model.md` goes through the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from reroute.errors import UserError, nearest
from reroute.export.checkpoint import Checkpoint
from reroute.export.decoder import RoutedDecoder
from reroute.export.models import llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from reroute.manifest import Model
from reroute.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model family provides.

    Attributes:
        read: checks a checkpoint against its config and describes it. Raises UserError.
        build_decoder: the routed decoder, its weights streamed (see `reroute.export.weights`).
        build_vision: pixel values [M, 3, H, W], of any grid of the model, to visual embeddings [M, N, D]; streamed
            too. Its attribute `outputs` names what it returns: visual_embeds, and where the schedule prunes in the
            tower visual_places, int64 [M, N], the places on the grid of those left; for a model with deepstack
            visual_deepstack, float [E, M, N, D].
        names: how to call the family in messages.
    """

    read: Callable[[Checkpoint], Model]
    build_decoder: Callable[[Checkpoint, Model, Schedule], RoutedDecoder]
    build_vision: Callable[[Checkpoint, Model, Schedule], nn.Module]
    names: str = field(default="")


FAMILIES: dict[str, Family] = {
    "llava": Family(
        read=llava.read,
        build_decoder=llava.build_decoder,
        build_vision=llava.build_vision,
        names="LLaVA-1.5 with a Llama text model and a CLIP tower",
    ),
    "qwen2_vl": Family(
        read=qwen2_vl.read,
        build_decoder=qwen2_vl.build_decoder,
        build_vision=qwen2_vl.build_vision,
        names="Qwen2-VL",
    ),
    "qwen2_5_vl": Family(
        read=qwen2_5_vl.read,
        build_decoder=qwen2_5_vl.build_decoder,
        build_vision=qwen2_5_vl.build_vision,
        names="Qwen2.5-VL",
    ),
    "qwen3_vl": Family(
        read=qwen3_vl.read,
        build_decoder=qwen3_vl.build_decoder,
        build_vision=qwen3_vl.build_vision,
        names="Qwen3-VL",
    ),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """Look the model type up. Raises UserError that lists the supported ones."""
    model_type = checkpoint.config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        supported = "; ".join(value.names for value in FAMILIES.values())
        hint = f"{nearest(str(model_type), FAMILIES)} ({supported})"
        raise UserError(f"model type {model_type!r} is not supported", hint=hint)
    return family
