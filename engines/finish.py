"""What a TensorRT graph gets besides a dialect: fixed sizes, and the next token chosen on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
from onnx import helper

from reroute.manifest import Manifest, Part, Tensor

NEXT_TOKEN = Tensor(name="next_token", dtype="int64", shape=("B",))
NEXT_LOGPROB = Tensor(name="next_logprob", dtype="float32", shape=("B",))


def fixed_sizes(manifest: Manifest) -> dict[str, int]:
    """Dimensions that a TensorRT engine has fixed: batch 1 and the cache capacity of each stage."""
    return {"B": 1, **{f"C{stage}": rows for stage, rows in enumerate(manifest.cache_rows)}}


def freeze(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Replace named dimensions of the inputs and outputs by numbers, in place."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]  # they name the old dimensions


def choose_next_token(model: onnx.ModelProto) -> None:
    """Add the outputs `next_token` int64 [B] and `next_logprob` float32 [B] of `logits` [B, V], in place.

    The token is the likeliest one, the lowest id of equals; its log probability is max - log sum exp, so that greedy
    decoding never brings the logits to the host.
    """
    last = helper.make_tensor("next_token.axis", onnx.TensorProto.INT64, [1], [-1])
    model.graph.initializer.append(last)

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], **attributes)

    nodes = [
        node("ArgMax", ["logits"], "next_token", axis=-1, keepdims=0),
        node("ReduceMax", ["logits", last.name], "next_token.best", keepdims=1),
        node("Sub", ["logits", "next_token.best"], "next_token.below"),
        node("Exp", ["next_token.below"], "next_token.odds"),
        node("ReduceSum", ["next_token.odds", last.name], "next_token.total", keepdims=0),
        node("Log", ["next_token.total"], "next_token.log"),
        node("Neg", ["next_token.log"], "next_logprob"),
    ]
    model.graph.node.extend(nodes)
    batch = next(value for value in model.graph.output if value.name == "logits").type.tensor_type.shape.dim[0]
    size = batch.dim_value or batch.dim_param
    for tensor, kind in ((NEXT_TOKEN, onnx.TensorProto.INT64), (NEXT_LOGPROB, onnx.TensorProto.FLOAT)):
        model.graph.output.append(helper.make_tensor_value_info(tensor.name, kind, [size]))


def engine_part(name: str, part: Part, sizes: Mapping[str, int], *, half: bool) -> Part:
    """The I/O table of a part after `freeze`, `choose_next_token` (decoder) and the conversion to fp16."""

    def lowered(tensor: Tensor) -> Tensor:
        narrow = half and tensor.name.startswith(("visual_embeds", "past_key_values", "present"))
        shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in tensor.shape)
        return replace(tensor, dtype="float16" if narrow else tensor.dtype, shape=shape)

    def table(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(lowered(tensor) for tensor in tensors)

    extra = (NEXT_TOKEN, NEXT_LOGPROB) if name == "decoder" else ()
    return replace(part, inputs=table(part.inputs), outputs=table((*part.outputs, *extra)))
