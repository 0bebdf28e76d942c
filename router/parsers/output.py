"""Where parsers put what they found, and the two ends of a chain of them."""

import random
import string
import uuid
from collections.abc import Callable
from typing import Protocol

from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart

NewId = Callable[[str, int], str]
"""Makes a call's id from the function's name and the call's index."""

_ALPHANUMERIC = string.ascii_letters + string.digits


def long_id(name: str, index: int) -> str:
    """The usual form of an id; `name` and `index` do not matter."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def short_id(name: str, index: int) -> str:
    """Nine letters and digits: what the templates of Mistral's models accept."""
    return "".join(random.choices(_ALPHANUMERIC, k=9))


def function_id(name: str, index: int) -> str:
    """The form that the models of the Kimi family were trained on."""
    return f"functions.{name}:{index}"


class Output:
    """Collects deltas in order; neighbours of one kind are joined.

    Calls are counted here. Without `parallel` all but the first are dropped, though `seen` counts
    them.
    """

    __slots__ = ("_deltas", "_dropping", "_new_id", "_parallel", "calls", "seen")

    def __init__(self, *, new_id: NewId = long_id, parallel: bool = True) -> None:
        self._deltas: list[Delta] = []
        self._new_id = new_id
        self._parallel = parallel
        self._dropping = False
        self.calls = 0  # begun and shown
        self.seen = 0  # begun

    def content(self, text: str) -> None:
        """Add text of the answer."""
        deltas = self._deltas
        if deltas and isinstance(last := deltas[-1], Content):
            deltas[-1] = Content(last.text + text)
        elif text:
            deltas.append(Content(text))

    def reasoning(self, text: str) -> None:
        """Add text of the thoughts."""
        deltas = self._deltas
        if deltas and isinstance(last := deltas[-1], Reasoning):
            deltas[-1] = Reasoning(last.text + text)
        elif text:
            deltas.append(Reasoning(text))

    def start(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; `call_id` where the model wrote one."""
        self.seen += 1
        self._dropping = self.calls > 0 and not self._parallel
        if not self._dropping:
            call_id = call_id or self._new_id(name, self.calls)
            self._deltas.append(ToolCallStart(self.calls, call_id, name))
            self.calls += 1

    def arguments(self, text: str) -> None:
        """Add JSON text to the arguments of the call begun last."""
        if self._dropping or not text:
            return
        deltas, index = self._deltas, self.calls - 1
        if isinstance(last := deltas[-1] if deltas else None, ToolArguments):
            deltas[-1] = ToolArguments(index, last.text + text)
        else:
            deltas.append(ToolArguments(index, text))

    def take(self) -> list[Delta]:
        """Hand over what was collected."""
        deltas = self._deltas
        if deltas:
            self._deltas = []
        return deltas


class Stage(Protocol):
    """A part of the chain: takes text, puts what it finds into an `Output`."""

    def push(self, text: str) -> None:
        """Take more text, not empty."""
        ...

    def finish(self) -> None:
        """There is no more text: let go of what is held."""
        ...

    @property
    def thinking(self) -> bool:
        """Whether the next text would be part of the thoughts."""
        ...


class Plain:
    """The end of a chain without tools: all text is content."""

    __slots__ = ("_out",)
    thinking = False

    def __init__(self, out: Output) -> None:
        self._out = out

    def push(self, text: str) -> None:
        """All of it is content."""
        self._out.content(text)

    def finish(self) -> None:
        """Nothing is held."""


class ChainParser:
    """An `OutputParser` over a chain of stages."""

    __slots__ = ("_head", "_out")

    def __init__(self, head: Stage, out: Output) -> None:
        self._head = head
        self._out = out

    def push(self, text: str) -> list[Delta]:
        """Take more text; what may still become a marker is held back."""
        if not text:
            return []
        self._head.push(text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        """The choice is over: release what is held."""
        self._head.finish()
        return self._out.take()

    @property
    def thinking(self) -> bool:
        """Whether text pushed now would be (as far as known) part of the thoughts."""
        return self._head.thinking

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._out.calls
