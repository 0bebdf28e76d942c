"""Text that arrives in pieces, read by generators as if it were there as a whole."""

import re
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from router.parsers.output import Output

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A parser's run: it yields when it needs more text, and in the end returns a T."""

Emit = Callable[[str], None]

_SPACE = re.compile(r"\s*")


class Markers:
    """Texts to be found. None may stand inside another one other than at its end."""

    __slots__ = ("firsts", "longest", "pattern", "words")

    def __init__(self, *words: str) -> None:
        self.words = words
        self.firsts = tuple(sorted({word[0] for word in words}))
        self.longest = max(map(len, words), default=0)
        # Without words: a pattern that never matches.
        self.pattern = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def partial(self, text: str, start: int) -> int:
        """Where, from `start` on, the end of `text` may be the beginning of a marker, else its end.

        A marker that is complete is not looked at.
        """
        low = max(start, len(text) - self.longest + 1)
        if not any(text.find(first, low) >= 0 for first in self.firsts):
            return len(text)
        for index in range(low, len(text)):
            if text[index] in self.firsts:
                rest = text[index:]
                if any(len(rest) < len(word) and word.startswith(rest) for word in self.words):
                    return index
        return len(text)


class Source:
    """The text that has arrived and was not used yet.

    `text[at:]` is to be read. From `mark()` on nothing is forgotten, so that a reading that fails
    can be undone; `commit()` makes it final. Positions shift whenever text arrives: after a
    `yield` only `at` and distances from it hold.
    """

    __slots__ = ("_mark", "at", "ended", "firsts", "sink", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        # Set while all is read and text without any of the characters `firsts` goes there.
        self.sink: Emit | None = None
        self.firsts: tuple[str, ...] = ()
        self._mark: int | None = None

    def feed(self, text: str) -> None:
        """More text has arrived."""
        used = self.at if self._mark is None else self._mark
        if used:
            self.text = self.text[used:] + text
            self.at -= used
            if self._mark is not None:
                self._mark = 0
        else:
            self.text += text

    def mark(self, back: int = 0) -> None:
        """Remember the place `back` characters before this one."""
        self._mark = self.at - back

    def commit(self) -> None:
        """What was read stays read."""
        self._mark = None

    def since_mark(self) -> int:
        """How many characters were read since the mark."""
        return self.at - (self.at if self._mark is None else self._mark)

    def undo(self, keep: int = 0) -> str:
        """Go back to `keep` characters behind the mark; returns these. The mark is gone."""
        mark = self.at if self._mark is None else self._mark
        self._mark = None
        self.at = mark + keep
        return self.text[mark : self.at]

    def peek(self) -> Steps[str]:
        """The next character, not read; empty at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Steps[None]:
        """Read white space."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return
            yield

    def literal(self, word: str) -> Steps[bool]:
        """Read `word` if it comes next."""
        while not self.text.startswith(word, self.at):
            if self.ended or not word.startswith(self.text[self.at : self.at + len(word)]):
                return False
            yield
        self.at += len(word)
        return True

    def either(self, markers: Markers) -> Steps[str | None]:
        """Read the marker that comes next, if one does."""
        while True:
            if match := markers.pattern.match(self.text, self.at):
                self.at = match.end()
                return match.group()
            rest = self.text[self.at : self.at + markers.longest]
            if self.ended or not any(word.startswith(rest) for word in markers.words):
                return None
            yield

    def cut(self, markers: Markers) -> bool:
        """Whether the text ends here, at most with the beginning of a marker, which is read."""
        rest = self.text[self.at :]
        if self.ended and (not rest or any(word.startswith(rest) for word in markers.words)):
            self.at = len(self.text)
            return True
        return False

    def run(self, pattern: re.Pattern[str], limit: int = 256) -> Steps[str]:
        """Read as many characters as match `pattern` (one character's), `limit` at most."""
        found = 0
        while True:
            while self.at + found < len(self.text) and found < limit:
                if not pattern.match(self.text, self.at + found):
                    break
                found += 1
            else:
                if found < limit and not self.ended:
                    yield
                    continue
            word = self.text[self.at : self.at + found]
            self.at += found
            return word

    def until(self, markers: Markers, emit: Emit) -> Steps[str | None]:
        """Give the text up to the next marker to `emit` and read the marker.

        Returns:
            The marker, or None at the end.
        """
        while True:
            match = markers.pattern.search(self.text, self.at)
            start = match.start() if match else len(self.text)
            stop = start if self.ended else min(start, markers.partial(self.text, self.at))
            if stop > self.at:
                emit(self.text[self.at : stop])
                self.at = stop
            if match and stop == start:
                self.at = match.end()
                return match.group()
            if self.ended:
                return None
            if self.at == len(self.text):
                self.sink, self.firsts = emit, markers.firsts
            yield
            self.sink = None

    def upto(self, markers: Markers, limit: int) -> Steps[tuple[str, str] | None]:
        """Read at most `limit` characters and a marker behind them.

        Returns:
            Text and marker; None, and nothing is read, if no marker comes so soon.
        """
        while True:
            match = markers.pattern.search(self.text, self.at)
            start = match.start() if match else markers.partial(self.text, self.at)
            if start - self.at > limit or (not match and self.ended):
                return None
            if match:
                text = self.text[self.at : start]
                self.at = match.end()
                return text, match.group()
            yield


NO_MARKERS = Markers()


class Grammar(Protocol):
    """Reads all of a text, to its end, whatever it is."""

    def read(self, source: Source, out: Output) -> Steps[None]:
        """Read it."""
        ...

    @property
    def thinking(self) -> bool:
        """Whether the next text would be part of the thoughts."""
        ...


class Reader:
    """A stage that is a grammar."""

    __slots__ = ("_grammar", "_source", "_steps")

    def __init__(self, grammar: Grammar, out: Output) -> None:
        self._grammar = grammar
        self._source = Source()
        self._steps: Steps[None] | None = grammar.read(self._source, out)

    def push(self, text: str) -> None:
        """Take more text; what cannot be part of a marker goes on at once."""
        source = self._source
        sink = source.sink
        if sink is not None:
            for first in source.firsts:
                if first in text:
                    break
            else:
                sink(text)
                return
        source.feed(text)
        self._advance()

    def finish(self) -> None:
        """There is no more text."""
        self._source.ended = True
        self._advance()

    @property
    def thinking(self) -> bool:
        """Whether the next text would be part of the thoughts."""
        return self._grammar.thinking

    def _advance(self) -> None:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
