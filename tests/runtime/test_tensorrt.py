"""The TensorRT backend without a GPU: plan, compatibility, capture, and a session on tests/tensorrt_fakes."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reroute.engines import TensorRTOptions, build, build_engine
from reroute.engines.targets import LoweringOptions
from reroute.errors import RerouteError, UserError
from reroute.manifest import EngineBuild, Manifest
from reroute.runtime import Prefix, Sampling, Session
from reroute.runtime.backend import BackendOptions, StepOutputs, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import Layout
from reroute.runtime.positions import Positions
from reroute.runtime.sampling import Sampler
from reroute.runtime.tensorrt_cuda import Cuda, CudaError
from reroute.runtime.tensorrt_fit import require_fit
from reroute.runtime.tensorrt_graph import CapturedStep
from reroute.runtime.tensorrt_plan import ALIGNMENT, Block, plan_decoder, plan_vision
from tests import tensorrt_fakes as fakes
from tests.runtime.test_chat import LLAVA
from tests.runtime.test_prefix import with_template

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
QUESTIONS = ("where is the red circle ?", "how many stars are there ?", "is there a blue square ?")


@pytest.fixture(scope="module")
def bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 bundle in plugin form, built by the fake. Do not change it."""
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "plugin.so").write_bytes(b"plugin")
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(patch)
        engine = build_engine.Options(plugin=folder / "plugin.so")
        lowering = LoweringOptions(target="orin-jp7", form="plugin", dtype="float32")
        options = TensorRTOptions(lowering=lowering, engine=engine)
        build(tiny_export, folder / "bundle", backend="tensorrt", tensorrt=options, check=False)
    return folder / "bundle"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[fakes.FakeTensorRT, fakes.FakeCuda]:
    return fakes.install(monkeypatch)


def talk(session: Session, sampling: Sampling | None = None) -> list[tuple[Any, ...]]:
    answers = [
        session.ask(QUESTIONS[0], IMAGE, max_new_tokens=6, sampling=sampling),
        session.ask(QUESTIONS[1], max_new_tokens=5, sampling=sampling),
        session.ask(QUESTIONS[2], IMAGE, max_new_tokens=4, sampling=sampling),
    ]
    return [(a.token_ids, [route.tolist() for route in a.routes]) for a in answers]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_a_dialogue_equals_onnx_runtime(bundle: Path, tiny_bundle: Path, fake: Any, sampling: Sampling | None) -> None:
    """Image, later turn, second image: tokens, routes, lengths and caches, also after a reset."""
    del fake
    with Session.open(bundle) as session, Session.open(tiny_bundle, threads=1) as other:
        expected = talk(other, sampling)
        assert talk(session, sampling) == expected
        np.testing.assert_array_equal(session.backend.lengths, other.backend.lengths)
        assert session.cache_bytes == other.cache_bytes
        for layer in (0, 3, 5):
            for mine, theirs in zip(session.backend.cache(layer), other.backend.cache(layer), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-4)
        session.reset()
        assert talk(session, sampling) == expected


def test_probabilities_of_tokens_equal_onnx_runtime(bundle: Path, tiny_bundle: Path, fake: Any) -> None:
    """The engine's own log probability, from the prompt on, and the one that the host works out from the logits."""
    del fake
    with Session.open(bundle) as session, Session.open(tiny_bundle, threads=1) as other:
        mine, theirs = (list(one.stream(QUESTIONS[0], IMAGE, max_new_tokens=5)) for one in (session, other))
        assert [token.id for token in mine] == [token.id for token in theirs]
        expected = [token.logprob for token in theirs]
        np.testing.assert_allclose([token.logprob for token in mine], expected, atol=1e-4)


def test_decode_is_one_graph_launch_and_greedy_leaves_the_logits_on_the_device(bundle: Path, fake: Any) -> None:
    _, cuda = fake
    with Session.open(bundle) as session:
        session.ask(QUESTIONS[0], IMAGE, max_new_tokens=3)  # prompt, one eager decode, one captured
        assert session.backend.describe()["decode"] == "captured"
        cuda.log.clear()
        answer = session.ask(QUESTIONS[1], max_new_tokens=4)
        assert len(answer.token_ids) == 4
        assert cuda.log.count("cudaGraphLaunch") == 3
        after = cuda.log[cuda.log.index("cudaGraphLaunch") :]
        assert set(after) == {"cudaGraphLaunch", "cudaStreamSynchronize"}  # no copy of the logits, nothing else
        assert "cudaMalloc" not in cuda.log
        assert "cudaStreamBeginCapture" not in cuda.log


