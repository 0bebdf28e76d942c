# ruff: noqa: RUF001  (the bars of DeepSeek's markers are not the ASCII one)
"""Calls whose parameters are elements of their own, with bare text as values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.parsers.json_calls import Calls, section
from router.parsers.output import Output
from router.parsers.source import Markers, Source, Steps
from router.parsers.specs import ToolParsing
from router.parsers.values import dump, property_schema, to_json, types_of

_MAX_NAME = 256
_NAME = re.compile(r"[^\s<>\"'{}]+")
_STRING = frozenset({"string"})


@dataclass(frozen=True, slots=True)
class XmlForm:
    """`section_open (call_open NAME call_head_end PARAMETER* call_close)* section_close`.

    A parameter is `parameter_open KEY key_end VALUE parameter_close`. Behind KEY, `flag` may say
    whether the value is a string: FLAG"true". `lines`: a value has lines of its own, so that the
    line ends around it are markup.
    """

    section_open: str
    section_close: str
    call_open: str
    call_head_end: str
    call_close: str
    parameter_open: str
    key_end: str
    parameter_close: str
    flag: str = ""
    lines: bool = False


class Arguments:
    """Writes a call's arguments as a JSON object, one parameter after the other."""

    def __init__(
        self,
        out: Output,
        schema: Mapping[str, Any] | None,
        *,
        guess: bool = False,
        lines: bool = False,
    ) -> None:
        self._out = out
        self._schema = schema
        self._guess = guess  # values of unknown type may be JSON
        self._lines = lines
        self._before = "{"

    def read(
        self, source: Source, key: str, closings: Markers, *, is_string: bool | None = None
    ) -> Steps[str | None]:
        """Read the value of `key` up to one of `closings`. A string goes on as it comes.

        Returns:
            The closing that was read; None: the text ended, and the value is cut as well.
        """
        types = types_of(property_schema(self._schema, key))
        if is_string is not None:
            types = _STRING if is_string else types - _STRING
        if self._lines:
            yield from source.literal("\n")
        self._out.arguments(f"{self._before}{dump(key)}: ")
        self._before = ", "
        if types == _STRING:
            self._out.arguments('"')
            closing = yield from source.until(
                closings, lambda text: self._out.arguments(dump(text)[1:-1])
            )
            if closing is not None:
                self._out.arguments('"')
            return closing
        parts: list[str] = []
        closing = yield from source.until(closings, parts.append)
        value = "".join(parts)
        guess = self._guess or is_string is False
        self._out.arguments(value if closing is None else to_json(value, types, guess=guess))
        return closing

    def close(self) -> None:
        """There are no further parameters."""
        self._out.arguments("{}" if self._before == "{" else "}")


class XmlCalls(Calls):
    """Calls as in an `XmlForm`; a call outside of a section is taken too."""

    def __init__(self, form: XmlForm, tools: ToolParsing) -> None:
        super().__init__(Markers(form.section_open, form.call_open))
        self._form = form
        self._schemas = {tool.name: tool.parameters for tool in tools.tools}
        self._head_end = Markers(form.call_head_end)
        self._key_end = Markers(form.key_end)
        # A parameter without an end goes up to the next one, or to the end of the call.
        ends = (form.parameter_close, form.call_close)
        lines = tuple("\n" + end for end in ends) if form.lines else ()
        self._closings = Markers(*lines, *ends, "\n" + form.parameter_open)
        self._section_close = Markers(form.section_close)
        self._inside = Markers(form.parameter_open, form.call_close)

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows an opening: a section of calls, or one call."""
        yield from section(source, out, self._form.call_open, self._section_close, self._one)

    def _one(self, source: Source, out: Output) -> Steps[None]:
        head = yield from source.upto(self._head_end, _MAX_NAME)
        if head is None or not _NAME.fullmatch(head[0]):
            return
        name = head[0]
        yield from source.space()
        word = yield from source.either(self._inside)
        if word is None:
            return
        source.commit()
        out.start(name)
        arguments = Arguments(out, self._schemas.get(name), lines=self._form.lines)
        while word is not None and word.endswith(self._form.parameter_open):
            key = yield from source.upto(self._key_end, _MAX_NAME)
            if key is None:
                if source.ended and len(source.text) - source.at <= _MAX_NAME:
                    source.at = len(source.text)
                    return
                break
            label, is_string = self._label(key[0])
            word = yield from arguments.read(source, label, self._closings, is_string=is_string)
            if word is None:
                return  # the text ended within the value
            if word.endswith(self._form.parameter_close):
                yield from source.space()
                word = yield from source.either(self._inside)
                if word is None and source.cut(self._inside):
                    return
        arguments.close()

    def _label(self, head: str) -> tuple[str, bool | None]:
        """A parameter's key, and whether it is said to be a string."""
        flag = self._form.flag
        if not flag or flag not in head:
            return head.strip(' "'), None
        key, _, kind = head.partition(flag)
        return key.strip(' "'), "true" in kind


