"""The runtime on real engines: a tiny random model against transformers, the demo model as a user runs it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute.runtime import Session, route_picture
from reroute.runtime.backend import BackendOptions, open_backend
from reroute.runtime.bundle import Bundle
from reroute.runtime.layout import StepInputs
from reroute.runtime.overlay import parse_box
from reroute.runtime.positions import Positions

pytest.importorskip("onnxruntime")
rng = np.random.default_rng(0)
PICTURES = [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(2)]
QUESTIONS = ("where is the red circle ?", "how many stars are there ?", "is there a blue square ?")


@pytest.fixture(scope="session")
def tiny_dense(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reroute.engines import build
    from reroute.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tiny-dense")
    export_checkpoint(tiny_checkpoint, folder / "export", routing="dense")
    build(folder / "export", folder / "bundle", check=False)
    return folder / "bundle"


class Reference:
    """transformers' own greedy generation of a whole conversation, from text and images alone."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.torch = torch
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.images = AutoProcessor.from_pretrained(checkpoint).image_processor

    def logits(self, ids: list[int], pictures: list[Image.Image], *, image: int, tokens: int) -> np.ndarray:
        """Logits [S, V] of token ids with one placeholder per image."""
        expanded = [i for token in ids for i in ([token] * tokens if token == image else [token])]
        pixels = self.images(pictures, return_tensors="pt")["pixel_values"] if pictures else None
        with self.torch.no_grad():
            out = self.model(input_ids=self.torch.tensor([expanded]), pixel_values=pixels)
        return out.logits[0].numpy()


def test_a_dense_dialogue_gives_transformers_logits(tiny_dense: Path, tiny_checkpoint: Path) -> None:
    """Three turns, the second with a new image: every token is greedy under one forward of everything."""
    reference = Reference(tiny_checkpoint)
    with Session.open(tiny_dense, threads=1) as session:
        tokens = session.manifest.model.tokens
        chat = session.bundle.chat()
        from reroute.runtime.chat import assistant_message, user_message

        history: list[int] = []
        talk = []
        shown: list[Image.Image] = []
        images = ([PICTURES[0]], [PICTURES[1]], [])
        for question, pictures in zip(QUESTIONS, images, strict=True):
            talk.append(user_message(question, num_images=len(pictures)))
            shown += pictures
            history += chat.next_turn(talk) if len(talk) > 1 else chat.first_turn(talk)
            stream = session.stream(question, pictures, max_new_tokens=6)
            found = list(stream)
            ids = [*history, *(token.id for token in found)]
            logits = reference.logits(
                ids,
                shown,
                image=tokens.image_token_id,
                tokens=session.manifest.model.vision.tokens_per_image,
            )[-len(found) - 1 : -1].astype(np.float64)
            assert [token.id for token in found] == logits.argmax(axis=1).tolist()
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = logprobs[np.arange(len(found)), [token.id for token in found]]
            np.testing.assert_allclose([token.logprob for token in found], expected, atol=1e-4)
            history = ids[:-1] if stream.answer.stop_reason == "eos" else ids
            talk.append(assistant_message(stream.answer.text))


@pytest.mark.parametrize("bundle_of", ["tiny_bundle", "tiny_dense"])
def test_a_dialogue_repeats_after_reset(bundle_of: str, request: pytest.FixtureRequest) -> None:
    with Session.open(request.getfixturevalue(bundle_of), threads=1) as session:

        def talk() -> list[tuple[int, ...]]:
            session.reset()
            first = session.ask(QUESTIONS[0], PICTURES[0], max_new_tokens=5)
            second = session.ask(QUESTIONS[1], max_new_tokens=5)
            third = session.ask(QUESTIONS[2], PICTURES[1], max_new_tokens=5)
            return [answer.token_ids for answer in (first, second, third)]

        assert talk() == talk()


def test_routes_and_rows_follow_the_schedule(tiny_bundle: Path) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        answer = session.ask(QUESTIONS[0], PICTURES[0], max_new_tokens=4)
        visual = session.manifest.model.vision.tokens_per_image
        budgets = session.manifest.schedule.budgets
        assert [len(route) for route in answer.routes] == list(budgets)
        for route in answer.routes:
            assert (np.diff(route) > 0).all()
            assert route.min() >= 0
            assert route.max() < visual
        text = answer.prompt_tokens + len(answer.token_ids) - 1
        assert session.backend.lengths.tolist() == [text + visual, *(text + budget for budget in budgets)]
        row = 2 * session.manifest.model.text.num_kv_heads * session.manifest.model.text.head_dim * 4
        layers = [stage.num_layers for stage in session.manifest.schedule.stages]
        assert session.cache_bytes == row * int(np.dot(layers, session.manifest.cache_rows))
        assert session.cache_bytes_used == row * int(np.dot(layers, session.backend.lengths))


