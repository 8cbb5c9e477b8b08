"""Command line of ``demo.train``."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(description: str | None) -> argparse.Namespace:
    """Command line; the defaults of each stage are in the model card's commands."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=("tower", "shallow", "deep"))
    p.add_argument("--run", type=Path, default=Path(__file__).parent / "runs" / "main", help="folder of checkpoints")
    p.add_argument("--init", default="", help="stage name to start from (a checkpoint in --run)")
    p.add_argument("--name", default="", help="name of this stage's checkpoint, if not the stage's own")
    p.add_argument("--layers", type=int, default=8, help="decoder layers of this stage")
    p.add_argument("--spread", default="", help="deep: where the shallow layers go, e.g. 0,1,2,7,11,15,19,23")
    p.add_argument("--like", type=int, default=-1, help="deep: later new layers start from this shallow layer")
    p.add_argument("--fresh", action="store_true", help="deep: new layers keep random queries, keys, values and gates")
    p.add_argument("--pull", default="", help="deep: the layers of --init that are the shallow ones, e.g. 0,1,2,4")
    p.add_argument("--steps", type=int, default=10**9, help="end after this many steps")
    p.add_argument("--minutes", type=float, default=1e9, help="end after this many minutes, whichever is first")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--final-lr", type=float, default=1e-4)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--slots", type=int, default=24, help="dialogues per image")
    p.add_argument("--turns", type=int, default=1, help="questions per dialogue")
    p.add_argument("--keep", type=int, default=576, help="visual tokens that the decoder sees, chosen at random")
    p.add_argument("--waiting", type=float, default=0.0, help="share of steps in which random visual rows skip layers")
    p.add_argument("--low", type=int, default=1, help="fewest objects")
    p.add_argument("--high", type=int, default=7, help="most objects")
    p.add_argument("--grow", type=int, default=0, help="steps after which one more object is allowed (0: all at once)")
    p.add_argument("--aux", type=float, default=0.3, help="weight of the auxiliary loss")
    p.add_argument("--guide", default="", help="layers whose attention is guided to the object asked about, e.g. 2,4")
    p.add_argument("--guide-weight", type=float, default=0.2)
    p.add_argument("--train-tower", action="store_true", help="keep training the tower after its own stage")
    p.add_argument("--blind", type=int, default=0, help="layers below it keep the queries and keys they start with")
    p.add_argument("--freeze-visual", action="store_true", help="the projector keeps its weights; for --aux 0")
    p.add_argument("--plurals", action="store_true", help="add the singular's embedding to that of each plural")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--processes", type=int, default=1, help="data-parallel processes; CPU: one thread in each")
    p.add_argument("--eager", action="store_true", help="no torch.compile")
    p.add_argument("--validate-every", type=float, default=120, help="seconds between validations")
    p.add_argument("--export", type=Path, help="write the model there after each validation")
    return p.parse_args()
