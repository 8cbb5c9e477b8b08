"""Losses: soft-target answers, and the auxiliary reading of the projected visual tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from .model import HIDDEN
from .questions import KINDS
from .scenes import COLOUR_NAMES, SHAPES
from .tokenizer import NUMBER_0, VOCAB_SIZE, encode_words

BACKGROUND_WORD = 7  # a reserved word whose embedding stands for "no object here"
CENTRE_WORD = 8  # and one for "the centre of an object is here"
SIGMA = 1.0


def soft_numbers() -> Tensor:
    """[100, 100] rows of Gaussian targets around each number: a near miss is nearly right."""
    n = torch.arange(100).float()
    return torch.softmax(-((n[:, None] - n[None]) ** 2) / (2 * SIGMA**2), -1)


class Auxiliary(nn.Module):
    """Box readers used in training only: four linear maps from a projected token to number codes."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.centre_bias = nn.Parameter(torch.tensor(-2.0))
        self.soft: Tensor
        self.colour_ids: Tensor
        self.shape_ids: Tensor
        self.register_buffer("soft", soft_numbers(), persistent=False)
        colour = [encode_words(c)[0] for c in COLOUR_NAMES]
        shape = [encode_words(s)[0] for s in SHAPES]
        self.register_buffer("colour_ids", torch.tensor([*colour, BACKGROUND_WORD]), persistent=False)
        self.register_buffer("shape_ids", torch.tensor([*shape, BACKGROUND_WORD]), persistent=False)

    def forward(
        self, visual: Tensor, batch: dict[str, Tensor], embed: Tensor, head: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of [B, 576, D] visual tokens against the words and the box of the object each of them shows.

        ``embed`` and ``head`` are the two embedding tables [V, D]: colour and shape align with input words, the
        box with output numbers, so what the decoder has to move is already in the form that it has to write.
        """
        flat = visual.float().flatten(0, 1)
        on = batch["shape"].flatten() < len(SHAPES)
        words = 0.0
        report: dict[str, Tensor] = {}
        weight = torch.where(on, 1.0, 0.3)
        for name, ids in (("colour", self.colour_ids), ("shape", self.shape_ids)):
            logits = 0.25 * flat @ embed[ids].float().T
            target = batch[name].flatten()
            loss = fn.cross_entropy(logits, target, reduction="none")
            words = words + (loss * weight).sum() / weight.sum()
            report[f"aux_{name}"] = ((logits.argmax(-1) == target) & on).sum() / on.sum()
        codes = self.maps(visual).float().view(-1, 4, HIDDEN)
        logits = codes @ head[NUMBER_0 : NUMBER_0 + 100].float().T
        box = batch["box"].flatten(0, 1)
        soft = -(self.soft[box] * fn.log_softmax(logits, -1)).sum(-1).mean(-1)
        boxes = (soft * on).sum() / on.sum()
        error = (logits.detach().argmax(-1) - box).abs().float().mean(-1)
        report["aux_box_error"] = (error * on).sum() / on.sum()
        # One patch per object stands for it, so that objects can be counted and not only areas.
        middle = 0.25 * flat @ embed[CENTRE_WORD].float() + self.centre_bias
        centre = batch["centre"].flatten().float()
        middles = fn.binary_cross_entropy_with_logits(middle, centre, pos_weight=middle.new_tensor(10.0))
        report["aux_centre"] = ((middle > 0) & (centre > 0)).sum() / ((middle > 0) | (centre > 0)).sum()
        return words + boxes + 2 * middles, report


def answer_loss(logits: Tensor, targets: Tensor, kinds: Tensor, soft: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy over the answer rows of [B, Q, T, V] logits; coordinates have soft targets.

    Rows whose kind is -1 are prompts or padding. One-word answers weigh twice: they have one telling token, a box
    has four. A box's first coordinate weighs three times: only that row must find the object from the question, the
    later ones can know it from the coordinates before them.
    """
    before = fn.pad(kinds, (1, 0), value=-1)[..., :-1]
    first = ((kinds == KINDS.index("where")) & (before < 0)).flatten()
    logits, targets, kinds = logits.float().flatten(0, 2), targets.flatten(), kinds.flatten()
    logp = fn.log_softmax(logits, -1)
    hard = -logp.gather(1, targets[:, None])[:, 0]
    number = (targets >= NUMBER_0) & (targets < NUMBER_0 + 100)
    coordinate = number & (kinds == KINDS.index("where"))
    value = torch.where(number, targets - NUMBER_0, 0)
    blurred = -(soft[value] * logp[:, NUMBER_0 : NUMBER_0 + 100]).sum(-1)
    loss = torch.where(coordinate, blurred, hard)
    asked = kinds >= 0
    one_word = asked & (kinds != KINDS.index("where"))
    weight = asked.float() + one_word.float() + 2 * first.float()
    guess = logits.argmax(-1)
    report = {"ok_first": (((guess - targets).abs() <= 2) & first).sum() / first.sum().clamp(min=1)}
    for i, name in enumerate(KINDS):
        rows = (kinds == i) & (targets >= NUMBER_0)
        right = (guess - targets).abs() <= (2 if name == "where" else 0)
        report[f"ok_{name}"] = (right & rows).sum() / rows.sum().clamp(min=1)
    assert logits.shape[-1] == VOCAB_SIZE
    return (loss * weight).sum() / weight.sum(), report


def guidance(mass: Tensor, own: Tensor, first: Tensor, enough: float = 0.4) -> tuple[Tensor, Tensor]:
    """Loss of answer rows that look at their object with less than ``enough`` of their attention, and the mean mass.

    ``mass`` [B, rows] is the attention on the tokens ``own`` [B, rows, K] of the object; rows without one are
    left out. It opens the way from question to object; once that is found the loss is zero. The mean is over the
    rows ``first`` [B, rows] that write a first answer word.
    """
    asked = own.any(-1)
    short = torch.relu(math.log(enough) - torch.log(mass + 1e-4))
    first = asked & first
    total, firsts = asked.sum().clamp(min=1), first.sum().clamp(min=1)
    return (short * asked).sum() / total, ((mass * first).sum() / firsts).detach()


def gathering(rows: Tensor, colour: Tensor, shape: Tensor, first: Tensor, embed: Tensor, aux: Auxiliary) -> Tensor:
    """Loss of prompt-end rows [B, rows, D] that do not yet hold the two words that name the object asked about.

    ``colour`` and ``shape`` [B, rows] are -1 where the question does not name one.
    """
    rows = fn.rms_norm(rows.float(), rows.shape[-1:])
    loss = 0.0
    for target, ids in ((colour, aux.colour_ids[:-1]), (shape, aux.shape_ids[:-1])):
        use = first & (target >= 0)
        logits = 0.25 * rows[use] @ embed[ids].float().T
        loss = loss + fn.cross_entropy(logits, target[use], reduction="sum") / use.sum().clamp(min=1)
    return loss
