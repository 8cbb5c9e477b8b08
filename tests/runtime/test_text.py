import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from reroute.runtime.text import Writer
from tests.runtime import fakes

SENTENCE, BYTES, WORD = fakes.sentence_tokenizer(), fakes.byte_tokenizer(), fakes.word_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    writer = Writer(tokenizer, stop)
    out = [writer.push(token) for token in ids if not writer.stopped]
    return [*out, writer.finish()]


@pytest.mark.parametrize("tokenizer", [SENTENCE, BYTES], ids=["sentencepiece", "byte-level"])
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" in whole:
        return
    assert "".join(pieces(tokenizer, ids)) == whole


def test_words_get_their_spaces() -> None:
    ids = WORD.encode("where is the cat", add_special_tokens=False).ids
    assert pieces(WORD, ids) == ["where", " is", " the", " cat", ""]


def test_sentencepiece_spaces() -> None:
    ids = SENTENCE.encode("red cat", add_special_tokens=False).ids
    out = pieces(SENTENCE, ids)
    assert "".join(out) == "red cat"
    assert not out[0].startswith(" ")
    assert any(piece.startswith(" ") for piece in out[1:])


@pytest.mark.parametrize("tokenizer", [SENTENCE, BYTES], ids=["sentencepiece", "byte-level"])
def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    text = "é🦊x"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)
    out = pieces(tokenizer, ids)
    assert "".join(out).strip() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)
    assert "" in out[:-1]  # tokens in the middle of a character give nothing


@pytest.mark.parametrize("tokenizer", [SENTENCE, BYTES], ids=["sentencepiece", "byte-level"])
def test_a_cut_character_is_dropped_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab🦊", add_special_tokens=False).ids[:-1]
    assert "".join(pieces(tokenizer, ids)) == "ab"


def test_special_tokens_are_not_text() -> None:
    ids = [fakes.BOS, *WORD.encode("the cat", add_special_tokens=False).ids, fakes.PAD]
    assert "".join(pieces(WORD, ids)) == "the cat"


def test_stop_string_over_two_tokens() -> None:
    ids = WORD.encode("the cat is here now", add_special_tokens=False).ids
    writer = Writer(WORD, ("t is",))
    assert [writer.push(token) for token in ids[:2]] == ["the", " ca"]  # the t could become a stop string
    assert writer.push(ids[2]) == ""
    assert writer.stopped
    assert writer.finish() == ""


def test_held_back_text_comes_when_it_is_not_a_stop_string() -> None:
    ids = WORD.encode("the cat the", add_special_tokens=False).ids
    assert pieces(WORD, ids, ("t is",)) == ["the", " ca", "t the", ""]


def test_held_back_text_comes_at_the_end() -> None:
    ids = WORD.encode("the cat", add_special_tokens=False).ids
    assert pieces(WORD, ids, ("t is",)) == ["the", " ca", "t"]


def test_the_first_of_several_stop_strings_counts() -> None:
    ids = WORD.encode("the cat is here", add_special_tokens=False).ids
    assert "".join(pieces(WORD, ids, ("here", "cat", " is"))) == "the "


@settings(deadline=None)
@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_the_definition(text: str, stop: list[str]) -> None:
    writer = Writer(BYTES, tuple(stop))
    ids = BYTES.encode(text, add_special_tokens=False).ids
    out = ""
    for token in ids:
        out += writer.push(token)
        if writer.stopped:
            break
    out += writer.finish()
    # The answer ends in front of one of the stop strings in it, or is the whole text.
    ends = [text.find(s) for s in stop if s in text]
    assert writer.stopped == bool(ends)
    assert text.startswith(out)
    assert len(out) in (ends or [len(text)])
