"""Rendering a chat template, in a sandbox and within limits of time and size.

The limits hold for a template that means well and input that does not: each turn of a loop and
each call of a macro looks at the clock. A template that itself may be hostile belongs in a child
process besides (`router.template_sandbox`).
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from contracts.errors import ConfigurationError, InvalidRequest
from router.messages import template_messages, text_of
from router.open_end import cut_open_end, mark_open_end
from router.prompt_request import PromptRequest

ContentFormat = Literal["auto", "string", "openai"]

_ERROR_CHARS = 300
_TICK = "__baton_tick"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and of its last message the role and the text."""

    text: str
    last_role: str
    last_text: str


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it off the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Raised(jinja2.TemplateError):
    """The template itself refused the conversation."""


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        _refuse_underscores(attributes)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscores([name])
        super().__setitem__(name, value)


def _refuse_underscores(names: Iterable[object]) -> None:
    if any(isinstance(name, str) and name.startswith("_") for name in names):
        raise jinja2.exceptions.SecurityError("a namespace takes no names that start with '_'")


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


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    del environment.globals["lipsum"]
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `render` is safe to call from several threads.

    `blame` is the request's field that render errors name.

    Raises:
        ConfigurationError: the template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        content_format: ContentFormat = "auto",
        blame: str | None = None,
    ) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.wants_parts = content_format == "openai" or (
                content_format == "auto" and loops_over_content(tree)
            )
            self.keeps_text = self.wants_parts and asks_for_text(tree)
            self.names = frozenset(name.name for name in tree.find_all(jinja2.nodes.Name))
            _watch_loops(tree, environment)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:  # nested too deeply for the parser, or constants too large
            raise ConfigurationError(
                f"the chat template cannot be compiled: {error or type(error).__name__}"
            ) from None
        self.source = source
        self.knows_developer = "developer" in source
        self._special_tokens = dict(special_tokens)
        self._blame = blame

    def render(
        self,
        request: PromptRequest,
        *,
        timeout_s: float,
        max_chars: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Rendered:
        """The conversation as text. Of `template_kwargs` the template gets the names it uses.

        Raises:
            InvalidRequest: bad messages, the template refuses them, takes too long (`timeout_s`)
                or says more than `max_chars`, or the last message cannot be continued.
        """
        messages = template_messages(
            request.messages,
            as_parts=self.wants_parts,
            keeps_text=self.keeps_text,
            knows_developer=self.knows_developer,
        )
        last = request.messages[-1]
        final = mark_open_end(messages, last) if request.continue_final_message else ""
        variables = {
            **self._special_tokens,
            **request.template_kwargs,
            "messages": messages,
            "tools": None if request.tools is None else list(request.tools),
            "documents": None if request.documents is None else list(request.documents),
            "add_generation_prompt": request.add_generation_prompt,
            "continue_final_message": request.continue_final_message,
        }
        used = {name: value for name, value in variables.items() if name in self.names}
        text = self._run(used, timeout_s, max_chars, clock)
        if request.continue_final_message:
            text = cut_open_end(text, final)
        return Rendered(text, last["role"], text_of(last))

    def _run(
        self,
        variables: dict[str, Any],
        timeout_s: float,
        max_chars: int | None,
        clock: Callable[[], float],
    ) -> str:
        deadline = clock() + timeout_s

        def tick() -> None:
            if clock() > deadline:
                raise InvalidRequest(
                    f"the chat template took longer than {timeout_s:g} s", self._blame or "messages"
                )

        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables, **{_TICK: tick}):
                pieces.append(piece)
                num_chars += len(piece)
                if max_chars is not None and num_chars > max_chars:
                    raise InvalidRequest(
                        f"the prompt has more than {max_chars} characters, "
                        "which is more than the model's context can hold",
                        "input_text",
                    )
                tick()
        except _Raised as error:
            raise InvalidRequest(str(error)[:_ERROR_CHARS]) from None
        except InvalidRequest:
            raise
        except Exception as error:  # whatever a template's own code runs into
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the chat template cannot render these messages: {reason}"[:_ERROR_CHARS],
                self._blame,
            ) from error
        return "".join(pieces)


def _watch_loops(
    tree: jinja2.nodes.Template, environment: jinja2.sandbox.ImmutableSandboxedEnvironment
) -> None:
    """Make each turn of a loop and each call of a macro look at the clock."""
    bodies: list[list[jinja2.nodes.Node]] = [loop.body for loop in tree.find_all(jinja2.nodes.For)]
    bodies += [macro.body for macro in tree.find_all(jinja2.nodes.Macro)]
    bodies += [call.body for call in tree.find_all(jinja2.nodes.CallBlock)]
    for body in bodies:
        clock = jinja2.nodes.Name(_TICK, "load", lineno=1)
        call = jinja2.nodes.Call(clock, [], [], None, None, lineno=1)
        statement = jinja2.nodes.ExprStmt(call, lineno=1)
        statement.set_environment(environment)
        body.insert(0, statement)


def loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template loops over a message's `content`, so wants it as a list of parts."""
    aliases = _content_aliases(tree)
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(jinja2.nodes.For))


def asks_for_text(tree: jinja2.nodes.Template) -> bool:
    """Whether the template asks if `content` is a text, so takes it as that as well."""
    aliases = _content_aliases(tree)
    tests = tree.find_all(jinja2.nodes.Test)
    return any(test.name == "string" and _is_content(test.node, aliases) for test in tests)


def _content_aliases(tree: jinja2.nodes.Template) -> frozenset[str]:
    return frozenset(
        assign.target.name
        for assign in tree.find_all(jinja2.nodes.Assign)
        if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node, frozenset())
    )


def _is_content(node: jinja2.nodes.Node, aliases: frozenset[str]) -> bool:
    if isinstance(node, jinja2.nodes.Name):
        return node.name in aliases
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        return _is_content(node.node, aliases)
    return False
