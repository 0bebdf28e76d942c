# ruff: noqa: RUF001, RUF002  (the bars of DeepSeek's markers are not the ASCII one)
"""Calls whose name stands before the JSON of the arguments, between special markers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from router.parsers.json_calls import LEFT_OVER, Calls, JsonCalls, JsonForm, optional, section
from router.parsers.json_text import arguments_value
from router.parsers.output import Output
from router.parsers.source import Markers, Source, Steps
from router.parsers.specs import ToolParsing

_NAME = re.compile(r"[\w.:/-]")
_WHOLE_NAME = re.compile(r"[\w.:/-]{1,256}")
_MAX_HEAD = 512  # characters of a name and what is around it


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a call's arguments."""

    name: str
    call_id: str | None = None


ReadHead = Callable[[Source], Steps[Head | None]]


@dataclass(frozen=True, slots=True)
class HeadedForm:
    """`section_open (call_open HEAD JSON call_close)* section_close`."""

    section_open: str
    section_close: str
    call_open: str
    call_close: str
    head: ReadHead


class HeadedCalls(Calls):
    """Calls in a section; a call outside of one is taken too."""

    def __init__(self, form: HeadedForm) -> None:
        super().__init__(Markers(form.section_open, form.call_open))
        self._form = form
        self._closings = Markers(form.call_close)
        self._ends = Markers(form.section_close)

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows an opening: a section of calls, or one call."""
        yield from section(source, out, self._form.call_open, self._ends, self._one)

    def _one(self, source: Source, out: Output) -> Steps[None]:
        head = yield from self._form.head(source)
        if head is None:
            return
        yield from source.space()
        if (yield from source.peek()) != "{":
            return
        source.commit()
        out.start(head.name, head.call_id)
        yield from arguments_value(source, out.arguments, self._form.call_close)
        yield from optional(source, _FENCE)
        yield from optional(source, self._closings, LEFT_OVER)


_FENCE = Markers("```")
_DEEPSEEK_SEP = Markers("<｜tool▁sep｜>")
_KIMI_SEP = Markers("<|tool_call_argument_begin|>")


def deepseek_head(source: Source) -> Steps[Head | None]:
    """`function<｜tool▁sep｜>NAME` and a fence (v3), or `NAME<｜tool▁sep｜>` (v3.1)."""
    found = yield from source.upto(_DEEPSEEK_SEP, _MAX_HEAD)
    if found is None:
        return None
    name = found[0].strip()
    yield from source.space()
    if (yield from source.peek()) != "{":
        name = yield from source.run(_NAME)
        yield from source.space()
        yield from source.literal("```json")
    return Head(name) if _WHOLE_NAME.fullmatch(name) else None


def kimi_head(source: Source) -> Steps[Head | None]:
    """`functions.NAME:INDEX`, which is the call's id."""
    found = yield from source.upto(_KIMI_SEP, _MAX_HEAD)
    if found is None:
        return None
    call_id = found[0].strip()
    name = call_id.rpartition(":")[0] or call_id
    name = name.removeprefix("functions.")
    return Head(name, call_id) if _WHOLE_NAME.fullmatch(name) else None


DEEPSEEK = HeadedForm(
    section_open="<｜tool▁calls▁begin｜>",
    section_close="<｜tool▁calls▁end｜>",
    call_open="<｜tool▁call▁begin｜>",
    call_close="<｜tool▁call▁end｜>",
    head=deepseek_head,
)
KIMI = HeadedForm(
    section_open="<|tool_calls_section_begin|>",
    section_close="<|tool_calls_section_end|>",
    call_open="<|tool_call_begin|>",
    call_close="<|tool_call_end|>",
    head=kimi_head,
)


class MistralCalls(JsonCalls):
    """`[TOOL_CALLS]` and a JSON list of calls, or for each call `[TOOL_CALLS]NAME{…}`.

    Between name and arguments there may be `[ARGS]`, and before it `[CALL_ID]` with an id.
    """

    def __init__(self, tools: ToolParsing) -> None:
        super().__init__(JsonForm(openings=("[TOOL_CALLS]",)), tools)

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows the opening."""
        yield from source.space()
        if (following := (yield from source.peek())) and following in "[{":
            yield from super().call(source, out)
            return
        name = yield from source.run(_NAME)
        yield from source.space()
        call_id = None
        if (yield from source.literal("[CALL_ID]")):
            call_id = yield from source.run(_NAME)
        yield from source.literal("[ARGS]")
        yield from source.space()
        if name and (yield from source.peek()) == "{":
            source.commit()
            out.start(name, call_id)
            yield from arguments_value(source, out.arguments)