def test_a_failed_capture_falls_back_and_says_so(bundle: Path, fake: Any) -> None:
    _, cuda = fake
    with Session.open(bundle) as session:
        expected = session.ask(QUESTIONS[0], IMAGE, max_new_tokens=6).token_ids
    cuda.fail_capture = True
    with Session.open(bundle) as session:
        assert session.ask(QUESTIONS[0], IMAGE, max_new_tokens=6).token_ids == expected
        assert session.backend.describe()["decode"].startswith("eager (cudaStreamEndCapture")


def test_past_and_present_share_an_address_and_contexts_share_memory(bundle: Path, fake: Any) -> None:
    trt, _ = fake
    backend = open_backend(Bundle.open(bundle))
    prefill, decode, vision = trt.contexts[-3:]
    for layer in range(6):
        for kind in ("key", "value"):
            name = f"{layer}.{kind}"
            assert prefill.addresses[f"past_key_values.{name}"] == prefill.addresses[f"present.{name}"]
            assert decode.addresses[f"past_key_values.{name}"] == prefill.addresses[f"present.{name}"]
    caches = {decode.addresses[name] for name in decode.addresses if name.startswith("past")}
    assert len(caches) == 12
    assert prefill.memory == decode.memory == vision.memory
    assert (prefill.index, decode.index) == (0, 1)
    assert decode.shapes["visual_embeds"] == (1, 0, 64)
    del backend


def test_all_memory_is_given_back(bundle: Path, fake: Any) -> None:
    _, cuda = fake
    backend = open_backend(Bundle.open(bundle))
    assert cuda.memory
    del backend
    gc.collect()
    assert not cuda.memory


def test_a_step_that_does_not_fit_changes_nothing(bundle: Path, fake: Any) -> None:
    del fake
    with Session.open(bundle) as session:
        session.ask(QUESTIONS[0], max_new_tokens=1)
        before = session.backend.lengths
        steps = [step_of(session, [5] * 513), step_of(session, [5] * (int(min(session.manifest.cache_rows)) + 1))]
        for step in steps:
            with pytest.raises(ValueError, match="cache rows"):
                session.backend.step(step)
            np.testing.assert_array_equal(session.backend.lengths, before)


def test_rows_of_another_session_are_loaded_and_built_upon(bundle: Path, tiny_bundle: Path, fake: Any) -> None:
    """What ONNX Runtime computed comes back as it was, at the same addresses, and the dialogue goes on from it."""
    trt, cuda = fake
    with Session.open(bundle) as session, Session.open(tiny_bundle, threads=1) as other:
        other.backend.step(step_of(other, [1, 5, 30, 40]))
        pairs = [other.backend.cache(layer) for layer in range(6)]
        rows = [(key.copy(), value.copy()) for key, value in pairs]
        session.ask(QUESTIONS[0], IMAGE, max_new_tokens=4)  # leaves rows behind, longer than the new ones
        held, addresses = len(cuda.memory), dict(trt.contexts[-2].addresses)
        session.backend.load(rows, other.backend.lengths)
        gc.collect()
        assert len(cuda.memory) == held
        assert session.backend.lengths.tolist() == [4, 4, 4]
        for layer, pair in enumerate(rows):
            for mine, theirs in zip(session.backend.cache(layer), pair, strict=True):
                np.testing.assert_array_equal(mine, theirs)
        for ids in ([50], [60, 9], [8]):  # a decode step, a prompt, a decode step
            inputs = Positions(session.manifest).inputs(Layout.of_text(ids), None, other.backend.lengths)
            mine, theirs = (one.backend.step(inputs).logits.copy() for one in (session, other))
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
        assert trt.contexts[-2].addresses == addresses
        for wrong, lengths in ((rows[:-1], [4, 4, 4]), (rows, [4, 4, 3]), (rows, [4, 4]), (rows, [9999] * 3)):
            with pytest.raises(ValueError, match=r"layers|rows"):
                session.backend.load(wrong, np.asarray(lengths, np.int32))


def test_a_dialogue_starts_from_a_prefix(bundle: Path, fake: Any, tmp_path: Path) -> None:
    del fake
    copy = with_template(bundle, tmp_path / "bundle", LLAVA)
    with Session.open(copy) as session:
        prefix = session.prefix("is there a blue square ?")
        prefix.save(tmp_path / "prefix.npz")
        session.reset(system=prefix.system)
        whole = session.ask(QUESTIONS[0], max_new_tokens=4)
    with Session.open(copy) as session:
        session.reset(prefix=Prefix.load(tmp_path / "prefix.npz"))
        answer = session.ask(QUESTIONS[0], max_new_tokens=4)
        assert answer.token_ids == whole.token_ids
        assert answer.prefix_tokens == whole.prompt_tokens - answer.prompt_tokens == len(prefix.token_ids)


