"""Train the demo model on generated scenes: ``python -m demo.train --help``.

Three stages, each of which starts from the one before it:

* ``tower``: vision tower and projector read the colour, the shape and the box of the object on every patch;
* ``shallow``: a decoder of a few layers learns to answer;
* ``deep``: identity layers are put between those layers (their two output matrices are zero), and all of them train;
  with ``--pull`` the trained layers of a deep model move to other places.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as fn
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from .data import Batches, BatchSpec
from .losses import Auxiliary, answer_loss, gathering, guidance
from .model import build_model, save
from .options import arguments
from .packed import Packed
from .scenes import PLURALS
from .tokenizer import encode_words
from .validate import Validation
from .waiting import waiting


def grow(model: Any, layers: int, spread: list[int], like: int = -1, fresh: int | None = None, pull: str = "") -> Any:
    """Put the decoder's layers at the places ``spread`` of a deeper one; the new layers start as the identity.

    A new layer takes all but its two output matrices, which are zero, from the shallow layer before it, or from
    shallow layer ``like`` where it comes after that one; they are random where ``fresh`` gives a seed. ``pull`` names
    the layers that count as the decoder's, if not all of them.
    """
    deep = build_model(layers, len(model.model.vision_tower.encoder.layers) - 1, fresh or 0)
    old = list(model.model.language_model.layers)
    old = [old[int(v)] for v in pull.split(",")] if pull else old
    state = {k: v for k, v in model.state_dict().items() if "language_model.layers." not in k}
    deep.load_state_dict(state, strict=False)
    for i, layer in enumerate(deep.model.language_model.layers):
        if i in spread:
            layer.load_state_dict(old[spread.index(i)].state_dict())
        else:
            before = max(sum(place < i for place in spread) - 1, 0)
            if fresh is None:
                layer.load_state_dict(old[min(before, like) if like >= 0 else before].state_dict())
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


def trained_parameters(model: Any, aux: Auxiliary, args: argparse.Namespace) -> list[Tensor]:
    """Parameters this stage trains; all others are frozen."""
    model.requires_grad_(False)
    parts: list[nn.Module] = [model.model.multi_modal_projector, model.get_input_embeddings(), model.lm_head, aux]
    if args.stage == "tower" or args.train_tower:
        tower = model.model.vision_tower
        parts += [tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[:-1]]
    if args.stage != "tower":
        parts += [model.model.language_model]
    for part in parts:
        part.requires_grad_(True)
    frozen: list[nn.Module] = [model.model.multi_modal_projector] if args.freeze_visual else []
    for layer in model.model.language_model.layers[: args.blind]:
        frozen += [layer.self_attn.q_proj, layer.self_attn.k_proj]
    for part in frozen:
        part.requires_grad_(False)
    return list(dict.fromkeys(p for part in parts for p in part.parameters() if p.requires_grad))


class Trainer:
    """State of one stage: model, optimiser, step and seconds spent, in one resumable checkpoint."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        self.args, self.rank = args, rank
        self.name = args.name or args.stage
        self.path = args.run / f"{self.name}.pt"
        args.run.mkdir(parents=True, exist_ok=True)
        self.step, self.spent = 0, 0.0
        self.aux = Auxiliary().to(args.device)
        self.model: Any
        resume = torch.load(self.path, map_location="cpu") if self.path.exists() else None
        if resume:
            self.model = build_model(resume["layers"], seed=args.seed)
            self.model.load_state_dict(resume["model"])
            self.aux.load_state_dict(resume["aux"])
            self.step, self.spent = resume["step"], resume["spent"]
        elif args.init:
            start = torch.load(args.run / f"{args.init}.pt", map_location="cpu")
            self.model = build_model(start["layers"], seed=args.seed)
            self.model.load_state_dict(start["model"])
            self.aux.load_state_dict(start["aux"], strict=False)
            if args.spread:
                spread = [int(v) for v in args.spread.split(",")]
                self.model = grow(
                    self.model, args.layers, spread, args.like, args.seed if args.fresh else None, args.pull
                )
        else:
            self.model = build_model(args.layers, seed=args.seed)
        if args.plurals and not resume:
            with torch.no_grad():
                embed = self.model.get_input_embeddings().weight
                for one, many in PLURALS.items():
                    embed[encode_words(many)] += embed[encode_words(one)]
        self.model.to(args.device).train()
        self.parameters = trained_parameters(self.model, self.aux, args)
        # After its own stage the tower learns slowly: the decoder's rate undoes what it has learnt.
        tower = {id(p) for p in self.model.model.vision_tower.parameters()} if args.stage != "tower" else set()
        groups = []
        for slow in (False, True):
            for matrix in (False, True):
                part = [p for p in self.parameters if (id(p) in tower) == slow and (p.ndim >= 2) == matrix]
                if part:
                    groups.append({"params": part, "weight_decay": 0.02 * matrix, "scale": 0.2 if slow else 1.0})
        self.optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
        if resume:
            self.optimiser.load_state_dict(resume["optimiser"])
        self.layers = int(self.model.config.text_config.num_hidden_layers)
        self.packed = Packed(self.model, compiled=not args.eager)

    def store(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "aux": self.aux.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "layers": self.layers,
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def rate(self) -> float:
        """Learning rate: warm-up, then a cosine over whichever of the steps and the minutes runs out first."""
        a = self.args
        done = min(max(self.step / a.steps, self.spent / 60 / a.minutes), 1.0)
        cosine = a.final_lr + (a.lr - a.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return cosine * min(1.0, (self.step + 1) / a.warmup)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step; returns what to log."""
        a, model = self.args, self.model
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate() * group["scale"]
        with torch.autocast(a.device.split(":")[0], torch.bfloat16):
            with torch.set_grad_enabled(a.stage == "tower" or a.train_tower):
                features = self.packed.features(batch["pixels"])
            visual = self.packed.project(features)
            part = slice(0, None if a.stage == "tower" or a.train_tower else max(a.images // 4, 1))
            labels = {k: batch[k][part] for k in ("colour", "shape", "box", "centre")}
            loss, report = visual.new_zeros(()), {}
            if a.aux or a.stage == "tower":
                loss, report = self.aux(visual[part], labels, model.get_input_embeddings().weight, model.lm_head.weight)
                report["aux"] = loss.detach()
            if a.stage != "tower":
                watch = tuple(int(v) for v in a.guide.split(",")) if a.guide else ()
                drawn = waiting(a.seed, self.step, self.rank, a.waiting, batch["owner"], self.layers)
                keep, stages = drawn or (batch["keep"], None)
                about, owner = batch["about"].flatten(1), batch["owner"].gather(1, keep)
                own = (about[..., None] == owner[:, None]) & (about[..., None] >= 0)
                logits, seen = self.packed.answers(visual, keep, batch["ids"], watch, own, stages)
                answers, more = answer_loss(logits, batch["targets"], batch["kinds"], self.aux.soft)
                loss = answers + a.aux * loss
                report |= more | {"answer": answers.detach()}
                if drawn:
                    report = {f"waiting_{k}": v for k, v in report.items()}
                first = (batch["kinds"] >= 0) & (fn.pad(batch["kinds"], (1, 0), value=-1)[..., :-1] < 0)
                first = first.flatten(1)
                for n, (i, (mass, rows)) in enumerate(zip(watch, seen, strict=True)):
                    guided, report[f"look_{i}"] = guidance(mass, own, first)
                    loss = loss + a.guide_weight * guided
                    if n == 0:
                        names = batch["named"].flatten(1, 2)
                        words = model.get_input_embeddings().weight
                        gathered = gathering(rows, names[..., 0], names[..., 1], first, words, self.aux)
                        report["gather"] = gathered.detach()
                        loss = loss + a.guide_weight * gathered
        self.optimiser.zero_grad()
        loss.backward()
        self.average()
        report["norm"] = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        return report

    def average(self) -> None:
        """Average the gradients over the processes, as one flat tensor."""
        if self.args.processes == 1:
            return
        grads = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.args.processes
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def agreed(self, seconds: float) -> float:
        """The first process's clock, so that all of them stop at the same step."""
        if self.args.processes == 1:
            return seconds
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(value, 0)
        return float(value)

    def run(self) -> None:
        """Train until the steps or the minutes are used up."""
        a = self.args
        slots = 0 if a.stage == "tower" else a.slots
        spec = BatchSpec(a.seed, a.images, a.low, a.high, slots, a.turns, a.keep, a.grow, self.rank * a.images)
        batches = Batches(spec, self.step)
        validation = None if a.stage == "tower" or self.rank else Validation(a.seed, a.device)
        log = Path(os.devnull if self.rank else a.run / f"{self.name}.jsonl").open("a")  # noqa: SIM115
        sums: dict[str, list[float]] = {}
        count, last, checked = 0, *[self.agreed(time.time())] * 2
        while self.step < a.steps and self.spent < a.minutes * 60:
            batch = {k: torch.from_numpy(v).to(a.device) for k, v in next(batches).items()}
            report = self.update(batch)
            for key, value in report.items():
                sums.setdefault(key, []).append(float(value))
            self.step, count = self.step + 1, count + 1
            now = self.agreed(time.time())
            self.spent, last = self.spent + now - last, now
            if count == 25:
                row = {"step": self.step, "minutes": round(self.spent / 60, 2), "lr": round(self.rate(), 6)}
                row |= {k: round(sum(v) / len(v), 4) for k, v in sums.items()}
                print(json.dumps(row), file=log, flush=True)
                sums, count = {}, 0
            if now - checked > a.validate_every:
                self.check(validation, log)
                checked = now
        self.check(validation, log)
        batches.close()

    def check(self, validation: Validation | None, log: TextIO) -> None:
        """Store the checkpoint, validate, export; the first process does it for all."""
        if self.rank:
            return
        self.store()
        if validation:
            row = {"step": self.step, "minutes": round(self.spent / 60, 2)} | validation(self.model)
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), flush=True)
        if self.args.export:
            save(self.model, self.args.export)


def work(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One process's part of a stage."""
    if args.processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=args.processes)
    Trainer(args, rank).run()
    if args.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Start the processes. Several with one thread each beat one with several threads when cores are shared."""
    args = arguments(__doc__)
    args.run.mkdir(parents=True, exist_ok=True)
    if args.processes == 1:
        work(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (args, f"{folder}/meeting"), nprocs=args.processes)


if __name__ == "__main__":
    main()
