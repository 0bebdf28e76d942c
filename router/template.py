"""Rendering a model's chat template, in a sandbox and within a time limit."""

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from contracts.errors import ConfigurationError, InvalidRequest
from router.messages import TemplateMessage

_ERROR_CHARS = 300


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it off the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Raised(jinja2.TemplateError):
    """The template itself refused the conversation."""


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escaping of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """One compiled template. `render` is safe to call from several threads.

    Raises:
        ConfigurationError: the template has a syntax error.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.wants_parts = loops_over_content(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from None
        self.knows_developer = "developer" in source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: list[TemplateMessage],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> str:
        """The prompt's text, with the opening of the assistant's turn.

        Raises:
            InvalidRequest: the template refuses these messages, or takes too long.
        """
        deadline = clock() + timeout_s
        pieces: list[str] = []
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                pieces.append(piece)
                if clock() > deadline:
                    raise InvalidRequest(
                        f"the chat template took longer than {timeout_s:g} s", "messages"
                    )
        except _Raised as error:
            raise InvalidRequest(str(error)[:_ERROR_CHARS]) from None
        except InvalidRequest:
            raise
        except Exception as error:  # whatever a template's own code runs into
            raise InvalidRequest(
                f"the chat template cannot render these messages: {error}"[:_ERROR_CHARS]
            ) from error
        return "".join(pieces)


def loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template loops over a message's `content`, so wants it as a list of parts."""
    aliases = {
        assign.target.name
        for assign in tree.find_all(jinja2.nodes.Assign)
        if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node, frozenset())
    }
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node, aliases: frozenset[str] | set[str]) -> bool:
    if isinstance(node, jinja2.nodes.Name):
        return node.name in aliases
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        return _is_content(node.node, aliases)
    return False