def step_of(session: Session, ids: list[int]) -> Any:
    from reroute.runtime.layout import Layout
    from reroute.runtime.positions import Positions

    return Positions(session.manifest).inputs(Layout.of_text(ids), None, np.zeros(3, np.int32))


def test_more_images_than_the_profile_are_encoded_in_turns(bundle: Path, fake: Any) -> None:
    trt, _ = fake
    backend = open_backend(Bundle.open(bundle))
    pixels = np.random.default_rng(1).normal(size=(5, 3, 48, 48)).astype(np.float32)
    together = backend.encode(pixels).embeds
    assert trt.contexts[-1].runs == 3
    one = np.concatenate([backend.encode(image[None]).embeds for image in pixels])
    np.testing.assert_allclose(together, one, atol=1e-5)


def test_a_batch_is_refused_by_name(bundle: Path, fake: Any) -> None:
    del fake
    with pytest.raises(UserError, match="one dialogue, not 2"):
        open_backend(Bundle.open(bundle), BackendOptions(batch=2))


@pytest.mark.parametrize("missing", ["tensorrt", "cuda.bindings.runtime"])
def test_what_is_missing_is_named(bundle: Path, fake: Any, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    del fake
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="cannot be imported") as caught:
        open_backend(Bundle.open(bundle))
    assert "pip install" in caught.value.hint


def test_no_gpu(bundle: Path, fake: Any) -> None:
    fake[1].devices = 0
    with pytest.raises(UserError, match="no usable GPU: cudaSetDevice"):
        open_backend(Bundle.open(bundle))


BUILT = EngineBuild(
    tensorrt="10.3.0.26",
    compute_capability="8.7",
    device="Orin",
    platform="linux-aarch64",
    hardware_compatibility="none",
    version_compatible=False,
    plugin_file="",
    plugin_layers=0,
    device_memory_bytes={},
)


