"""JSON values read as text, character for character as the model wrote them."""

import json
import re
from collections.abc import Container
from functools import cache

from router.parsers.output import Output
from router.parsers.source import Emit, Source, Steps

_IN_STRING = re.compile(r'["\\]')
_KEYS = ("name", "arguments", "parameters", "type", "function", "id")
_SCALAR = re.compile(r"[\w+\-.]")


@cache
def _outside(stop: str) -> re.Pattern[str]:
    """What matters outside strings: quotes, brackets, and where `stop` may begin."""
    return re.compile(r'["{}\[\]' + re.escape(stop[:1]) + "]")


def json_value(source: Source, emit: Emit, stop: str = "") -> Steps[bool]:
    """Read a value; its text goes to `emit` as it comes.

    Only quotes and brackets are looked at, so what is inside need not be correct. Outside strings
    the text `stop` ends a value that was never closed.

    Returns:
        Whether the value came to its end.
    """
    first = yield from source.peek()
    if not first or first not in '{["':
        word = yield from source.run(_SCALAR)
        if word:
            emit(word)
        return bool(word)
    outside = _outside(stop)
    depth, in_string, skip = 0, False, 0
    while True:
        text, index = source.text, source.at + skip
        closed = cut = False
        while index < len(text) and not closed:
            match = (_IN_STRING if in_string else outside).search(text, index)
            if match is None:
                index = len(text)
                break
            index = match.end()
            mark = match.group()
            if in_string:
                if mark == "\\":
                    index += 1  # what is escaped, even if it is still to come
                else:
                    in_string = False
                    closed = depth == 0
            elif mark == '"':
                in_string = True
            elif mark in "{[":
                depth += 1
            elif mark in "}]":
                depth -= 1
                closed = depth == 0
            elif text.startswith(stop, index - 1):
                index -= 1
                cut = True
                break
            elif not source.ended and stop.startswith(text[index - 1 :]):
                index -= 1
                break
        end = min(index, len(text))
        skip = max(0, index - len(text))
        if end > source.at:
            emit(text[source.at : end])
            source.at = end
        if closed:
            return True
        if cut or source.ended:
            return False
        yield


def json_string(source: Source) -> Steps[str | None]:
    """Read a string; None: it is none, or not complete."""
    if (yield from source.peek()) != '"':
        return None
    parts: list[str] = []
    complete = yield from json_value(source, parts.append)
    return unquote("".join(parts)) if complete else None


def unquote(raw: str) -> str:
    """What a JSON string stands for; with errors in it: what is between its quotes."""
    try:
        text = str(json.loads(raw, strict=False))
        text.encode()  # half a character, from an escape, fails
    except ValueError:
        return raw[1:-1]
    return text


def arguments_value(source: Source, emit: Emit, stop: str = "") -> Steps[bool]:
    """Read a call's arguments, as `json_value` does.

    Arguments written as a string that holds an object are taken out of it; null is no arguments.
    """
    first = yield from source.peek()
    if first and first in "{[":
        return (yield from json_value(source, emit, stop))
    parts: list[str] = []
    complete = yield from json_value(source, parts.append, stop)
    raw = "".join(parts)
    if first == '"' and complete:
        inner = unquote(raw)
        raw = inner if inner.lstrip().startswith("{") else raw
    emit("{}" if raw == "null" else raw)
    return complete


def call_object(
    source: Source, out: Output, known: Container[str] | None, stop: str = ""
) -> Steps[bool]:
    """Read `{"name": …, "arguments": …}`, the keys in any order; further keys are skipped.

    With `known` only functions of these names are called, and the first key must be one that
    calls have: so most JSON that is no call is found out at once.

    The source has a mark, which is given up when the call begins. `parameters` is the same as
    `arguments`; without either the arguments are empty. All of it may be under `function`.

    Returns:
        Whether a call began. False: the text is no call; how far it was read is not defined.
    """
    if not (yield from source.literal("{")):
        return False
    seen = out.seen
    held: list[str] | None = None  # arguments that came before the name
    given, first = False, True
    while True:
        yield from source.space()
        following = yield from source.peek()
        if following == ",":
            source.at += 1
            continue
        if following == "}":
            source.at += 1
            break
        key = yield from json_string(source)
        if key is None or (first and known is not None and key not in _KEYS):
            return out.seen > seen
        first = False
        yield from source.space()
        if not (yield from source.literal(":")):
            return out.seen > seen
        yield from source.space()
        started = out.seen > seen
        if key == "name" and not started:
            name = yield from json_string(source)
            if not name or (known is not None and name not in known):
                return False
            source.commit()
            out.start(name)
            for piece in held or ():
                out.arguments(piece)
        elif key in ("arguments", "parameters") and not given:
            given = True
            held = []
            emit = out.arguments if started else held.append
            if not (yield from arguments_value(source, emit, stop)):
                return started
        elif key == "function" and not started and (yield from source.peek()) == "{":
            given = True
            if not (yield from call_object(source, out, known, stop)):
                return False
        else:
            skipped: list[str] = []
            if not (yield from json_value(source, skipped.append, stop)):
                return started
    if out.seen > seen and not given:
        out.arguments("{}")
    return out.seen > seen
