"""The checkpoint's chat template: the first turn's tokens, and of a later turn only what is new.

A later turn does not tokenise the history again: its rows are in the cache. The conversation is rendered
with a sentinel as the last answer, and what follows the sentinel is the tail to run, for example `</s>USER:
q2 ASSISTANT:`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from reroute.errors import UserError
from reroute.manifest import Tokens

Message = dict[str, Any]

# Private-use characters: no template changes them, no question holds them by accident.
_SENTINEL = "\ue0f0answer\ue0f1"


def user_message(text: str, *, num_images: int = 0) -> Message:
    """A question: its images first, then its text."""
    images: list[dict[str, str]] = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class Chat:
    """Renders and tokenises the turns of a conversation as transformers' processor does."""

    def __init__(self, template: str, tokenizer: Tokenizer, tokens: Tokens) -> None:
        """Compile `template`. Raises UserError for a template jinja2 cannot compile."""
        self.tokenizer = tokenizer
        self._tokens = tokens
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template does not compile: {error}",
                hint="correct chat_template.jinja of the checkpoint and export again",
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the model's next answer starts. Raises UserError."""
        special = {
            "bos_token": self._tokens.bos_token,
            "eos_token": self._tokens.eos_token,
            "image_token": self._tokens.image_token,
        }
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **special
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template refuses this conversation: {error}",
                hint="reset the session, or ask without what the template refuses",
            ) from error

    def first_turn(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation's start, with the beginning-of-sequence token exactly once."""
        text = self.render(messages)
        # The tokenizer adds the token, except where the template wrote it itself.
        bos = self._tokens.bos_token
        written = bool(bos) and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=not written).ids

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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives templates, which are somebody else's code: a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which no chat template wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
