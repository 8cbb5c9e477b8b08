"""Nüwa's own first stage for Qwen2.5-VL beside ours, on equal tower outputs: which tokens stay and what they carry.

Theirs is `Man-PaperRejected/Nuwa`, Vscan/qwen/model/qwen2_5vl_nuwa.py: the statements of `forward` from the settings to
the aggregated tokens, run as they stand, without the model around them. Ours is the tower that is exported, with random
weights. Both get the tower's tokens, salience and similarity of the same images.

    git clone https://github.com/Man-PaperRejected/Nuwa CODE
    PYTHONPATH=src python benchmarks/authors_nuwa.py CODE
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from reroute.export import resolve
from reroute.export.checkpoint import Checkpoint
from reroute.export.grids import with_grids
from reroute.export.models import family_of
from reroute.export.nuwa_grid import similar_layers
from reroute.manifest import Grid
from reroute.published import PUBLISHED

FILE = "Vscan/qwen/model/qwen2_5vl_nuwa.py"
GRIDS: tuple[Grid, ...] = ((4, 6), (5, 3), (3, 3), (6, 6), (5, 8))
RATIOS = {25: 0.25, 50: 0.5, 75: 0.75}
SEEDS = 4


def statements(code: Path) -> tuple[str, str]:
    """Their helper for distances, and the part of `forward` that prunes."""
    lines = (code / FILE).read_text(encoding="utf-8").split("\n")

    def line(text: str, start: int = 0) -> int:
        return next(number for number in range(start, len(lines)) if text in lines[number])

    first = line("def _create_distance_penalty_matrix")
    last = next(n for n in range(first + 1, len(lines)) if lines[n] and lines[n][0] not in " )")
    part = lines[line("KEEP_RATIO = self.keep_ratio") : line("# --- 7. Apply Pruning")]
    return "\n".join(lines[first:last]), textwrap.dedent("\n".join(part))


def theirs(code: tuple[str, str], ratio: float, grid: Grid, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The names that their statements leave behind."""
    thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    names: dict[str, Any] = {
        **inputs, "torch": torch, "F": torch.nn.functional, "math": math, "image_grid_thw": thw,
        "self": SimpleNamespace(keep_ratio=ratio),
    }  # fmt: skip
    for text in code:
        exec(text, names)
    return names


def main() -> None:
    """Compare, print one line for each setting."""
    parser = argparse.ArgumentParser(description="Nüwa's own first stage for Qwen2.5-VL beside ours.")
    parser.add_argument("code", type=Path, help=f"a clone of the repository, with {FILE}")
    code = statements(parser.parse_args().code)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.qwen import CELL, make_qwen

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        opened = Checkpoint.open(make_qwen(Path(folder), full=(0, 2), layers=28))
        family = family_of(opened)
        model = with_grids(family.read(opened), GRIDS)
        for percent, ratio in RATIOS.items():
            spec = PUBLISHED[f"qwen25/keep{percent}/nuwa"]
            tower: Any = family.build_vision(opened, model, resolve(spec, model))
            equal = images = 0
            worst = 0.0
            for grid in GRIDS:
                for seed in range(SEEDS):
                    generator = torch.Generator().manual_seed(seed)
                    pixels = torch.randn(1, 3, grid[0] * CELL, grid[1] * CELL, generator=generator)
                    tokens, places = tower(pixels)
                    inner = tower.tower
                    inner.states = states = []
                    features = inner(pixels)
                    inner.states = None
                    middle = torch.stack([states[layer] for layer in similar_layers(len(states))]).mean(0)
                    inputs = {
                        "image_embeds": features[0],
                        "attn_logits": tower.salience(states[-2], grid)[0],
                        "middle_embeds": inner.merger(middle)[0, tower.table("misread", grid)],
                    }
                    found = theirs(code, ratio, grid, inputs)
                    same = torch.where(found["select_mask"])[0].tolist() == places[0].tolist()
                    images, equal = images + 1, equal + same
                    if same:
                        worst = max(worst, float((found["aggregated_tokens"][0] - tokens[0]).abs().max()))
            print(
                f"keep_ratio {ratio}: {equal} of {images} images keep the same tokens, largest difference {worst:.1e}"
            )


if __name__ == "__main__":
    main()