@pytest.mark.parametrize(
    ("change", "version", "capability", "fits"),
    [
        ({}, "10.3.0", "8.7", True),
        ({}, "10.3.0.30", "8.7", True),
        ({}, "10.16.1", "8.7", False),
        ({}, "11.1.0", "9.0", False),
        ({}, "10.3.0", "8.9", False),
        ({"hardware_compatibility": "ampere+"}, "10.3.0", "9.0", True),
        ({"hardware_compatibility": "ampere+"}, "10.3.0", "7.5", False),
        ({"version_compatible": True}, "10.16.1", "8.7", True),
        ({"version_compatible": True}, "10.1.0", "8.7", False),
        ({"version_compatible": True}, "11.0.0", "8.7", False),
        ({"platform": "linux-x86_64"}, "10.3.0", "8.7", False),
    ],
)
def test_an_engine_runs_where_it_was_built(
    change: dict[str, Any], version: str, capability: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    built = dataclasses.replace(BUILT, **change)
    if fits:
        require_fit(built, tensorrt=version, compute_capability=capability, device="here")
        return
    with pytest.raises(UserError) as caught:
        require_fit(built, tensorrt=version, compute_capability=capability, device="here")
    for text in (built.tensorrt, built.compute_capability, built.platform, version, capability, "linux-aarch64"):
        assert text in caught.value.message


def test_the_comparison_comes_before_anything_is_deserialised(
    bundle: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.3.0")
    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", None)
    with pytest.raises(
        UserError, match=r"built with TensorRT 10\.16\.1\.11 for Fake Orin .* this is TensorRT 10\.3\.0"
    ):
        open_backend(Bundle.open(bundle))
    assert not fake[0].libraries


def test_a_second_session_finds_the_plugin_loaded(bundle: Path, fake: Any) -> None:
    first, second = (open_backend(Bundle.open(bundle)) for _ in range(2))
    assert len(fake[0].libraries) == 1
    del first, second


def test_a_lowered_folder_is_not_a_bundle(tiny_export: Path, tmp_path: Path) -> None:
    lowering = LoweringOptions(target="orin-jp6")
    options = TensorRTOptions(lowering=lowering, only_lower=True)
    build(tiny_export, tmp_path / "lowered", backend="tensorrt", tensorrt=options)
    with pytest.raises(UserError, match="no engine yet") as caught:
        Bundle.open(tmp_path / "lowered")
    assert "build_engine.py" in caught.value.hint


def test_the_plan_gives_every_tensor_room_of_its_own(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    plan = plan_decoder(manifest)
    vision, images = plan_vision(manifest)
    assert images == 2
    for block in (*plan.steps.values(), plan.results, vision):
        spans = sorted((place.offset, place.offset + place.nbytes) for place in block.places.values())
        assert all(start % ALIGNMENT == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert len({start for start, _ in spans}) == len(spans)
        assert spans[-1][1] <= block.nbytes
    decode = plan.steps["decode"].places
    assert (decode["input_ids"].shape, decode["visual_embeds"].shape) == ((1, 1), (1, 0, 64))
    assert plan.steps["prefill"].places["visual_embeds"].shape == (1, 72, 64)
    assert plan.results.places["routes.1"].shape == (1, 512 + 7)
    assert plan.caches["5.value"].nbytes == 2 * (512 + 8) * 16 * 4
    assert Block(places={}).nbytes == ALIGNMENT
    with pytest.raises(UserError, match="no optimisation profiles"):
        plan_decoder(dataclasses.replace(manifest, lowering=None))


class Recorder:
    """A stream that notes what happens to it."""

    def __init__(self, *, fail: str = "") -> None:
        self.calls: list[str] = []
        self.fail = fail

    def begin_capture(self) -> None:
        self.calls.append("begin")

    def end_capture(self) -> str:
        self.calls.append("end")
        if self.fail == "end":
            raise CudaError("no")
        return "graph"

    def launch(self, graph: Any) -> None:
        self.calls.append(f"launch {graph}")

    def enqueue(self) -> None:
        self.calls.append("step")
        if self.fail == "enqueue" and "begin" in self.calls and "end" not in self.calls:
            raise RerouteError("not capturable")


def test_the_first_step_is_eager_the_second_captured() -> None:
    stream = Recorder()
    step = CapturedStep(stream, stream.enqueue)
    states = []
    for _ in range(3):
        step.run()
        states.append(step.state)
    assert states == ["warm", "captured", "captured"]
    assert stream.calls == ["step", "begin", "step", "end", "launch graph", "launch graph"]


@pytest.mark.parametrize("fail", ["enqueue", "end"])
def test_a_failed_capture_ends_capturing_and_runs_the_step(fail: str) -> None:
    stream = Recorder(fail=fail)
    step = CapturedStep(stream, stream.enqueue)
    for _ in range(3):
        step.run()
    assert step.state == "eager"
    assert step.reason in ("not capturable", "no")
    assert stream.calls == ["step", "begin", "step", "end", "step", "step"]


def test_a_first_step_that_fails_is_not_captured_next() -> None:
    def fail() -> None:
        raise RerouteError("refused")

    step = CapturedStep(Recorder(), fail)
    for _ in range(2):
        with pytest.raises(RerouteError, match="refused"):
            step.run()
        assert step.state == "cold"


def test_host_views_stay_inside_their_memory(fake: Any) -> None:
    del fake
    cuda = Cuda()
    host = cuda.allocate_host(256)
    view = host.array(0, np.dtype(np.float32), (8, 8))
    view[:] = 3
    assert host.array(128, np.dtype(np.float32), (1,))[0] == 3
    with pytest.raises(ValueError, match="in 256 bytes"):
        host.array(4, np.dtype(np.float32), (8, 8))
    with pytest.raises(ValueError, match="no view"):
        cuda.allocate(256).array(0, np.dtype(np.float32), (1,))


@pytest.mark.parametrize("greedy", [(3, float("nan")), (3, float("-inf"))])
def test_a_choice_of_the_engine_without_a_probability_is_an_error(greedy: tuple[int, float]) -> None:
    outputs = StepOutputs(logits=np.zeros((1, 5), np.float32), routes=(), greedy=greedy)
    with pytest.raises(FloatingPointError):
        Sampler(Sampling()).choose(outputs)


def test_sampling_reads_the_logits_and_greedy_does_not() -> None:
    outputs = StepOutputs(logits=np.asarray([[0, 9, 0, 0]], np.float32), routes=(), greedy=(2, -0.5))
    assert Sampler(Sampling()).choose(outputs) == (2, -0.5)
    assert Sampler(Sampling(temperature=0.1, seed=0)).choose(outputs)[0] == 1
