"""Saved prefixes: what is run of a system text, what a dialogue that starts from it runs, and the file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reroute import scenario
from reroute.errors import UserError
from reroute.manifest import Manifest, file_table
from reroute.runtime import Prefix, Session
from reroute.runtime.bundle import Bundle
from reroute.runtime.chat import Chat, system_message, user_message
from reroute.runtime.layout import Layout, lay_out
from reroute.runtime.ort import OrtBackend
from reroute.runtime.positions import Positions
from tests.conftest import DEMO_MODEL
from tests.runtime import fakes
from tests.runtime.fakes import BOS, VISUAL, FakeBackend
from tests.runtime.test_chat import LLAVA, TOKENS

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
ID = {word: index for index, word in enumerate((*fakes.SPECIAL, *fakes.WORDS))}
SYSTEM = "the cat is here"
Opened = Callable[..., tuple[Session, FakeBackend]]


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def fed(backend: FakeBackend) -> list[list[int]]:
    return [step.input_ids[0].tolist() for step in backend.steps]


@pytest.fixture
def opened(make_bundle: Callable[..., Bundle]) -> Opened:
    def make(script: str = "", **options: object) -> tuple[Session, FakeBackend]:
        bundle = make_bundle(**{"template": LLAVA, **options})
        backend = FakeBackend(bundle.manifest, ids(script))
        return Session(bundle, backend), backend

    return make


@pytest.fixture(scope="module")
def system_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with a chat template that has a system role. Do not change it."""
    return with_template(tiny_bundle, tmp_path_factory.mktemp("system") / "bundle", LLAVA)


def with_template(bundle: Path, copy: Path, template: str) -> Path:
    shutil.copytree(bundle, copy)
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    dataclasses.replace(Manifest.load(copy), files=file_table(copy)).save(copy)
    return copy


class TestTemplate:
    @pytest.mark.parametrize(
        ("template", "says"),
        [
            ((DEMO_MODEL / "chat_template.jinja").read_text(encoding="utf-8"), "as if it were an answer"),
            (
                "{% for m in messages if m['role'] != 'system' %}{{ m['content'][-1]['text'] }}{% endfor %}A:",
                "leaves a system text out",
            ),
            ("{% for m in messages %}U: {{ m['content'][-1]['text'] }}{% endfor %}A:", "as if it were a question"),
            (
                "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}A:",
                "takes no system text: .*no system",
            ),
        ],
        ids=["demo", "left out", "question", "raises"],
    )
    def test_a_template_without_a_system_role_is_refused(self, template: str, says: str) -> None:
        chat = Chat(template, fakes.word_tokenizer(), TOKENS)
        with pytest.raises(UserError, match=says) as caught:
            chat.system_prefix("the cat")
        assert "first question" in caught.value.hint

    def test_a_system_text_behind_the_question_is_no_prefix(self) -> None:
        template = "{% for m in messages | reverse %}{{ m['role'] + ' ' + m['content'][-1]['text'] }} {% endfor %}A:"
        chat = Chat(template, fakes.word_tokenizer(), TOKENS)
        chat.require_system("the cat")
        with pytest.raises(UserError, match="behind the start of the question"):
            chat.system_prefix("the cat")

    @pytest.mark.parametrize("template", [fakes.TEMPLATE, LLAVA], ids=["eos", "llava"])
    @pytest.mark.parametrize("kind", ["word", "sentence", "byte"])
    def test_every_prompt_starts_with_it(self, template: str, kind: str) -> None:
        tokenizer = getattr(fakes, f"{kind}_tokenizer")()
        chat = Chat(template, tokenizer, TOKENS)
        prefix, cut = chat.system_prefix("the red cat is here")
        assert prefix[0] == BOS
        assert tokenizer.decode(prefix).strip().startswith(("the red cat is here", "SYSTEM: the red", "the cat is"))
        for question in ("where ?", "is the red cat", "?", "9", "ab", "\u732b"):
            for images in (0, 1, 2):
                prompt = chat.first_turn(
                    [system_message("the red cat is here"), user_message(question, num_images=images)]
                )
                assert prompt[: len(prefix)] == prefix
                assert len(prompt) > len(prefix)
        # The space behind "USER:" belongs to the question's first word, except where spaces are no tokens.
        assert cut == (0 if kind == "word" else 1)

    def test_system_texts_render_as_in_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=fakes.word_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=LLAVA
        )
        talk = [system_message("the cat"), user_message("where ?", num_images=1)]
        expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert Chat(LLAVA, fakes.word_tokenizer(), TOKENS).render(talk) == expected


