"""What a client sees of a choice, piece by piece, and who makes it out of the text."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins: `index` counts the choice's calls from 0; the name is complete."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A further piece of a call's arguments; joined they are its JSON text."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCallStart | ToolArguments


class OutputParser(Protocol):
    """Splits one choice's text into thoughts, calls and content.

    Never raises on anything a model may write, never takes back what it returned, and the joined
    result does not depend on how the text was cut into pieces.
    """

    def push(self, text: str) -> list[Delta]:
        """Take more text; what may still become a marker is held back."""
        ...

    def finish(self) -> list[Delta]:
        """The choice is over: release what is held. Nothing is pushed afterwards."""
        ...

    @property
    def thinking(self) -> bool:
        """Whether text pushed now would be (as far as known) part of the thoughts."""
        ...

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        ...
