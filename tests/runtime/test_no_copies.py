"""A decode step copies no cache, and a step without an image pays nothing for routing that grows with the model.

Nothing is timed here: addresses, allocations of Python and numpy, and what ONNX Runtime's profiler saw of each node.
"""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reroute.manifest import Capacity
from reroute.runtime import Session
from reroute.runtime.backend import BackendOptions
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout
from reroute.runtime.ort import OrtBackend
from reroute.runtime.positions import Positions

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
LAYERS, STAGES, TEXT = 6, 3, 50
Node = dict[str, Any]  # arguments of a node's run in a profile


def with_capacity(bundle: Bundle, max_text: int) -> Bundle:
    """The same graphs with caches of another size: their rows are no constant of the graph."""
    manifest = bundle.manifest
    capacity = Capacity(max_text=max_text, max_images=manifest.capacity.max_images)
    rows = capacity.cache_rows(manifest.schedule, manifest.model.vision.tokens_per_image)
    return dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, capacity=capacity, cache_rows=rows))


class Profiled(OrtBackend):
    """Writes a profile of the decoder into `folder`."""

    folder: Path

    def _session_options(self) -> Any:
        options = super()._session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / "profile")
        return options

    def nodes(self) -> list[list[Node]]:
        """For each step, the nodes that ran."""
        events = json.loads(Path(self._decoder.end_profiling()).read_text(encoding="utf-8"))
        self._vision["vision"].end_profiling()
        runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
        ran = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        return [[e["args"] for e in ran if start <= e["ts"] <= end] for start, end in runs]


def run(backend: OrtBackend, ids: list[int]) -> np.ndarray:
    return backend.step(Positions(backend._manifest).inputs(Layout.of_text(ids), None, backend.lengths)).logits


@pytest.fixture(scope="module")
def profiles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Node]]]:
    """Nodes of a text prompt of `TEXT` tokens and of a decode step behind it, by the caches' capacity."""
    found = {}
    for max_text in (512, 4096):
        Profiled.folder = tmp_path_factory.mktemp("profile")
        backend = Profiled(with_capacity(Bundle.open(tiny_bundle), max_text), BackendOptions(threads=1))
        run(backend, [5] * TEXT)
        run(backend, [7])
        found[max_text] = backend.nodes()
    return found


def outputs(node: Node) -> list[list[int]]:
    return [shape for typed in node["output_type_shape"] for shape in typed.values()]


def addresses(backend: OrtBackend) -> list[int]:
    return [array.ctypes.data for layer in range(LAYERS) for array in backend.cache(layer)]


def test_past_and_present_are_one_memory_for_the_whole_session(tiny_bundle: Path) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        backend = session.backend
        assert isinstance(backend, OrtBackend)
        before = addresses(backend)
        assert len(set(before)) == 2 * LAYERS
        pairs = [backend.cache(layer) for layer in range(LAYERS)]
        rows = [(np.array(key), np.array(value)) for key, value in pairs]
        lengths = backend.lengths

        def bound() -> list[set[int]]:
            """Addresses of the outputs of both bindings; the prompt's has the routes besides."""
            bindings = (backend._token_binding, backend._prompt_binding)
            return [{value.data_ptr() for value in binding.get_outputs() if value.has_value()} for binding in bindings]

        def check() -> None:
            assert addresses(backend) == before
            assert [value.data_ptr() for _, value in backend._rooms.values()] == before
            assert all(set(before) <= pointers for pointers in bound())

        session.ask("where is the red circle ?", PICTURE, max_new_tokens=4)
        check()
        session.ask("how many stars are there ?", max_new_tokens=4)
        check()
        session.reset()
        backend.load(rows, lengths)
        run(backend, [5, 6])
        check()
        # What stands in the array is what the next step reads: there is no second copy behind it.
        backend.reset()
        run(backend, [1, 5, 30])
        expected = run(backend, [40]).copy()
        backend._lengths[:] -= 1
        key, _ = backend.cache(0)
        key[:, :, 1] += 1
        assert np.abs(run(backend, [40]) - expected).max() > 1e-3


