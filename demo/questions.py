"""Questions about a scene, with the one true answer of each."""

from __future__ import annotations

import numpy as np

from .scenes import COLOUR_NAMES, PLURALS, SHAPES, Question, Scene, Thing

KINDS: tuple[str, ...] = ("where", "exists", "colour", "count", "left")
WEIGHTS: tuple[float, ...] = (0.36, 0.16, 0.08, 0.22, 0.18)


def _article(colour: str) -> str:
    return "an" if colour[0] in "aeiou" else "a"


def where(thing: Thing) -> Question:
    """Ask for an object's box; the answer starts with the first coordinate, so the prompt's last row needs it."""
    return Question("where", f"where is the {thing.name} ?", " ".join(map(str, thing.box)), thing.box)


def exists(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask whether an object is there: half yes; most noes name a colour and a shape that occur, but not together."""
    have = {(t.colour, t.shape) for t in scene.objects}
    if rng.random() < 0.5:
        thing = scene.objects[rng.integers(len(scene.objects))]
        return Question("exists", f"is there {_article(thing.colour)} {thing.name} ?", "yes", thing.box)
    colours, shapes = sorted({c for c, _ in have}), sorted({s for _, s in have})
    hard = [(c, s) for c in colours for s in shapes if (c, s) not in have]
    near = [(c, s) for c in COLOUR_NAMES for s in SHAPES if (c, s) not in have and (c in colours or s in shapes)]
    pool = hard if hard and rng.random() < 0.7 else near
    colour, shape = pool[rng.integers(len(pool))]
    return Question("exists", f"is there {_article(colour)} {colour} {shape} ?", "no")


def colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask for the colour of the only object of its shape; None when no shape is unique."""
    names = [t.shape for t in scene.objects]
    unique = [t for t in scene.objects if names.count(t.shape) == 1]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    return Question("colour", f"what color is the {thing.shape} ?", thing.colour, thing.box)


def count(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask how many objects share a shape or a colour; a sixth of them ask for something absent."""
    by_shape = rng.random() < 0.5
    present = sorted({t.shape if by_shape else t.colour for t in scene.objects})
    absent = [n for n in (SHAPES if by_shape else COLOUR_NAMES) if n not in present]
    pool = absent if absent and rng.random() < 1 / 6 else present
    name = pool[rng.integers(len(pool))]
    number = sum(name in (t.shape, t.colour) for t in scene.objects)
    what = PLURALS[name] if by_shape else f"{name} objects"
    return Question("count", f"how many {what} are there ?", str(number))


def left(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask which of two objects of different shape has its centre further left; None when no clear pair exists."""
    pairs = [
        (a, b)
        for a in scene.objects
        for b in scene.objects
        if a.shape != b.shape and abs(a.box[0] + a.box[2] - b.box[0] - b.box[2]) >= 10
    ]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    answer = a.shape if a.box[0] + a.box[2] < b.box[0] + b.box[2] else b.shape
    return Question("left", f"which is further left , the {a.name} or the {b.name} ?", answer)


def questions(scene: Scene, rng: np.random.Generator, number: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Sample ``number`` questions; ``where`` goes through the objects in a random order before it repeats."""
    weights = np.asarray([WEIGHTS[KINDS.index(k)] for k in kinds])
    drawn = rng.choice(len(kinds), size=number, p=weights / weights.sum())
    order = rng.permutation(len(scene.objects))
    asked: list[Question] = []
    used = 0
    for pick in drawn:
        kind = kinds[pick]
        question: Question | None = None
        if kind == "exists":
            question = exists(scene, rng)
        elif kind == "colour":
            question = colour(scene, rng)
        elif kind == "count":
            question = count(scene, rng)
        elif kind == "left":
            question = left(scene, rng)
        if question is None:
            question = where(scene.objects[order[used % len(order)]])
            used += 1
        asked.append(question)
    return asked
