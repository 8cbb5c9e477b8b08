"""The real device: exports and builds candidates into one folder, measures them, asks them.

All candidates are of one checkpoint, and their files are mostly equal: the weights, the tokenizer, and unless Nüwa
prunes in the tower the vision graph. Equal files are kept once, as hard links.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reroute.bench.measure import interleave
from reroute.bench.workload import Shape, Workload
from reroute.cost import Plan
from reroute.engines import build
from reroute.evaluation.questions import Question, QuestionSet
from reroute.evaluation.runner import run_bundles
from reroute.export import export_checkpoint
from reroute.manifest import Capacity, Grid
from reroute.runtime import Bundle, Session
from reroute.runtime.backend import BackendOptions, open_backend
from reroute.tuning.budgets import Subset
from reroute.tuning.screening import Runner
from reroute.tuning.trace import Samples


class Workshop:
    """Engines of one checkpoint, by routing spec. A `reroute.tuning.search.Device`."""

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        plans: Mapping[str, Plan],
        questions: QuestionSet,
        *,
        shape: Shape,
        capacity: Capacity,
        grids: Sequence[Grid] = (),
        options: BackendOptions | None = None,
        build_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is built yet.

        Args:
            checkpoint: Hugging Face directory.
            folder: for the bundles; there must be room for one export besides.
            plans: of every spec that may be built.
            questions: what is asked.
            shape: of the prompt that is measured.
            capacity: of the bundles.
            grids: see `reroute.export.read_model`.
            options: how engines run.
            build_options: further arguments of `reroute.engines.build`.
        """
        self._checkpoint, self._folder, self._plans, self._questions = checkpoint, folder, plans, questions
        self._shape, self._capacity, self._grids = shape, capacity, tuple(grids)
        self._options = options or BackendOptions()
        self._build_options = dict(build_options or {})
        self._bundles: dict[str, Bundle] = {}
        self._places: dict[str, Path] = {}  # sha256 -> a file that has it

    def build(self, name: str) -> None:
        """Export and build one spec, checked against its reference. Raises GateError, UserError."""
        export, output = self._folder / "export", self._folder / f"bundle-{len(self._bundles)}"
        try:
            export_checkpoint(self._checkpoint, export, routing=name, capacity=self._capacity, grids=self._grids)
            build(export, output, **self._build_options)
        finally:
            shutil.rmtree(export, ignore_errors=True)
        bundle = Bundle.open(output, verify=False)
        for file, entry in bundle.manifest.files.items():
            _share(output / file, self._places.setdefault(entry.sha256, output / file))
        self._bundles[name] = bundle

    def memory_bytes(self, name: str) -> int:
        """The plan's estimate of a loaded engine's peak."""
        return self._plans[name].peak_bytes

    @contextmanager
    def load(self, names: Sequence[str]) -> Iterator[Runner]:
        """Engines with their workloads, as in `reroute bench`."""
        loads: dict[str, Workload] = {}
        for name in names:
            manifest = self._bundles[name].manifest
            loads[name] = Workload(manifest, open_backend(self._bundles[name], self._options), self._shape)
        text = self._shape.text

        def run(
            names: Sequence[str], *, warmup: int, rounds: int, seed: int, advance: Callable[[], None]
        ) -> dict[str, Samples]:
            runs = {(name, text): loads[name].run for name in names}
            samples = interleave(runs, warmup=warmup, repeat=rounds, advance=advance, seed=seed)
            for name in names:
                self._check_kv(name, loads[name].kv_bytes)
            return {name: samples[name, text] for name in names}

        try:
            yield run
        finally:
            loads.clear()
            gc.collect()  # the caches of an engine are large: gone before the next batch loads

    def ask(
        self, names: Sequence[str], questions: Sequence[Question], advance: Callable[[], None]
    ) -> dict[str, list[float]]:
        """Greedy answers through the runner of `reroute eval`."""
        options = self._options
        runs = run_bundles(
            [self._bundles[name] for name in names],
            Subset(self._questions, questions),
            open_engine=lambda bundle: Session.open(
                bundle.path, threads=options.threads, provider=options.provider, verify=False
            ),
            advance=advance,
        )
        return {name: [record.score for record in done.records] for name, done in zip(names, runs, strict=True)}

    def keep(self, name: str, output: Path) -> None:
        """Move the bundle of a spec to `output`; it cannot be used here afterwards."""
        self._bundles.pop(name).path.rename(output)

    def _check_kv(self, name: str, measured: int) -> None:
        """The bound on KV bytes trusts the plan: what the engine filled must be the same."""
        if measured != (planned := self._plans[name].kv_bytes):
            raise RuntimeError(f"{name} fills {measured} bytes of its caches, its plan says {planned}")


def _share(file: Path, first: Path) -> None:
    """Make `file` another name of `first`, which is equal; where the file system has no links it stays a copy."""
    if file == first:
        return
    link = file.with_name(f".{file.name}.link")
    try:
        os.link(first, link)
    except OSError:
        return
    link.replace(file)