def test_a_decode_step_allocates_the_same_whatever_the_caches_hold(tiny_bundle: Path) -> None:
    peaks = {}
    for max_text in (512, 4096):
        backend = OrtBackend(with_capacity(Bundle.open(tiny_bundle), max_text), BackendOptions(threads=1))
        positions = Positions(backend._manifest)
        smallest = min(room.nbytes for room, _ in backend._rooms.values())
        for _ in range(3):  # numpy and ONNX Runtime allocate on first use
            run(backend, [7])
        tracemalloc.start()
        peaks[max_text] = []
        for _ in range(5):
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            outputs = backend.step(positions.inputs(Layout.of_text([7]), None, backend.lengths))
            peaks[max_text].append(tracemalloc.get_traced_memory()[1] - held)
            assert np.shares_memory(outputs.logits, backend._logits)
        tracemalloc.stop()
        assert max(peaks[max_text]) < 8192 < smallest
    assert abs(np.median(peaks[512]) - np.median(peaks[4096])) < 512


def test_no_node_of_a_decode_step_makes_anything_as_large_as_a_cache(profiles: dict[int, list[list[Node]]]) -> None:
    """Only attention has the caches as outputs, in place; the rest is one row wide, whatever the capacity."""
    sizes = {}
    for max_text, (_, nodes) in profiles.items():
        made = [(node["op_name"], outputs(node)) for node in nodes]
        attention = [shapes for name, shapes in made if name == "GroupQueryAttention"]
        assert len(attention) == LAYERS
        assert all(shapes[1][2] >= max_text for shapes in attention)
        assert all(int(node["mem_in_use_delta"]) <= 2**12 for node in nodes)
        # Attention stands in a branch, which hands its outputs on.
        rest = [(name, shapes) for name, shapes in made if name != "GroupQueryAttention"]
        assert len([shapes for name, shapes in rest if name == "If" and len(shapes) == 3]) == LAYERS
        sizes[max_text] = [(name, shapes) for name, shapes in rest if name != "If" or len(shapes) != 3]
        widest = max(176, 2 * 64)  # words, and the feed-forward width
        assert max(int(np.prod(shape)) for _, shapes in sizes[max_text] for shape in shapes) == widest
    assert sizes[512] == sizes[4096]


def test_a_decode_step_ranks_nothing_and_routes_one_row(profiles: dict[int, list[list[Node]]]) -> None:
    _, nodes = profiles[512]
    names = Counter(node["op_name"] for node in nodes)
    assert names["If"] == STAGES - 1 + LAYERS
    assert names["GroupQueryAttention"] == LAYERS  # a step of one row is not divided
    assert not names.keys() & {"TopK", "GatherElements", "Softmax", "ReduceMean"}
    for node in nodes:
        if node["op_name"] in ("GatherND", "ScatterND"):
            assert all(shape[-1] <= 64 and np.prod(shape[:-1]) == 1 for shape in outputs(node)), node


def test_a_text_prompt_multiplies_no_more_rows_than_a_dense_one(profiles: dict[int, list[list[Node]]]) -> None:
    """Seven products a layer over all rows, but that behind attention the last layer has one row. No decision runs."""
    nodes, _ = profiles[512]
    products = [outputs(node)[0] for node in nodes if node["op_name"] in ("MatMul", "FusedMatMul", "Gemm")]
    whole = [shape for shape in products if shape[:-1] == [1, TEXT]]
    single = [shape for shape in products if np.prod(shape[:-1]) == 1]
    assert len(whole) == 7 * LAYERS - 4
    assert len(single) == 4 + 1  # the last layer, and the head
    assert len(whole) + len(single) == len(products)
    assert not [node for node in nodes if node["op_name"] == "TopK"]


@pytest.fixture(autouse=True)
def no_tracing() -> Iterator[None]:
    yield
    tracemalloc.stop()