class TestSession:
    def test_the_first_turn_runs_only_what_comes_after(self, opened: Opened) -> None:
        session, backend = opened("a here </s> there </s> now </s>", max_text=60)
        prefix = session.prefix(SYSTEM)
        assert fed(backend) == [[BOS, *ids(SYSTEM), ID["USER:"]]]
        assert backend.lengths.tolist() == [0, 0, 0]
        session.reset(prefix=prefix)
        assert len(backend.steps) == 1
        first = session.ask("where ?", PICTURE)
        second = session.ask("the dog ?")
        assert fed(backend)[1] == ids("where ? ASSISTANT:")
        assert fed(backend)[3] == ids("USER: the dog ? ASSISTANT:")  # LLaVA's template has no end token
        assert (first.prefix_tokens, first.prompt_tokens) == (6, 3)
        assert first.timings.prefill_tokens == 3 + VISUAL
        assert second.prefix_tokens == 0
        session.reset(prefix=prefix)
        assert session.ask("where ?").prefix_tokens == 6
        assert backend.loads == 2
        session.reset()
        backend.script = ids("here")
        assert session.ask("where ?", max_new_tokens=1).prefix_tokens == 0
        assert fed(backend)[-1] == [BOS, *ids("USER: where ? ASSISTANT:")]

    def test_rows_are_those_of_one_prompt_where_nothing_is_routed(self, opened: Opened) -> None:
        session, backend = opened(routing="dense")
        session.reset(system=SYSTEM)
        whole = session.ask("where ?", PICTURE, max_new_tokens=3)
        rows = backend.rows
        prefix = session.prefix(SYSTEM)
        session.reset(prefix=prefix)
        behind = session.ask("where ?", PICTURE, max_new_tokens=3)
        assert backend.rows == rows
        assert behind.token_ids == whole.token_ids
        assert whole.prefix_tokens == 0
        assert whole.prompt_tokens == behind.prompt_tokens + behind.prefix_tokens

    def test_positions_go_on_behind_it(self, opened: Opened) -> None:
        session, backend = opened("a here </s>")
        session.reset(prefix=session.prefix(SYSTEM))
        session.ask("where ?")
        table = Positions(session.manifest).rotary
        np.testing.assert_array_equal(backend.steps[1].rope_cos, table.cos[6:9])

    def test_a_failed_first_turn_leaves_the_prefix(self, opened: Opened) -> None:
        session, backend = opened("a here </s>")
        session.reset(prefix=session.prefix(SYSTEM))
        backend.fail = True
        with pytest.raises(RuntimeError):
            session.ask("where ?")
        backend.fail = False
        assert session.ask("where ?").prefix_tokens == 6

    def test_a_failed_prefix_leaves_empty_caches(self, opened: Opened) -> None:
        session, backend = opened("here </s>")
        backend.fail = True
        with pytest.raises(RuntimeError):
            session.prefix(SYSTEM)
        backend.fail = False
        assert backend.lengths.tolist() == [0, 0, 0]
        session.ask("where ?")
        assert fed(backend)[0] == [BOS, *ids("USER: where ? ASSISTANT:")]

    def test_it_can_be_one_token(self, opened: Opened) -> None:
        template = "{% for m in messages %}{{ m['content'][-1]['text'] + (' ' if m['role'] == 'system' else '?') }}"
        template += "{% endfor %} ASSISTANT:"
        session, backend = opened("a here </s>", template=template, tokenizer=_without_bos())
        prefix = session.prefix("cat")
        assert len(prefix.token_ids) == 1
        session.reset(prefix=prefix)
        assert session.ask("dog").prefix_tokens == 1
        assert backend.lengths.tolist() == [4, 4, 4]

    @pytest.mark.parametrize(
        ("system", "says"),
        [
            (" \n", "empty"),
            ("the \ud800 cat", "system text is not valid UTF-8"),
            ("the <image> cat", "holds <image>, but a prefix is text only"),
            ("cat " * 60, r"needs 62 cache rows in stage 1; 50 of 50"),
        ],
        ids=["empty", "bytes", "image", "long"],
    )
    def test_what_cannot_be_a_prefix(self, opened: Opened, system: str, says: str) -> None:
        session, backend = opened()
        with pytest.raises(UserError, match=says):
            session.prefix(system)
        assert not backend.steps

    def test_a_prefix_of_another_engine_is_refused_and_changes_nothing(self, opened: Opened) -> None:
        session, _ = opened()
        prefix = session.prefix(SYSTEM)
        for options in ({"routing": "reroute@2,4:keep=5,4"}, {"routing": "dense"}):
            other, backend = opened("here </s>", **options)
            other.ask("where ?")
            before = backend.lengths.tolist()
            with pytest.raises(UserError, match=f"another engine .{prefix.decoder_sha256[:12]}"):
                other.reset(prefix=prefix)
            assert backend.lengths.tolist() == before
        same, _ = opened(template=fakes.TEMPLATE.replace("upper", "lower"))
        same.reset(prefix=prefix)
        with pytest.raises(UserError, match=r"part at token 1: \[\d+, \d+, \d+\] and \[\d+, \d+, \d+\]"):
            same.ask("where ?")
        with pytest.raises(UserError, match="own system text"):
            session.reset(prefix=prefix, system=SYSTEM)

    def test_rows_that_do_not_fit_are_refused_and_leave_an_empty_dialogue(self, opened: Opened) -> None:
        session, backend = opened("a here </s>")
        prefix = session.prefix(SYSTEM)
        session.ask("where ?")
        key, value = prefix.caches[3]
        for wrong in (
            {"caches": prefix.caches[:-1]},
            {"caches": (*prefix.caches[:3], (key[:, :, :-1], value), *prefix.caches[4:])},
            {"caches": (*prefix.caches[:3], (key.astype(np.float16), value), *prefix.caches[4:])},
            {"lengths": prefix.lengths + 100},
            {"lengths": prefix.lengths[:-1]},
        ):
            with pytest.raises(UserError, match="does not fit the engine's caches"):
                session.reset(prefix=dataclasses.replace(prefix, **wrong))
            assert backend.lengths.tolist() == [0, 0, 0]
        backend.script = ids("here")
        assert session.ask("where ?", max_new_tokens=1).prefix_tokens == 0


