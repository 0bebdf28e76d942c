"""What both grammar backends share: the form of a compiled grammar, and how an output ends."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.guide import Matcher


class TextMatcher(Protocol):
    """A grammar's state over text tokens, as a backend has it; it knows of no end tokens."""

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may follow and no others; none of them ends anything.

        Raises:
            EngineFailure: the grammar became too large to go on.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take a token; False: it may not follow, and nothing has changed."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole one."""
        ...


class TextGrammar(Protocol):
    """A grammar that a backend has ready. Any thread may start matchers."""

    @property
    def num_bytes(self) -> int:
        """About how much memory it holds."""
        ...

    def matcher(self) -> TextMatcher:
        """A state at the beginning."""
        ...


def clear(bitmask: NDArray[np.int32], token_ids: tuple[int, ...]) -> None:
    """Take the bits of some tokens out."""
    for token in token_ids:
        bitmask.view(np.uint32)[token // 32] &= ~np.uint32(1 << (token % 32))


class EndingMatcher:
    """Adds the end tokens to a text matcher: once the text is complete, and only then.

    An end token ends, even if it is also a text.
    """

    def __init__(self, text: TextMatcher, end_token_ids: tuple[int, ...]) -> None:
        self._text = text
        self._ends = end_token_ids
        self._ended = False

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        """Set the bits of all tokens that may follow and no others; none once it has ended."""
        if self._ended:
            bitmask[:] = 0
            return
        self._text.fill(bitmask)
        complete = self._text.complete
        clear(bitmask, self._ends)
        if complete:
            for token in self._ends:
                bitmask.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))

    def accept(self, token_id: int) -> bool:
        """Take a token; False: it may not follow, and nothing has changed."""
        if self._ended:
            return False
        if token_id in self._ends:
            self._ended = self._text.complete
            return self._ended
        return self._text.accept(token_id)

    @property
    def ended(self) -> bool:
        """Whether an end token was taken after the grammar was complete."""
        return self._ended


@dataclass(frozen=True, slots=True, eq=False)
class ReadyGrammar:
    """A compiled grammar with the end tokens of a request."""

    text: TextGrammar
    end_token_ids: tuple[int, ...]

    def matcher(self) -> Matcher:
        """A state at the beginning."""
        return EndingMatcher(self.text.matcher(), self.end_token_ids)
