"""Harmony, the format of gpt-oss: messages on channels, as text with its special tokens shown.

`<|channel|>analysis<|message|>…<|end|>` are thoughts, `final` is content, and so is `commentary`
unless it is addressed `to=functions.NAME`, which makes it a call.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from router.parsers.output import Output, Stage
from router.parsers.source import Emit, Markers, Source, Steps

_MAX_HEAD = 512
_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ADDRESS = " to="
_HEADS = Markers(_START, _CHANNEL)
_ENDS = Markers("<|end|>", "<|return|>", "<|call|>", _START, _CHANNEL)
_BODY = Markers(_MESSAGE)
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTION = "functions."
_LAST_HEAD = re.compile(r"<\|start\|>(?:(?!<\|start\|>).)*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """What a message's head says."""

    channel: str = "final"
    function: str | None = None


def parse_head(head: str) -> Message:
    """Read what stands between two messages' bodies."""
    channel = _CHANNEL_NAME.search(head)
    recipient = _RECIPIENT.search(head)
    function = recipient.group(1) if recipient else ""
    return Message(
        channel.group(1) if channel else "final",
        function.removeprefix(_FUNCTION) if function.startswith(_FUNCTION) else None,
    )


@lru_cache(maxsize=8)  # the choices of a request ask for the same, and the tail may be long
def open_message(tail: str) -> Message | None:
    """The message in whose body a prompt ends; None: it ends between two, or in a head."""
    found = _LAST_HEAD.search(tail)
    if found is None or "<|end|>" in found.group():
        return None
    head, body, _ = found.group().partition(_MESSAGE)
    return parse_head(head) if body else None


class Harmony:
    """Messages, one after the other.

    Content goes to the next stage. Without `reasoning` thoughts are content as well; without
    `functions` a message to a function is, its head included.
    """

    def __init__(self, tail: str, following: Stage, *, reasoning: bool, functions: bool) -> None:
        self._open = open_message(tail)
        self._next = following
        self._reasoning = reasoning
        self._functions = functions
        self.thinking = reasoning and (self._open is None or self._open.channel == "analysis")

    def read(self, source: Source, out: Output) -> Steps[None]:
        """The grammar."""
        content = self._next.push
        word: str | None
        if self._open is not None:
            word = yield from self._body(source, out, self._open, "")
        else:
            # The address of a call may stand before its channel, behind the prompt's end.
            word = _ADDRESS if (yield from source.literal(_ADDRESS)) else ""
        while word is not None:
            if word not in (_START, _CHANNEL, _ADDRESS):
                word = yield from source.until(_HEADS, content)
                continue
            source.mark(back=len(word))
            found = yield from source.upto(_BODY, _MAX_HEAD)
            if found is None:
                content(source.undo(len(word)))
                word = ""
                continue
            source.commit()
            head = word + found[0]
            word = yield from self._body(source, out, parse_head(head), head + _MESSAGE)
        self._next.finish()

    def _body(self, source: Source, out: Output, message: Message, head: str) -> Steps[str | None]:
        """Read a message; returns the marker behind it, None at the end."""
        content = self._next.push
        self.thinking = self._reasoning and message.channel == "analysis"
        if message.function and self._functions:
            out.start(message.function)
            arguments: list[bool] = []
            word = yield from source.until(_ENDS, _noting(out.arguments, arguments))
            if word is not None and not arguments:
                out.arguments("{}")
        elif message.function:
            content(head)
            word = yield from source.until(_ENDS, content)
        else:
            word = yield from source.until(_ENDS, out.reasoning if self.thinking else content)
        self.thinking = self._reasoning  # what comes next begins with markup, or is thoughts
        return word


def _noting(emit: Emit, noted: list[bool]) -> Emit:
    """The same, and `noted` is not empty once there was something."""

    def emit_and_note(text: str) -> None:
        if not noted:
            noted.append(True)
        emit(text)

    return emit_and_note


@dataclass(frozen=True, slots=True)
class HarmonyForm:
    """Harmony as a reasoning format."""

    start: str = "<|channel|>"
    end: str = "<|channel|>final<|message|>"
    needs_special_tokens: bool = True

    def starts_inside(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the prompt ends in a message of thoughts."""
        message = open_message(tail)
        return message is not None and message.channel == "analysis"

    def may_think(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether thoughts may come: not if the prompt ends in the answer."""
        message = open_message(tail)
        return message is None or message.channel == "analysis"

    def make(
        self, tail: str, template_kwargs: Mapping[str, Any], following: Stage, *, functions: bool
    ) -> Harmony:
        """A grammar for one choice."""
        return Harmony(tail, following, reasoning=True, functions=functions)