def step_of(session: Session, ids: list[int]) -> StepInputs:
    from reroute.runtime.layout import lay_out

    layout = lay_out(ids, image_token="<image>", image_token_id=4, num_images=0, tokens_per_image=36)
    return Positions(session.manifest).inputs(layout, None, session.backend.lengths)


def test_one_prompt_equals_token_by_token(tiny_bundle: Path) -> None:
    """The two bindings (prompt and single token) must give the same rows and the same logits."""
    ids = [1, 5, 30, 40, 50, 60]
    with Session.open(tiny_bundle, threads=1) as session:
        backend = session.backend
        whole = backend.step(step_of(session, ids)).logits.copy()
        caches = [[array.copy() for array in backend.cache(layer)] for layer in range(6)]
        backend.reset()
        for token in ids[:-1]:
            backend.step(step_of(session, [token]))
        last = backend.step(step_of(session, ids[-1:])).logits
        np.testing.assert_allclose(last, whole, atol=1e-4)
        for layer, pair in enumerate(caches):
            for expected, found in zip(pair, backend.cache(layer), strict=True):
                assert found.shape == (1, 2, len(ids), 16)
                np.testing.assert_allclose(found, expected, atol=1e-4)


def test_cache_is_a_view_that_grows_in_place(tiny_bundle: Path) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        backend = session.backend
        backend.step(step_of(session, [1, 5, 30]))
        key, _ = backend.cache(0)
        before, address = key.copy(), key.ctypes.data
        backend.step(step_of(session, [40]))
        grown, _ = backend.cache(0)
        assert grown.ctypes.data == address
        assert grown.shape[2] == 4
        np.testing.assert_array_equal(grown[:, :, :3], before)
        assert np.abs(grown[:, :, 3]).max() > 0


def test_a_step_beyond_the_capacity_changes_nothing(tiny_bundle: Path) -> None:
    with Session.open(tiny_bundle, threads=1) as session:
        backend = session.backend
        backend.step(step_of(session, [1, 5]))
        room = min(session.manifest.cache_rows) - 2
        with pytest.raises(ValueError, match="cache rows"):
            backend.step(step_of(session, [5] * (room + 1)))
        assert set(backend.lengths.tolist()) == {2}


def test_options_reach_the_engine(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    described = open_backend(bundle, BackendOptions(threads=1)).describe()
    assert described["threads"] == "1"
    assert described["spinning"] == "within a run"
    assert described["provider"] == "CPUExecutionProvider"
    assert open_backend(bundle, BackendOptions(spinning=True)).describe()["spinning"] == "always"


def test_batch_rows_are_independent(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with Session.open(tiny_bundle, threads=1) as session:
        steps = [step_of(session, ids) for ids in ([1, 5, 30], [1, 60, 9])]
        single = []
        for step in steps:
            session.reset()
            single.append(session.backend.step(step).logits.copy())
    both = open_backend(bundle, BackendOptions(threads=1, batch=2))
    pair = StepInputs(
        **{
            **vars(steps[0]),
            "input_ids": np.concatenate([step.input_ids for step in steps]),
            "visual_embeds": np.zeros((2, 0, bundle.manifest.model.text.hidden_size), np.float32),
        }
    )
    np.testing.assert_allclose(both.step(pair).logits, np.concatenate(single), atol=1e-5)


def test_the_demo_answers_and_draws(demo_bundle: Path) -> None:
    image = Image.new("RGB", (384, 384), (244, 244, 240))
    image.paste((214, 40, 40), (60, 80, 160, 180))
    with Session.open(demo_bundle) as session:
        answer = session.ask("where is the red square ?", image, max_new_tokens=8)
        assert answer.visual_tokens == 576
        assert [len(route) for route in answer.routes] == list(session.manifest.schedule.budgets)
        assert answer.timings.vision_ms > 0
        assert answer.timings.prefill_ms > 0
        picture = route_picture(image, answer, session.manifest)
        assert picture.size[0] >= 1000
        box = parse_box(answer.text)
        assert box is None or all(0 <= value <= 1 for value in box)
        assert session.ask("how many squares are there ?", max_new_tokens=4).prompt_tokens < 20
