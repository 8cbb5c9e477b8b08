from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from reroute.errors import UserError
from reroute.runtime.bundle import Bundle
from reroute.runtime.positions import Positions
from reroute.runtime.sampling import Sampling
from reroute.runtime.session import Session
from tests.runtime import fakes
from tests.runtime.fakes import BOS, EOS, IMAGE, VISUAL, FakeBackend

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
ID = {word: index for index, word in enumerate((*fakes.SPECIAL, *fakes.WORDS))}


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def fed(backend: FakeBackend) -> list[list[int]]:
    """Token ids of each step."""
    return [step.input_ids[0].tolist() for step in backend.steps]


@pytest.fixture
def open_session(make_bundle: Callable[..., Bundle]) -> Callable[..., tuple[Session, FakeBackend]]:
    def make(script: str = "", **options: object) -> tuple[Session, FakeBackend]:
        bundle = make_bundle(**options)
        backend = FakeBackend(bundle.manifest, ids(script))
        return Session(bundle, backend), backend

    return make


def test_a_question_with_an_image(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = open_session("here there </s>")
    answer = session.ask("where is the cat ?", PICTURE)
    assert answer.text == "here there"
    assert answer.token_ids == (*ids("here there"), EOS)
    assert answer.stop_reason == "eos"
    prompt = [BOS, *ids("USER: where is the cat ? ASSISTANT:")]
    assert fed(backend) == [prompt, ids("here"), ids("there")]
    assert backend.steps[0].visual_slots.tolist() == list(range(2, 2 + VISUAL))
    assert (answer.prompt_tokens, answer.visual_tokens) == (len(prompt), VISUAL)
    assert answer.timings.prefill_tokens == len(prompt) + VISUAL
    assert answer.timings.decode_tokens == 2
    assert answer.timings.decode_tokens_per_s > 0
    text = len(prompt) + 2
    assert backend.lengths.tolist() == [text + VISUAL, text + 5, text + 3]


def test_routes_are_visual_indices(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, _ = open_session("here </s>")
    answer = session.ask("where ?", PICTURE)
    assert [route.tolist() for route in answer.routes] == [[0, 1, 2, 3, 4], [0, 2, 4]]
    assert all(route.dtype == np.int64 for route in answer.routes)


def test_routes_of_text_and_of_dense(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, _ = open_session("here </s>")
    assert [route.tolist() for route in session.ask("where ?").routes] == [[], []]


def test_dense_has_no_routes(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = open_session("here </s>", routing="dense")
    assert session.ask("where ?", PICTURE).routes == ()
    assert backend.lengths.tolist() == [6 + VISUAL]


def test_positions_count_deferred_tokens(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, backend = open_session("here there </s> now </s>")
    session.ask("where is the cat ?", PICTURE)
    first = 8 + VISUAL + 1  # 9 text rows in front of the first decode step's position
    table = Positions(session.manifest).rotary
    np.testing.assert_array_equal(backend.steps[1].rope_cos, table.cos[first - 1 + 0 : first])
    np.testing.assert_array_equal(backend.steps[2].rope_cos, table.cos[first : first + 1])
    session.ask("the dog ?")
    count = len(backend.steps[3].input_ids[0])
    np.testing.assert_array_equal(backend.steps[3].rope_sin, table.sin[first + 1 : first + 1 + count])


class TestTurns:
    def test_after_eos_the_template_writes_the_end(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here </s> there </s>")
        session.ask("where ?", PICTURE)
        session.ask("the dog ?")
        # The sampled eos itself was never run; the tail brings it, once, and no second beginning.
        assert fed(backend)[2] == [EOS, *ids("USER: the dog ? ASSISTANT:")]
        assert len(backend.steps[2].visual_slots) == 0

    def test_a_cut_answers_last_token_is_run_first(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here there now </s>")
        answer = session.ask("where ?", PICTURE, max_new_tokens=2)
        assert (answer.text, answer.stop_reason) == ("here there", "length")
        assert fed(backend)[1:] == [ids("here")]
        session.ask("the dog ?")
        assert fed(backend)[2] == [ID["there"], EOS, *ids("USER: the dog ? ASSISTANT:")]

    def test_a_sampled_placeholder_is_an_ordinary_token(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here <image> a")
        session.ask("where ?", max_new_tokens=2)
        session.ask("the dog ?", max_new_tokens=1)
        assert fed(backend)[2] == [IMAGE, EOS, *ids("USER: the dog ? ASSISTANT:")]
        assert len(backend.steps[2].visual_slots) == 0

    def test_the_whole_dialogue_is_fed_once_and_in_order(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here there now </s> a cat a </s>", max_text=60)
        session.ask("where ?", PICTURE, max_new_tokens=3)
        session.ask("the dog ?")
        session.ask("the cat ?")
        everything = [token for step in fed(backend) for token in step]
        expected = "USER: where ? ASSISTANT: here there now </s> USER: the dog ? ASSISTANT: </s> USER: the cat ?"
        expected += " ASSISTANT: a cat a"
        # The second answer was an eos at once: nothing of it but what the template writes.
        assert everything == [BOS, *ids(expected)]

    def test_a_new_image_in_a_later_turn(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("here </s> there </s>")
        session.ask("where ?")
        answer = session.ask("the dog ?", [PICTURE])
        assert len(backend.encoded) == 1
        assert backend.steps[2].visual_slots.tolist() == list(range(2, 2 + VISUAL))  # </s> USER: <image>
        assert answer.visual_tokens == VISUAL
        assert [len(route) for route in answer.routes] == [5, 3]

    def test_two_images_in_one_turn(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("here </s>")
        answer = session.ask("where ?", (PICTURE, np.zeros((9, 9, 3), np.uint8)))
        assert answer.visual_tokens == 2 * VISUAL
        assert backend.encoded[0].shape == (2, 3, 32, 32)
        assert [len(route) for route in answer.routes] == [5, 3]

    def test_reset_starts_again(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("here there", max_text=40)
        session.ask("where ?", PICTURE, max_new_tokens=1)
        session.reset()
        assert backend.lengths.tolist() == [0, 0, 0]
        assert session.cache_bytes_used == 0
        session.ask("where ?", max_new_tokens=1)
        assert fed(backend)[1] == [BOS, *ids("USER: where ? ASSISTANT:")]

    def test_an_abandoned_stream_is_the_answer_so_far(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here there now </s>")
        for token in session.stream("where ?"):
            if token.text.strip() == "there":
                break
        session.ask("the dog ?")
        assert fed(backend)[1:3] == [ids("here"), [ID["there"], EOS, *ids("USER: the dog ? ASSISTANT:")]]

    def test_a_stream_of_an_earlier_state_refuses_to_go_on(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here there now </s> a a a")
        made, begun = session.stream("where ?"), session.stream("where ?")
        next(begun)
        with pytest.raises(RuntimeError, match="another question"):
            next(made)
        session.reset()
        with pytest.raises(RuntimeError, match="reset"):
            next(begun)
        assert backend.lengths.tolist() == [0, 0, 0]


class TestErrors:
    def test_a_failed_prompt_changes_nothing(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("here there now </s>")
        session.ask("where ?", PICTURE, max_new_tokens=1)
        before = backend.lengths.tolist()
        backend.fail = True
        with pytest.raises(RuntimeError, match="the engine failed"):
            session.ask("the dog ?")
        backend.fail = False
        assert backend.lengths.tolist() == before
        session.ask("the cat ?")
        assert fed(backend)[1] == [ID["here"], EOS, *ids("USER: the cat ? ASSISTANT:")]

    def test_a_failed_first_prompt_is_followed_by_a_first_prompt(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here </s>")
        backend.fail = True
        with pytest.raises(RuntimeError):
            session.ask("where ?")
        backend.fail = False
        session.ask("where ?")
        assert fed(backend)[0][0] == BOS

    def test_a_failed_decode_step_keeps_its_token_pending(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("here there now </s>")
        stream = session.stream("where ?")
        next(stream)
        backend.fail = True
        with pytest.raises(RuntimeError):
            next(stream)
        with pytest.raises(RuntimeError):
            _ = stream.answer
        backend.fail = False
        session.ask("the dog ?")
        assert fed(backend)[1] == [ID["here"], EOS, *ids("USER: the dog ? ASSISTANT:")]

    def test_a_placeholder_in_the_question(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session()
        with pytest.raises(UserError, match="2 <image> placeholders, but 1 images"):
            session.stream("where <image> ?", PICTURE)
        assert not backend.steps

    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_an_empty_question(self, open_session: Callable[..., tuple[Session, FakeBackend]], prompt: str) -> None:
        session, _ = open_session("here")
        with pytest.raises(UserError, match="empty"):
            session.ask(prompt)
        assert session.ask(prompt, PICTURE, max_new_tokens=1).text == "here"

    def test_a_bad_image_before_anything_runs(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session()
        with pytest.raises(UserError, match="no image"):
            session.stream("where ?", "missing.png")
        assert not backend.encoded

    @pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"stop": ("",)}])
    def test_bad_options(
        self, open_session: Callable[..., tuple[Session, FakeBackend]], options: dict[str, object]
    ) -> None:
        session, _ = open_session()
        with pytest.raises(UserError):
            session.stream("where ?", **options)  # type: ignore[arg-type]

    def test_a_closed_session(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, _ = open_session()
        with session:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            session.ask("where ?")


class TestCapacity:
    def test_a_prompt_that_does_not_fit_names_both_numbers(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session(max_text=10, max_images=1)
        with pytest.raises(UserError, match="needs 15 cache rows in stage 2; 13 of 13") as caught:
            session.stream("where " * 12)
        assert "--max-text" in caught.value.hint
        assert not backend.steps

    def test_images_beyond_the_capacity(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session(max_text=10, max_images=1)
        with pytest.raises(UserError, match=r"5 text and 32 visual tokens.* 37 cache rows in stage 0; 26 of 26"):
            session.ask("where ?", [PICTURE, PICTURE])
        assert not backend.encoded

    def test_the_answer_is_clipped_to_the_room(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("a " * 50, max_text=10, max_images=1)
        answer = session.ask("where ?", PICTURE, max_new_tokens=50)
        assert answer.stop_reason == "length"
        # 5 rows are left after the prompt, and the last token of an answer needs none.
        assert len(answer.token_ids) == 6
        assert backend.lengths.tolist() == list(session.manifest.cache_rows)
        with pytest.raises(UserError, match="0 of 26 are left"):
            session.ask("the dog ?")
        session.reset()
        assert session.ask("the dog ?", max_new_tokens=1).text == "a"

    def test_a_prompt_that_just_fits(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, _ = open_session("a a a", max_text=5, max_images=1)
        answer = session.ask("where ?", PICTURE)
        assert (len(answer.token_ids), answer.stop_reason) == (1, "length")

    def test_bytes(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, backend = open_session("here </s>")
        row = 2 * fakes.KV_HEADS * fakes.HEAD_DIM * 4
        assert session.cache_bytes == 2 * row * sum(session.manifest.cache_rows)
        session.ask("where ?", PICTURE)
        assert session.cache_bytes_used == 2 * row * int(backend.lengths.sum())


class TestStreaming:
    def test_pieces_join_to_the_answer(self, open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
        session, _ = open_session("the cat is here </s>")
        stream = session.stream("where ?")
        tokens = list(stream)
        assert [token.text for token in tokens] == ["the", " cat", " is", " here", ""]
        assert "".join(token.text for token in tokens) == stream.answer.text
        assert tuple(token.id for token in tokens) == stream.answer.token_ids
        assert all(-0.1 < token.logprob <= 0 for token in tokens)

    def test_a_stop_string_ends_the_answer_in_front_of_it(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, backend = open_session("the cat stop now here </s>")
        answer = session.ask("where ?", stop=["stop now"])
        assert (answer.text, answer.stop_reason) == ("the cat ", "stop")
        assert answer.token_ids == tuple(ids("the cat stop now"))
        session.ask("the dog ?")
        assert fed(backend)[-2][:2] == [ID["now"], EOS]

    def test_text_held_for_a_stop_string_comes_at_the_end(
        self, open_session: Callable[..., tuple[Session, FakeBackend]]
    ) -> None:
        session, _ = open_session("the stop </s> the stop now")
        assert session.ask("where ?", stop="stop now").text == "the stop"
        assert session.ask("where ?", stop=("stop now",), max_new_tokens=2).text == "the stop"

    def test_byte_level_characters_are_whole(self, make_bundle: Callable[..., Bundle]) -> None:
        tokenizer = fakes.byte_tokenizer()
        bundle = make_bundle(tokenizer=tokenizer, max_text=200)
        script = tokenizer.encode("a🦊b", add_special_tokens=False).ids
        session = Session(bundle, FakeBackend(bundle.manifest, script))
        pieces = [token.text for token in session.stream("where ?", max_new_tokens=len(script))]
        assert "".join(pieces) == "a🦊b"
        assert all(piece in ("", "a", "🦊", "b") for piece in pieces)


def test_seeds(open_session: Callable[..., tuple[Session, FakeBackend]]) -> None:
    session, _ = open_session()

    def sample(seed: int) -> tuple[int, ...]:
        session.reset()
        return session.ask("where ?", max_new_tokens=12, sampling=Sampling(temperature=2.0, seed=seed)).token_ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_placeholders_never_reach_the_engine(
    open_session: Callable[..., tuple[Session, FakeBackend]],
) -> None:
    session, backend = open_session("here </s>")
    session.ask("where ?", PICTURE)
    assert all(IMAGE not in step for step in fed(backend))
