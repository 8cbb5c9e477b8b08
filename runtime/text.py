"""From token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PARTIAL = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Token:
    """One sampled token.

    Attributes:
        id: token id.
        text: the text that became certain with this token; may be empty (half a character, a possible stop
            string, an end token) or hold what was kept back before. All pieces together are the answer.
        logprob: natural log of its probability under the model.
    """

    id: int
    text: str
    logprob: float


class Detokenizer:
    """Decodes ids as they come.

    A piece is the difference of two decodings that start at the same earlier token, because a sentencepiece
    decoder drops the space in front of whatever it is given first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of both decodings
        self._done = 0  # ids before this one are emitted

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(_PARTIAL):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end, without an unfinished character."""
        piece = self._piece().rstrip(_PARTIAL)
        self._start = self._done = len(self._ids)
        return piece

    def _piece(self) -> str:
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Writer:
    """Text of one answer from its ids, up to the first stop string, which itself is not part of the answer.

    Attributes:
        stopped: a stop string was completed; nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""  # could still become a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain with `token_id`: whole characters in front of any stop string."""
        return self._pass(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest, without an unfinished character."""
        text = self._pass(self._detokenizer.flush())
        text, self._held = text + self._held, ""
        return text

    def _pass(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that starts `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
