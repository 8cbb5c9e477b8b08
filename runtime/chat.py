"""The checkpoint's chat template: the first turn's tokens, and of a later turn only what is new.

A later turn does not tokenise the history again: its rows are in the cache. The conversation is rendered
with a sentinel as the last answer, and what follows the sentinel is the tail to run, for example `</s>USER:
q2 ASSISTANT:`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from reroute.errors import UserError
from reroute.manifest import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = dict[str, Any]
Prompt = TypeVar("Prompt", str, list[int])

# Private-use characters: no template changes them, no question holds them by accident.
_SENTINEL = "\ue0f0answer\ue0f1"
# Questions whose first tokens differ, and which a tokenizer may join in different ways with what is in front of them.
_PROBES = ("a", "Where", "1", " ", "\n", ".", "\u00e9", "\u4e2d")


def user_message(text: str, *, num_images: int = 0) -> Message:
    """A question: its images first, then its text."""
    images: list[dict[str, str]] = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def system_message(text: str) -> Message:
    """Instructions in front of the dialogue."""
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def require_utf8(text: str, what: str) -> None:
    """Refuse what Python makes of bytes on the command line that are not UTF-8; tokenizers do not take it."""
    if broken := [character for character in text if "\ud800" <= character <= "\udfff"]:
        raise UserError(
            f"the {what} is not valid UTF-8: it holds U+{ord(broken[0]):04X}",
            hint="set terminal and shell to UTF-8",
        )


class Chat:
    """Renders and tokenises the turns of a conversation as transformers' processor does."""

    def __init__(self, template: str, tokenizer: Tokenizer, tokens: Tokens) -> None:
        """Compile `template`. Raises UserError for a template jinja2 cannot compile."""
        from reroute.runtime.template import Template

        self.tokenizer = tokenizer
        self._tokens = tokens
        self._template = Template(template)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the model's next answer starts. Raises UserError."""
        special = {
            "bos_token": self._tokens.bos_token,
            "eos_token": self._tokens.eos_token,
            "image_token": self._tokens.image_token,
        }
        return self._template.render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **special
        )

    def first_turn(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation's start, with the beginning-of-sequence token exactly once."""
        return self._encode_start(self.render(messages))

    def _encode_start(self, text: str) -> list[int]:
        # The tokenizer adds the token, except where the template wrote it itself.
        bos = self._tokens.bos_token
        written = bool(bos) and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=not written).ids

    def require_system(self, system: str) -> None:
        """Refuse a system text that is empty, or that the template has no place for. Raises UserError."""
        if not system.strip():
            raise UserError("the system text is empty", hint="give a text, or leave it out")
        require_utf8(system, "system text")
        hint = "put the instructions into the first question instead"
        question = user_message("a")
        try:
            text = self.render([system_message(_SENTINEL), question])
        except UserError as error:
            raise UserError(f"the chat template takes no system text: {error.message}", hint=hint) from error
        if _SENTINEL not in text:
            raise UserError("the chat template leaves a system text out", hint=hint)
        for role, what in (("user", "a question"), ("assistant", "an answer")):
            if text == self._render_or_none([{**system_message(_SENTINEL), "role": role}, question]):
                raise UserError(
                    f"the chat template has no system role: it writes a system text as if it were {what}", hint=hint
                )

    def system_prefix(self, system: str) -> tuple[list[int], int]:
        """Token ids that first prompts with this system text start with, whatever the question and its images.

        Found by rendering different questions: a tokenizer may join the end of the shared text with the start of a
        question, and such tokens are no part of it. No choice of questions shows every joint, so a prompt is compared
        with its prefix before it runs (`Prefix.rest`).

        Returns:
            The ids, and how many more tokens the shared text has by itself: those that were cut.

        Raises:
            UserError: as `require_system`, or the template writes the question in front of the system text.
        """
        self.require_system(system)
        questions = [user_message(probe, num_images=images) for probe in _PROBES for images in (0, 1)]
        if _SENTINEL not in _common_start([self.render([system_message(_SENTINEL), one]) for one in questions]):
            raise UserError(
                "the chat template writes a system text behind the start of the question, so that there is no prefix",
                hint="start the dialogue with the system text and without a prefix: session.reset(system=...)",
            )
        starts = [[system_message(system), one] for one in questions]
        text = _common_start([self.render(start) for start in starts])
        # A space or a line end in front of the question is what most tokenizers join with its first word.
        before_space = self._encode_start(text.rstrip())
        shared = _common_start([*(self.first_turn(start) for start in starts), before_space])
        return shared, max(0, len(self._encode_start(text)) - len(shared))

    def _render_or_none(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.render(messages)
        except UserError:
            return None

    def next_turn(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that follow the last answer in `messages`: its end, the new question, the answer's start.

        Args:
            messages: the conversation; the last message is the new question and the one before it the answer
                whose tokens the cache already holds (its text is not used).

        Raises:
            UserError: the template leaves answers out, so that there is no telling what follows one.
        """
        *history, _, question = messages
        text = self.render([*history, assistant_message(_SENTINEL), question])
        _, found, tail = text.partition(_SENTINEL)
        if not found:
            raise UserError(
                "the chat template does not write earlier answers, so the dialogue cannot go on",
                hint="reset the session before each question",
            )
        return self._encode_after_text(tail)

    def _encode_after_text(self, tail: str) -> list[int]:
        """Tokenise `tail` as after other text: a sentencepiece start would add a space of its own."""
        anchor = self.tokenizer.encode("a", add_special_tokens=False).ids
        both = self.tokenizer.encode("a" + tail, add_special_tokens=False).ids
        if anchor and both[: len(anchor)] == anchor:
            return both[len(anchor) :]
        return self.tokenizer.encode(tail, add_special_tokens=False).ids


def _common_start(prompts: Sequence[Prompt]) -> Prompt:
    """What all of them start with."""
    first, last = min(prompts), max(prompts)  # every other one lies between these two
    return next((first[:at] for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), first)
