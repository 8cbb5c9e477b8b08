"""Ask a bundle of the demo model where an object is, and compare the box with the one that was drawn.

    python -m reroute.demo.answer_demo out/demo --picture out/demo.png

Uses what a Jetson has: `reroute.runtime`, no torch. Exits 3 when the answered box has an IoU
below 0.5 with the true one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from reroute import dialogue, report
from reroute.boxes import iou
from reroute.errors import EXIT_GATE, EXIT_OK, RerouteError, UserError, nearest
from reroute.runtime import Session, parse_box

IMAGES = Path(__file__).resolve().parent / "images"
MIN_IOU = 0.5


def main() -> int:
    """Parse arguments, ask, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scene", default="scene3.png", help="image in demo/images (default scene3.png)")
    parser.add_argument("--object", help="for example 'red star' (default: the scene's first)")
    parser.add_argument("--picture", type=Path, help="draw the answer and where the visual tokens ran")
    args = parser.parse_args()
    try:
        return answer(args)
    except RerouteError as error:
        report.print_error(error.message, error.hint)
        return error.exit_code


def answer(args: argparse.Namespace) -> int:
    """Ask one bundled question. Raises UserError for a scene or an object that is not there."""
    scenes = {scene["image"]: scene for scene in json.loads((IMAGES / "scenes.json").read_text(encoding="utf-8"))}
    if args.scene not in scenes:
        raise UserError(f"no scene {args.scene!r}", hint=nearest(args.scene, scenes))
    things = {thing["object"]: thing for thing in scenes[args.scene]["objects"]}
    name = args.object or next(iter(things))
    if name not in things:
        raise UserError(f"no {name!r} in {args.scene}", hint=nearest(name, things))
    turn = dialogue.Turn(prompt=things[name]["question"], images=(IMAGES / args.scene,))
    start = time.perf_counter()
    with Session.open(args.bundle) as session:
        load_ms = (time.perf_counter() - start) * 1000
        reply = dialogue.Reply(turn=turn, answer=session.ask(turn.prompt, turn.images[0], max_new_tokens=8))
        box, truth = parse_box(reply.answer.text), tuple(side / 100 for side in things[name]["box"])
        overlap = iou(box, truth) if box else 0.0
        manifest = session.manifest
        facts = [
            ("question", f"{turn.prompt}  ({args.scene})"),
            ("answer", f"{reply.answer.text.strip()}  (x1 y1 x2 y2, hundredths of the side)"),
            ("drawn", " ".join(str(side) for side in things[name]["box"])),
            ("IoU", f"{overlap:.2f}, {'ok' if overlap >= MIN_IOU else f'below {MIN_IOU}'}"),
            (
                "visual tokens per layer",
                f"{manifest.average_visual_tokens:.1f} of {manifest.model.vision.tokens_per_image}",
            ),
        ]
        report.print_pairs(facts, sys.stdout, title=manifest.routing)
        sys.stdout.flush()
        if args.picture is not None:
            dialogue.save_picture(session, [reply], args.picture)
        dialogue.print_times([reply], load_ms, dialogue.memory(session))
    return EXIT_OK if overlap >= MIN_IOU else EXIT_GATE


if __name__ == "__main__":
    sys.exit(main())
