"""Write the bundled example scenes: ``python -m demo.examples``. They are held-out scenes that nothing trained on."""

from __future__ import annotations

import json
from pathlib import Path

from .scenes import Scene, make_scene, render, scene_rng

# Held-out scenes beyond the 500 that are scored; chosen by how they look, before any model was asked about them.
INDICES: tuple[int, ...] = (100000, 100004, 100007)


def main(folder: Path = Path(__file__).parent / "images") -> None:
    """Pictures of 384 x 384 pixels and ``scenes.json``: every object with its question and true box."""
    folder.mkdir(exist_ok=True)
    listing = []
    for number, index in enumerate(INDICES, 1):
        scene = make_scene(scene_rng("heldout", 0, index), 4, 6)
        scene = Scene(scene.objects, noise_seed=scene.noise_seed)  # clean background
        name = f"scene{number}.png"
        render(scene, 384).save(folder / name, optimize=True)
        asked = [{"object": t.name, "question": f"where is the {t.name} ?", "box": list(t.box)} for t in scene.objects]
        listing.append({"image": name, "heldout_index": index, "objects": asked})
    (folder / "scenes.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
