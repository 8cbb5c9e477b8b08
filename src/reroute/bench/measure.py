"""Many repetitions of many candidates in one process, interleaved, and the memory of each in processes of their own.

All bundles are loaded at once, so that a round can run them one after the other, in a new random order each time. They
do not disturb each other: their threads spin within a run only (`BackendOptions.spinning`), so an engine that is not
running takes no core.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reroute.bench import document
from reroute.bench.document import Candidate, Cell
from reroute.bench.memory import Footprint, footprint
from reroute.bench.statistics import spread
from reroute.bench.workload import Sample, Shape, Workload, check_capacity
from reroute.errors import UserError
from reroute.runtime.backend import Backend, BackendOptions, open_backend
from reroute.runtime.bundle import CHAT_TEMPLATE, TOKENIZER, Bundle
from reroute.scenario import FILE_NAME as REFERENCE

MEMORY_RUNS = 3  # processes for the peak memory of a bundle
_NOT_WEIGHTS = {TOKENIZER, CHAT_TEMPLATE, REFERENCE}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run. Runs can be compared when everything but `warmup` and `repeat` is equal.

    Attributes:
        text: text lengths of the prompt.
        images: images in each prompt.
        tokens: decode steps of a repetition.
        warmup: rounds that are thrown away.
        repeat: rounds that count.
        threads: CPU threads, None for the engine's choice.
        provider: of ONNX Runtime, see `BackendOptions`.
    """

    text: tuple[int, ...] = (64, 256)
    images: int = 1
    tokens: int = 32
    warmup: int = 3
    repeat: int = 10
    threads: int | None = None
    provider: str = "cpu"

    def shapes(self) -> list[Shape]:
        """A shape for each text length."""
        return [Shape(text=text, images=self.images, tokens=self.tokens) for text in self.text]


Key = tuple[str, int]  # candidate and text length
# A candidate that is not a bundle: makes, for a text length, what runs one repetition.
Extra = Callable[[int], Callable[[], Sample]]


def open_bundles(paths: Sequence[Path], settings: Settings, *, twice: bool = False) -> list[Bundle]:
    """Check all bundles, and that the settings fit them, before anything is loaded. Raises UserError.

    `twice` allows a bundle to be given more than once.
    """
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1 and not twice:
            raise UserError(f"{path.name} is given twice", hint="give every bundle once")
    BackendOptions(threads=settings.threads, provider=settings.provider)
    bundles = [Bundle.open(path) for path in paths]
    for bundle in bundles:
        for shape in settings.shapes():
            check_capacity(bundle.manifest, shape)
    return bundles


def every_tier(bundles: Sequence[Bundle]) -> list[Bundle]:
    """A bundle with tiers once in each of them: every tier is a candidate of its own."""
    return [replace(bundle, manifest=manifest) for bundle in bundles for manifest in bundle.manifest.all_tiers]


def names_of(bundles: Sequence[Bundle]) -> list[str]:
    """What to call them: the routing, and where two have the same one the folder's name and, if need be, a number."""
    routings = Counter(bundle.manifest.routing for bundle in bundles)
    names: list[str] = []
    for bundle in bundles:
        routing = bundle.manifest.routing
        name = routing if routings[routing] == 1 else f"{routing} ({bundle.path.resolve().name})"
        same = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{same + 1}" if same else name)
    return names