def _without_bos() -> Tokenizer:
    tokenizer = fakes.word_tokenizer()
    tokenizer.post_processor = None  # type: ignore[assignment]
    return tokenizer


def test_a_question_that_the_tokenizer_joins_with_the_prefix_is_named(opened: Opened) -> None:
    """The probes start with none of the letters that are joined here, so only the question itself shows it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(fakes.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["red red red red"], trainer)
    template = "{% for m in messages %}{{ 'S:' if m['role'] == 'system' }}{{ m['content'][-1]['text'] }}{% endfor %}."
    session, backend = opened(template=template, tokenizer=tokenizer)
    prefix = session.prefix("re")
    session.reset(prefix=prefix)
    with pytest.raises(UserError, match=r"part at token \d: .* and ") as caught:
        session.ask("d cat")
    assert "reset(system=...)" in caught.value.hint
    assert session.ask("cat", max_new_tokens=1).prefix_tokens == len(prefix.token_ids)
    session.reset(system="re")
    assert session.ask("d cat", max_new_tokens=1).prefix_tokens == 0
    assert backend.steps[-1].input_ids[0].tolist() == tokenizer.encode("S:red cat.").ids


class TestFile:
    @pytest.fixture
    def prefix(self, opened: Opened) -> Prefix:
        return opened()[0].prefix("the cat")

    def test_it_comes_back_as_it_was(self, prefix: Prefix, tmp_path: Path) -> None:
        prefix.save(tmp_path / "new" / "a.npz")
        prefix.save(tmp_path / "b.npz")
        assert (tmp_path / "new" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        again = Prefix.load(tmp_path / "b.npz")
        for name in ("system", "token_ids", "cut", "shift", "decoder_sha256"):
            assert getattr(again, name) == getattr(prefix, name)
        np.testing.assert_array_equal(again.lengths, prefix.lengths)
        for mine, theirs in zip(prefix.caches, again.caches, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one, other)
                assert not other.flags.writeable
        assert again.nbytes == prefix.nbytes == 6 * 2 * fakes.KV_HEADS * fakes.HEAD_DIM * 4 * len(prefix.token_ids)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"header": None}, "is not a saved prefix"),
            ({"header": np.frombuffer(b"{", np.uint8)}, "is not a saved prefix"),
            ({"header": {"format": "other"}}, "is not a saved prefix"),
            ({"header": {"schema_version": 2}}, "schema version 2, this Reroute reads version 1"),
            ({"header": {"cut": "none"}}, "cut is 'none', expected int"),
            ({"header": {"more": 1}}, "unknown key 'more'"),
            ({"token_ids": None}, "not those of a prefix"),
            ({"token_ids": np.zeros((2, 2), np.int64)}, r"int64 \[2, 2\], not int64"),
            ({"lengths": np.asarray([4, 4, 3], np.int32)}, r"4 tokens, but \[4, 4, 3\] cache rows"),
            ({"cache.5.value": None}, "not those of a prefix"),
            ({"cache.5.value": np.zeros((1, 2, 3, 4), np.float32)}, "differ in shape or dtype"),
        ],
    )
    def test_a_file_that_is_not_one(self, prefix: Prefix, tmp_path: Path, change: dict[str, object], says: str) -> None:
        path = tmp_path / "prefix.npz"
        prefix.save(path)
        arrays = scenario.load(path)
        for name, value in change.items():
            if value is None:
                del arrays[name]
            elif isinstance(value, dict):
                header = json.loads(arrays[name].tobytes()) | value
                arrays[name] = np.frombuffer(json.dumps(header).encode(), np.uint8)
            else:
                arrays[name] = np.asarray(value)
        scenario.save(path, arrays)
        with pytest.raises(UserError, match=says) as caught:
            Prefix.load(path)
        assert "prefix" in caught.value.hint

    def test_damaged_missing_and_pickled_files(self, prefix: Prefix, tmp_path: Path) -> None:
        path = tmp_path / "prefix.npz"
        with pytest.raises(UserError, match="there is no prefix"):
            Prefix.load(path)
        prefix.save(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=r"cannot read prefix\.npz"):
            Prefix.load(path)
        changed = bytearray(data)
        changed[data.index(prefix.caches[0][0].tobytes()) + 9] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"cannot read prefix\.npz: .*CRC"):
            Prefix.load(path)
        np.savez(path, header=np.asarray([{}], dtype=object))
        with pytest.raises(UserError, match="allow_pickle"):
            Prefix.load(path)


class TestEngine:
    def test_caches_equal_running_prefix_and_turn_as_two_steps(self, system_bundle: Path, tmp_path: Path) -> None:
        """Bit for bit, also through a file and in another process's session; and the answer goes on from there."""
        question = "where is the red circle ?"
        with Session.open(system_bundle, threads=1) as session:
            prefix = session.prefix("is there a blue square ?")
            prefix.save(tmp_path / "prefix.npz")
            arrays = [array for pair in prefix.caches for array in pair]
            assert all(array.flags.owndata and array.flags.c_contiguous for array in arrays)
            features = session.encode(PICTURE)
            backend, positions, tokens = session.backend, session._positions, session.manifest.model.tokens
            ids = session._chat.first_turn(
                [system_message("is there a blue square ?"), user_message(question, num_images=1)]
            )
            rest = lay_out(
                ids[len(prefix.token_ids) :],
                image_token=tokens.image_token,
                image_token_id=tokens.image_token_id,
                num_images=1,
                tokens_per_image=36,
            )
            backend.step(positions.inputs(Layout.of_text(prefix.token_ids), None, backend.lengths))
            outputs = backend.step(positions.inputs(rest, features.visual, backend.lengths))
            expected = [[array.copy() for array in backend.cache(layer)] for layer in range(6)]
            token = int(outputs.logits[0].argmax())
        with Session.open(system_bundle, threads=1) as session:
            addresses = [array.ctypes.data for array in session.backend.cache(0)]
            saved = Prefix.load(tmp_path / "prefix.npz")
            session.reset(prefix=saved)
            assert [array.ctypes.data for array in session.backend.cache(0)] == addresses
            answer = session.ask(question, PICTURE, max_new_tokens=1)
            assert answer.token_ids == (token,)
            assert [len(route) for route in answer.routes] == [7, 4]
            for layer, pair in enumerate(expected):
                for mine, theirs in zip(session.backend.cache(layer), pair, strict=True):
                    np.testing.assert_array_equal(mine, theirs)
            # Where no image is routed, one long prompt gives the same rows up to rounding.
            session.reset(prefix=prefix)
            behind = session.ask(question, max_new_tokens=3)
            for mine, theirs in zip(prefix.caches, saved.caches, strict=True):
                np.testing.assert_array_equal(mine, theirs)
            rows = [session.backend.cache(layer)[0].copy() for layer in range(6)]
            session.reset(system=prefix.system)
            assert session.ask(question, max_new_tokens=3).token_ids == behind.token_ids
            for layer, keys in enumerate(rows):
                np.testing.assert_allclose(session.backend.cache(layer)[0], keys, atol=1e-4)

    def test_loading_where_the_caches_are_not_the_hosts(self, system_bundle: Path) -> None:
        """The path of the provider cuda, on ONNX Runtime's CPU memory: rows go through the OrtValue."""
        with Session.open(system_bundle, threads=1) as session:
            prefix = session.prefix("is there a blue square ?")
            backend = session.backend
            assert isinstance(backend, OrtBackend)
            backend._options = dataclasses.replace(backend._options, provider="cuda")
            for name, (room, value) in backend._rooms.items():
                value.update_inplace(np.full_like(room, 9))
                backend._rooms[name] = (np.zeros_like(room), value)  # no longer the OrtValue's memory
            session.reset(prefix=prefix)
            for layer, (key, value) in enumerate(prefix.caches):
                np.testing.assert_array_equal(backend.cache(layer)[0], key)
                np.testing.assert_array_equal(backend.cache(layer)[1], value)

    def test_the_decoder_has_its_own_identity(self, system_bundle: Path, tiny_bundle: Path) -> None:
        """Not the template's nor the vision graph's, but the weights' and the schedule's."""
        first = Bundle.open(tiny_bundle)
        assert Bundle.open(system_bundle).decoder_sha256 == first.decoder_sha256
        files = first.manifest.files

        def changed(name: str) -> str:
            table = {**files, name: dataclasses.replace(files[name], sha256="0" * 64)}
            return dataclasses.replace(first, manifest=dataclasses.replace(first.manifest, files=table)).decoder_sha256

        kept = {name for name in files if changed(name) == first.decoder_sha256}
        assert kept == {
            "chat_template.jinja", "tokenizer.json", "reference.npz", "vision.onnx", "vision.onnx.data"
        }  # fmt: skip
