"""Calls written as JSON: `{"name": …, "arguments": {…}}`, bare, in a list or between markers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from router.parsers.json_text import call_object
from router.parsers.output import Output
from router.parsers.source import NO_MARKERS, Markers, Source, Steps
from router.parsers.specs import ToolParsing

LEFT_OVER = re.compile(r"[\s}\]]")  # brackets too many, as small models like to write
_SEPARATOR = re.compile(r"[,;]")
_SPACE = re.compile(r"\s")
_MAX_RETRIED = 1024  # characters
_END_OF_LIST = Markers("]")


class Calls:
    """Text with calls in it, each behind an opening marker; subclasses read the call itself.

    White space alone, before a call or between two, is no content. What turns out not to be a
    call is content, its markers included, and reading goes on right behind the opening; behind
    all that was read if it was long, so that a text full of openings is not read again and again.
    """

    thinking = False

    def __init__(self, openings: Markers) -> None:
        self._openings = openings

    def read(self, source: Source, out: Output) -> Steps[None]:
        """The grammar."""
        yield from self.begin(source, out)
        in_text = False
        while (yield from (self._search if in_text else self._next)(source, out)):
            opened = source.since_mark()
            seen = out.seen
            yield from self.call(source, out)
            in_text = out.seen == seen
            if in_text:
                tried = source.since_mark()
                out.content(source.undo(opened if tried <= _MAX_RETRIED else tried))
            else:
                source.commit()

    def begin(self, source: Source, out: Output) -> Steps[None]:
        """Read calls that need no opening, at the start of the text."""
        return
        yield

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows an opening; the source is marked before it."""
        raise NotImplementedError

    def _next(self, source: Source, out: Output) -> Steps[bool]:
        """Find an opening, after a call or at the start."""
        source.mark()
        yield from source.space()
        if (yield from source.either(self._openings)) is not None:
            return True
        if source.at == len(source.text) and out.seen:  # either: the end, so only white space
            source.commit()
            return False
        out.content(source.undo(source.since_mark()))
        return (yield from self._search(source, out))

    def _search(self, source: Source, out: Output) -> Steps[bool]:
        """Find an opening in the text."""
        word = yield from source.until(self._openings, out.content)
        if word is None:
            return False
        source.mark(back=len(word))
        return True


@dataclass(frozen=True, slots=True)
class JsonForm:
    """How a family of models writes JSON calls.

    `bare`: the characters that begin calls without an opening, at the start of the text; there,
    only the functions of the request are calls, as any JSON could have a name.
    """

    openings: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    bare: str = ""


class JsonCalls(Calls):
    """One call, several or a list of them behind each opening."""

    def __init__(self, form: JsonForm, tools: ToolParsing) -> None:
        super().__init__(Markers(*form.openings))
        self._closings = Markers(*form.closings)
        self._stop = form.closings[0] if form.closings else ""
        self._bare = form.bare
        self._known = {tool.name for tool in tools.tools}

    def begin(self, source: Source, out: Output) -> Steps[None]:
        """Read calls without an opening."""
        if not self._bare:
            return
        source.mark()
        yield from source.space()
        first = yield from source.peek()
        if first and first in self._bare:
            yield from self._items(source, out, known_only=True)
        if out.seen:
            source.commit()
        else:
            source.undo()

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read calls behind an opening."""
        yield from self._items(source, out)

    def _items(self, source: Source, out: Output, *, known_only: bool = False) -> Steps[None]:
        """Read objects, in a list or not, and the closing."""
        seen = before = out.seen
        known = self._known if known_only else None
        yield from source.space()
        listed = yield from source.literal("[")
        while True:
            yield from source.space()
            if before > seen:
                yield from source.run(_SEPARATOR)
                yield from source.space()
            if (yield from source.peek()) == "{":
                yield from call_object(source, out, known, self._stop)
            if out.seen == before:
                break
            before = out.seen
            source.mark()  # a further item that is none is content
        if before == seen:
            return
        source.undo()
        if listed:
            yield from optional(source, _END_OF_LIST, _SPACE)
        if self._closings.words:
            yield from optional(source, self._closings, LEFT_OVER)


def optional(source: Source, markers: Markers, before: re.Pattern[str] = _SPACE) -> Steps[None]:
    """Read one of `markers` and what is before it, if it comes next, be it cut at the end."""
    source.mark()
    yield from source.run(before)
    if (yield from source.either(markers)) is not None or source.cut(markers):
        source.commit()
    else:
        source.undo()


def section(
    source: Source,
    out: Output,
    call_open: str,
    ends: Markers,
    one: Callable[[Source, Output], Steps[None]],
) -> Steps[None]:
    """Read calls by `one`, behind the opening of a section or already of its first call."""
    # Which of the two it was: the source stands right behind it.
    opened = source.text.endswith(call_open, 0, source.at)
    seen = before = out.seen
    while True:
        if not opened:
            yield from source.space()
            opened = yield from source.literal(call_open)
        if opened:
            yield from one(source, out)
        opened = False
        if out.seen == before:
            break
        before = out.seen
        source.mark()
    if out.seen > seen:
        source.undo()
        yield from optional(source, ends)


def required_calls(tools: ToolParsing) -> JsonCalls:
    """Calls as the grammar of `tool_choice: required` makes them write: one JSON list."""
    return JsonCalls(JsonForm(bare="["), tools)


class NamedCall:
    """The whole text is the arguments of one function."""

    thinking = False

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self, source: Source, out: Output) -> Steps[None]:
        """The grammar. Without any text it is a call nevertheless, unless there was one before."""
        yield from source.space()
        if not (yield from source.peek()) and out.seen:
            return
        out.start(self._name)
        yield from source.until(NO_MARKERS, out.arguments)