def measure(
    bundles: Mapping[str, Bundle],
    settings: Settings,
    *,
    extras: Mapping[str, Extra] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Candidate], list[Cell]]:
    """Measure bundles by name, and other candidates beside them.

    Args:
        bundles: by the names that they shall have.
        settings: what to run.
        extras: candidates that are not bundles.
        advance: called `steps(...)` times.

    Raises:
        UserError: an engine that does not load or run.
    """
    prints = _footprints(bundles, settings, advance)  # first: this process is still small, and nothing else runs
    candidates: list[Candidate] = []
    runs: dict[Key, Callable[[], Sample]] = {}
    loads: dict[Key, Workload] = {}
    options = BackendOptions(threads=settings.threads, provider=settings.provider)
    engines: dict[Path, Backend] = {}  # tiers of a bundle run on one
    for name, bundle in bundles.items():
        tier = bundle.manifest.tier
        backend = engines.get(bundle.path) if tier else None
        backend = backend or open_backend(bundle, options)
        if tier:
            engines[bundle.path] = backend
            backend.use(tier)
        candidates.append(_candidate(name, bundle, backend.describe(), backend.cache_bytes, prints[name]))
        for shape in settings.shapes():
            loads[name, shape.text] = Workload(bundle.manifest, backend, shape)
            runs[name, shape.text] = loads[name, shape.text].run
    for name, extra in (extras or {}).items():
        candidates.append(Candidate(name=name))
        runs |= {(name, text): extra(text) for text in settings.text}
    samples = interleave(runs, warmup=settings.warmup, repeat=settings.repeat, advance=advance)
    cells = [document.cell(name, text, samples[name, text]) for name, text in runs]
    return candidates, [
        replace(one, kv_bytes=loads[key].kv_bytes) if (key := (one.candidate, one.text)) in loads else one
        for one in cells
    ]


def steps(settings: Settings, *, bundles: int, extras: int = 0) -> int:
    """How often `measure` advances."""
    return bundles * MEMORY_RUNS + (bundles + extras) * len(settings.text) * (settings.warmup + settings.repeat)


def interleave(
    runs: Mapping[Key, Callable[[], Sample]],
    *,
    warmup: int,
    repeat: int,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[Key, dict[str, list[float]]]:
    """Run everything once a round, in a new order each time; candidates of one text length stand side by side.

    Returns a sample a round, by candidate, text and quantity.
    """
    samples: dict[Key, dict[str, list[float]]] = {key: {} for key in runs}
    order = random.Random(seed)
    for number in range(warmup + repeat):
        names, texts = (sorted(set(words)) for words in zip(*runs, strict=True))
        order.shuffle(names)
        order.shuffle(texts)
        for key in ((name, text) for text in texts for name in names):
            for quantity, value in runs[key]().items():
                if number >= warmup:
                    samples[key].setdefault(quantity, []).append(value)
            advance()
    return samples


def _footprints(
    bundles: Mapping[str, Bundle], settings: Settings, advance: Callable[[], None]
) -> dict[str, list[Footprint]]:
    """Of the longest prompt, `MEMORY_RUNS` of each bundle in turn."""
    shape = max(settings.shapes(), key=lambda shape: shape.text)
    found: dict[str, list[Footprint]] = {name: [] for name in bundles}
    for _ in range(MEMORY_RUNS):
        for name, bundle in bundles.items():
            found[name].append(footprint(bundle, shape, threads=settings.threads, provider=settings.provider))
            advance()
    return found


def _candidate(
    name: str, bundle: Bundle, engine: dict[str, str], cache_bytes: int, prints: list[Footprint]
) -> Candidate:
    manifest = bundle.manifest
    peaks = [one.peak_rss_bytes for one in prints]
    references = {tier.reference for tier in manifest.tiers.values()}
    return Candidate(
        name=name,
        folder=bundle.path.resolve().name,
        routing=manifest.routing,
        action="dense" if manifest.routing == "dense" else manifest.schedule.action,  # a tier may be, too
        average_visual_tokens=manifest.average_visual_tokens,
        dtype=manifest.dtype,
        backend=manifest.backend,
        checkpoint_sha256=manifest.checkpoint_sha256,
        check_passed=manifest.check["passed"] if manifest.check else None,
        versions=manifest.versions,
        engine=engine,
        memory={
            "peak_rss_bytes": spread(peaks).median,
            "cache_bytes": cache_bytes,
            "weight_bytes": sum(
                file.bytes for name, file in manifest.files.items() if name not in {*_NOT_WEIGHTS, *references}
            ),
        },
        load_ms=spread([one.load_ms for one in prints]).median,
        memory_samples=tuple(asdict(one) for one in prints),
    )
