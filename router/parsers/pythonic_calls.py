"""Calls written as Python: `[f(a=1), g(b="x")]`. They are read as literals and never run."""

import re
from dataclasses import dataclass

from router.parsers.json_calls import Calls, optional
from router.parsers.output import Output
from router.parsers.source import Markers, Source, Steps
from router.parsers.specs import ToolParsing
from router.parsers.values import dump, parse_expression, python_literal

_NAME = re.compile(r"[\w.-]")
_SEPARATOR = re.compile(r"[,\s]")
_MATTERS = re.compile(r"[\"'\\()\[\]{},]")
_MAX_DEPTH = 64
_END_OF_LIST = Markers("]")


@dataclass(frozen=True, slots=True)
class PythonicForm:
    """Markers around the calls, if there are any. `listed`: they stand in a list.

    Without markers calls are only looked for at the start of the text, and only the functions of
    the request are calls. Behind markers a list may be left out.
    """

    opening: str = ""
    closing: str = ""
    listed: bool = True


class PythonicCalls(Calls):
    """A list of calls, or one on each line. A call is shown when it is complete."""

    def __init__(self, form: PythonicForm, tools: ToolParsing) -> None:
        super().__init__(Markers(*filter(None, (form.opening,))))
        self._closings = Markers(*filter(None, (form.closing,)))
        self._listed = form.listed
        self._known = {tool.name for tool in tools.tools}

    def begin(self, source: Source, out: Output) -> Steps[None]:
        """Read a list without an opening."""
        if not self._listed:
            return
        source.mark()
        yield from source.space()
        if (yield from source.peek()) == "[":
            yield from self._items(source, out, known_only=True)
        if out.seen:
            source.commit()
        else:
            source.undo()

    def call(self, source: Source, out: Output) -> Steps[None]:
        """Read what follows the opening."""
        yield from self._items(source, out, known_only=False)

    def _items(self, source: Source, out: Output, *, known_only: bool) -> Steps[None]:
        seen = before = out.seen
        yield from source.space()
        listed = yield from source.literal("[")
        while True:
            if before > seen:
                yield from source.run(_SEPARATOR)
            yield from source.space()
            name = yield from source.run(_NAME)
            allowed = name in self._known if known_only else bool(name)
            if allowed and (yield from source.literal("(")):
                yield from self._arguments(source, out, name)
            if out.seen == before:
                break
            before = out.seen
            source.mark()
        if before == seen:
            return
        source.undo()
        if listed:
            yield from optional(source, _END_OF_LIST)
        if self._closings.words:
            yield from optional(source, self._closings)

    def _arguments(self, source: Source, out: Output, name: str) -> Steps[None]:
        """Read up to the closing bracket and show the call, if it is one.

        A call cut by the end of the text is shown with those of its arguments that are complete.
        """
        arguments: list[str] = []
        while True:
            piece, end = yield from _argument(source)
            if not end:  # the text ended
                if arguments:
                    source.commit()
                    out.start(name)
                    out.arguments("{" + ", ".join(arguments))
                return
            if end not in ",)":
                return
            if piece.strip():
                if (written := _as_json(piece)) is None:
                    return
                arguments.append(written)
            elif end == ",":
                return
            if end == ")":
                source.commit()
                out.start(name)
                out.arguments("{" + ", ".join(arguments) + "}")
                return


def _argument(source: Source) -> Steps[tuple[str, str]]:
    """Read an argument and the comma or bracket behind it.

    Returns:
        Both. The latter is empty if the text ended, and another bracket if that one is wrong.
    """
    depth, quote, scanned = 0, "", 0
    while True:
        text = source.text
        while match := _MATTERS.search(text, source.at + scanned):
            scanned = match.end() - source.at
            mark = match.group()
            if mark == "\\":
                scanned += 1
            elif quote:
                quote = "" if mark == quote else quote
            elif mark in "\"'":
                quote = mark
            elif mark in "([{":
                depth += 1
                if depth > _MAX_DEPTH:
                    source.at += scanned
                    return "", mark
            elif depth == 0 and mark in ",)":
                piece = text[source.at : match.start()]
                source.at = match.end()
                return piece, mark
            elif mark != ",":
                depth -= 1
                if depth < 0:
                    source.at += scanned
                    return "", mark
        scanned = max(scanned, len(text) - source.at)
        if source.ended:
            source.at = len(text)
            return "", ""
        yield


def _as_json(piece: str) -> str | None:
    """`key=literal` as `"key": JSON`; None: it is something else."""
    key, equals, value = piece.partition("=")
    key = key.strip()
    if not equals or not key.isidentifier():
        return None
    try:
        return f"{dump(key)}: {dump(python_literal(parse_expression(value)))}"
    except (ValueError, RecursionError):
        return None