QWEN = XmlForm(
    section_open="<tool_call>",
    section_close="</tool_call>",
    call_open="<function=",
    call_head_end=">",
    call_close="</function>",
    parameter_open="<parameter=",
    key_end=">",
    parameter_close="</parameter>",
    lines=True,
)
SEED = XmlForm(
    section_open="<seed:tool_call>",
    section_close="</seed:tool_call>",
    call_open="<function=",
    call_head_end=">",
    call_close="</function>",
    parameter_open="<parameter=",
    key_end=">",
    parameter_close="</parameter>",
    lines=True,
)
MINIMAX = XmlForm(
    section_open="<minimax:tool_call>",
    section_close="</minimax:tool_call>",
    call_open='<invoke name="',
    call_head_end='">',
    call_close="</invoke>",
    parameter_open='<parameter name="',
    key_end='">',
    parameter_close="</parameter>",
)
DSML = XmlForm(
    section_open="<｜DSML｜function_calls>",
    section_close="</｜DSML｜function_calls>",
    call_open='<｜DSML｜invoke name="',
    call_head_end='">',
    call_close="</｜DSML｜invoke>",
    parameter_open='<｜DSML｜parameter name="',
    key_end=">",
    parameter_close="</｜DSML｜parameter>",
    flag='" string=',
)

_GLM_VALUE_OPEN = Markers("<arg_value>")
_GLM_VALUE = Markers("</arg_value>")
_GLM_NAME_END = Markers("<arg_key>", "</tool_call>")
_GLM_KEY_END = Markers("</arg_key>")
_GLM_NEXT = Markers("<arg_key>", "</tool_call>")


class GlmCalls(Calls):
    """`<tool_call>NAME`, then `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>` for each."""

    def __init__(self, tools: ToolParsing) -> None:
        super().__init__(Markers("<tool_call>"))
        self._schemas = {tool.name: tool.parameters for tool in tools.tools}

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows the opening."""
        head = yield from source.upto(_GLM_NAME_END, _MAX_NAME)
        if head is None or not _NAME.fullmatch(name := head[0].strip()):
            return
        source.commit()
        out.start(name)
        arguments = Arguments(out, self._schemas.get(name), guess=True)
        word: str | None = head[1]
        while word == "<arg_key>":
            key = yield from source.upto(_GLM_KEY_END, _MAX_NAME)
            if key is None and source.ended:
                source.at = len(source.text)
                return
            yield from source.space()
            if key is None or (yield from source.either(_GLM_VALUE_OPEN)) is None:
                if source.cut(_GLM_VALUE_OPEN):
                    return
                break
            if (yield from arguments.read(source, key[0].strip(), _GLM_VALUE)) is None:
                return
            yield from source.space()
            word = yield from source.either(_GLM_NEXT)
            if word is None and source.cut(_GLM_NEXT):
                return
        arguments.close()
