"""The environment that transformers gives chat templates, which are somebody else's code: a sandbox.

Apart from `chat`, so that jinja2 is imported when a session opens and not with the runtime.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from reroute.errors import UserError


class Template:
    """A compiled chat template."""

    def __init__(self, text: str) -> None:
        """Compile. Raises UserError for a template jinja2 cannot compile."""
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template does not compile: {error}",
                hint="correct chat_template.jinja of the checkpoint and export again",
            ) from error

    def render(self, **values: Any) -> str:
        """The text. Raises UserError for what the template refuses."""
        try:
            return self._template.render(**values)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template refuses this conversation: {error}",
                hint="reset the session, or ask without what the template refuses",
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
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
