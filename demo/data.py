"""Training batches: rendered scenes, per-patch labels and packed questions, made by a background process.

A batch is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import multiprocessing as mp
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .questions import KINDS, questions
from .scenes import COLOUR_NAMES, COLOURS, PLURALS, SHAPES, Question, Scene, _outline, make_scene, render, scene_rng
from .tokenizer import EOS, PAD, encode_words

IMAGE_SIZE, GRID = 192, 24
RENDER_SIZES = (384, 288, 480)


@dataclass(frozen=True)
class BatchSpec:
    """What a batch holds: ``images`` scenes of ``low``..``high`` objects, ``slots`` dialogues of ``turns`` each.

    ``keep`` is the number of visual tokens the decoder sees (a random subset at their original positions);
    576 keeps all of them. With ``grow`` the scenes start with one object and one more is allowed every
    ``grow`` steps, up to ``high``. ``offset`` is where this process's share of the step's scenes starts.
    """

    seed: int
    images: int
    low: int
    high: int
    slots: int
    turns: int = 1
    keep: int = 576
    grow: int = 0
    offset: int = 0

    @property
    def length(self) -> int:
        """Input tokens of a slot: 15 for the longest first turn, 17 more for each later one."""
        return 17 * self.turns - 2


def patch_labels(scene: Scene) -> tuple[np.ndarray, ...]:
    """Colour, shape (the last class is background), box and index (-1: none) of the object on each patch.

    Shapes [576], [576], [576, 4] and [576]; a fifth array [576] is 1 on the one patch at each object's centre.
    """
    fine = 4
    ids = Image.new("L", (GRID * fine, GRID * fine), 0)
    draw = ImageDraw.Draw(ids)
    for i, thing in enumerate(scene.objects, 1):
        box = tuple(v * GRID * fine / 100 for v in thing.box)
        box = (box[0], box[1], box[2] - 1, box[3] - 1)
        if thing.shape == "circle":
            draw.ellipse(box, fill=i)
        else:
            draw.polygon(_outline(thing.shape, box), fill=i)
    cells = np.asarray(ids).reshape(GRID, fine, GRID, fine).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cover = np.stack([(cells == i).sum(1) for i in range(1, len(scene.objects) + 1)])
    owner = np.where(cover.max(0) >= 4, cover.argmax(0), -1)
    colour = np.array([COLOUR_NAMES.index(t.colour) for t in scene.objects] + [len(COLOURS)])
    shape = np.array([SHAPES.index(t.shape) for t in scene.objects] + [len(SHAPES)])
    box = np.array([t.box for t in scene.objects] + [(0, 0, 0, 0)])
    centre = np.zeros(GRID * GRID, np.int64)
    for t in scene.objects:
        centre[(t.box[1] + t.box[3]) * GRID // 200 * GRID + (t.box[0] + t.box[2]) * GRID // 200] = 1
    return colour[owner], shape[owner], box[owner], owner, centre


def _named(text: str) -> tuple[int, int]:
    """Colour and shape (-1: none) that a ``count`` or ``colour`` question names."""
    words = text.split()
    colour = next((i for i, c in enumerate(COLOUR_NAMES) if c in words), -1)
    shape = next((i for i, s in enumerate(SHAPES) if s in words or PLURALS[s] in words), -1)
    return colour, shape


def pack(asked: list[Question], scene: Scene, turns: int, length: int) -> tuple[np.ndarray, ...]:
    """Dialogues of ``turns`` questions: inputs, targets (PAD where not asked for), kinds, objects asked about, and
    the colour and shape that a question about one kind of object names.

    Each is [slots, length] (the last [slots, length, 2]); the last three are -1 where the row's target is no answer,
    or not one object's. The first turn's ``<s> USER: <image>`` is the shared prefix, so a slot starts with the
    question's first word.
    """
    slots = len(asked) // turns
    ids = np.full((slots, length + 1), PAD, np.int64)
    kinds = np.full((slots, length + 1), -1, np.int64)
    about = np.full((slots, length + 1), -1, np.int64)
    named = np.full((slots, length + 1, 2), -1, np.int64)
    index = {t.box: i for i, t in enumerate(scene.objects)}
    for s in range(slots):
        at = 0
        for t in range(turns):
            q = asked[s * turns + t]
            prompt = encode_words(("user: " if t else "") + q.text + " assistant:")
            answer = [*encode_words(q.answer), EOS]
            ids[s, at : at + len(prompt) + len(answer)] = prompt + answer
            kinds[s, at + len(prompt) : at + len(prompt) + len(answer)] = KINDS.index(q.kind)
            if q.kind != "left":
                named[s, at + len(prompt) : at + len(prompt) + len(answer)] = _named(q.text)
            # The end token needs no object, hence the -1.
            about[s, at + len(prompt) : at + len(prompt) + len(answer) - 1] = index.get(q.box, -1) if q.box else -1
            at += len(prompt) + len(answer)
    kinds = kinds[:, 1:]
    return ids[:, :-1], np.where(kinds >= 0, ids[:, 1:], PAD), kinds, about[:, 1:], named[:, 1:]


def make_batch(spec: BatchSpec, step: int) -> dict[str, np.ndarray]:
    """Batch number ``step``: pixels uint8 [B, 192, 192, 3], patch labels, packed questions, kept visual tokens."""
    rows: dict[str, list[np.ndarray]] = {k: [] for k in ("pixels", "colour", "shape", "box", "owner", "centre", "keep")}
    packs = []
    for b in range(spec.images):
        rng = scene_rng("train", spec.seed, step * 4096 + spec.offset + b)
        high = min(spec.high, 1 + step // spec.grow) if spec.grow else spec.high
        scene = make_scene(rng, min(spec.low, high), high)
        size = RENDER_SIZES[rng.integers(len(RENDER_SIZES))]
        picture = render(scene, size, supersample=1 if rng.random() < 0.8 else 2)
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        rows["pixels"].append(np.asarray(picture))
        for name, value in zip(("colour", "shape", "box", "owner", "centre"), patch_labels(scene), strict=True):
            rows[name].append(value)
        kept = rng.permutation(GRID * GRID)[: spec.keep] if spec.keep < GRID * GRID else np.arange(GRID * GRID)
        rows["keep"].append(np.sort(kept))
        if spec.slots:
            packs.append(pack(questions(scene, rng, spec.slots * spec.turns), scene, spec.turns, spec.length))
    batch = {k: np.stack(v) for k, v in rows.items()}
    if spec.slots:
        for name, parts in zip(("ids", "targets", "kinds", "about", "named"), zip(*packs, strict=True), strict=True):
            batch[name] = np.stack(parts)
    return batch


def _produce(spec: BatchSpec, start: int, queue: mp.Queue) -> None:
    step = start
    while True:
        queue.put((step, make_batch(spec, step)))
        step += 1


class Batches:
    """Iterator over batches from ``start`` on, made one process ahead; ``close`` ends that process."""

    def __init__(self, spec: BatchSpec, start: int, ahead: int = 6) -> None:
        context = mp.get_context("spawn")
        self.queue = context.Queue(ahead)
        self.worker = context.Process(target=_produce, args=(spec, start, self.queue), daemon=True)
        self.worker.start()

    def __next__(self) -> dict[str, np.ndarray]:
        """The next step's batch."""
        return self.queue.get(timeout=300)[1]

    def close(self) -> None:
        """Stop the background process."""
        self.worker.terminate()
        self.worker.join()
