"""Scenes of coloured shapes: what is in them, how they are drawn, and what can be asked about them.

Everything is a function of a numpy ``Generator``, and ``scene_rng`` names one generator per (split, seed, index),
so that training, validation and held-out scenes never share a random stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from reroute.boxes import iou

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 84, 210),
    "yellow": (245, 210, 40),
    "orange": (245, 130, 30),
    "purple": (132, 50, 170),
    "cyan": (50, 195, 220),
    "black": (36, 36, 40),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
PLURALS: dict[str, str] = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
SPLITS: dict[str, int] = {"train": 11, "validation": 22, "heldout": 33}
MIN_SIDE, MAX_SIDE = 12, 34


@dataclass(frozen=True)
class Thing:
    """One object. ``box`` is (x1, y1, x2, y2) in hundredths of the image side, each 0..99."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """How questions refer to it, e.g. ``red circle``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order (their (colour, shape) pairs are unique) and the background's colours."""

    objects: tuple[Thing, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]] = ((244, 244, 240), (236, 238, 242))
    noise: float = 0.0
    noise_seed: int = 0


@dataclass(frozen=True)
class Question:
    """A question with its one true answer; ``box`` is set for ``where`` and names the object asked about."""

    kind: str
    text: str
    answer: str
    box: tuple[int, int, int, int] | None = None


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """Random stream of one scene; streams of different splits are disjoint by construction."""
    return np.random.default_rng([SPLITS[split], seed, index])


def make_scene(rng: np.random.Generator, low: int, high: int) -> Scene:
    """Draw a scene of ``low``..``high`` objects that hardly overlap.

    Colours and shapes come from a random sub-palette, so that several objects often share one of the two:
    that is what makes negatives hard and counts larger than one.
    """
    count = int(rng.integers(low, high + 1))
    while True:
        colours = rng.permutation(len(COLOUR_NAMES))[: int(rng.integers(2, len(COLOUR_NAMES) + 1))]
        shapes = rng.permutation(len(SHAPES))[: int(rng.integers(2, len(SHAPES) + 1))]
        if len(colours) * len(shapes) >= count + 1:
            break
    pairs = rng.permutation(len(colours) * len(shapes))[:count]
    boxes: list[tuple[int, int, int, int]] = []
    # Crowded scenes take smaller objects; the largest then shrink until all of them fit.
    top = {1: 34, 2: 34, 3: 34, 4: 32, 5: 30}.get(count, 28)
    tries = 0
    while len(boxes) < count:
        tries += 1
        side = rng.uniform(MIN_SIDE, max(top - tries / 20, MIN_SIDE + 2))
        w, h = (int(np.clip(round(side * f), MIN_SIDE, MAX_SIDE)) for f in rng.uniform(0.85, 1.15, 2))
        x, y = int(rng.integers(0, 100 - w)), int(rng.integers(0, 100 - h))
        box = (x, y, x + w, y + h)
        if all(iou(box, other) < 0.02 for other in boxes):
            boxes.append(box)
    things = tuple(
        Thing(COLOUR_NAMES[colours[p % len(colours)]], SHAPES[shapes[p // len(colours)]], b)
        for p, b in zip(pairs, boxes, strict=True)
    )
    base = rng.integers(226, 253)
    tint = [np.clip(base + rng.integers(-8, 9, 3), 0, 255).tolist() for _ in range(2)]
    noise = float(rng.choice([0.0, rng.uniform(0, 5)]))
    return Scene(
        things,
        ((tint[0][0], tint[0][1], tint[0][2]), (tint[1][0], tint[1][1], tint[1][2])),
        noise,
        int(rng.integers(2**31)),
    )


def _outline(shape: str, box: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Polygon of a shape inside its box; it touches all four sides."""
    x1, y1, x2, y2 = box
    if shape == "square":
        unit = [(0, 0), (1, 0), (1, 1), (0, 1)]
    elif shape == "triangle":
        unit = [(0.5, 0), (1, 1), (0, 1)]
    elif shape == "diamond":
        unit = [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    elif shape == "cross":
        a, b = 0.33, 0.67
        unit = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    else:  # star: five points, stretched to fill its box
        radius = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        raw = [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radius)]
        (lx, ly), (hx, hy) = (
            (min(p[0] for p in raw), min(p[1] for p in raw)),
            (
                max(p[0] for p in raw),
                max(p[1] for p in raw),
            ),
        )
        unit = [((x - lx) / (hx - lx), (y - ly) / (hy - ly)) for x, y in raw]
    return [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in unit]


def render(scene: Scene, size: int = 384, supersample: int = 3) -> Image.Image:
    """Draw a scene as an RGB image of ``size`` x ``size`` pixels, antialiased by ``supersample``."""
    big = size * supersample
    ramp = np.linspace(0, 1, big, dtype=np.float32)[:, None, None]
    top, bottom = (np.asarray(c, np.float32) for c in scene.background)
    canvas = np.broadcast_to(top + (bottom - top) * ramp, (big, big, 3))
    image = Image.fromarray(canvas.astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(image)
    jitter = np.random.default_rng(scene.noise_seed)
    for thing in scene.objects:
        box = tuple(v * big / 100 for v in thing.box)
        fill = tuple(int(v) for v in np.clip(np.asarray(COLOURS[thing.colour]) + jitter.integers(-12, 13, 3), 0, 255))
        if thing.shape == "circle":
            draw.ellipse((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
        else:
            draw.polygon(_outline(thing.shape, (box[0], box[1], box[2] - 1, box[3] - 1)), fill=fill)
    if supersample > 1:
        image = image.resize((size, size), Image.Resampling.BOX)
    if scene.noise:
        grain = jitter.normal(0, scene.noise, (size, size, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8), "RGB")
    return image
