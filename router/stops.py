"""Stop strings, found in the generated text across token borders."""

from collections.abc import Sequence


class _Matcher:
    """Knuth-Morris-Pratt over one stop string; the table grows only as far as it is needed.

    `state` is the length of the longest end of the text that may grow into the stop string.
    """

    __slots__ = ("_borders", "needle", "state")

    def __init__(self, needle: str) -> None:
        self.needle = needle
        self.state = 0
        self._borders = [0, 0]  # [k]: longest proper border of needle[:k]

    def push(self, char: str) -> bool:
        """Take one character; True: the stop string is complete."""
        state, needle, borders = self.state, self.needle, self._borders
        while state and needle[state] != char:
            state = borders[state]
        if needle[state] == char:
            state += 1
        if state == len(borders):
            self._extend(state)
        complete = state == len(needle)
        self.state = borders[state] if complete else state
        return complete

    def _extend(self, length: int) -> None:
        """Compute the border of needle[:length], given all the shorter ones."""
        needle, borders = self.needle, self._borders
        border = borders[length - 1]
        while border and needle[border] != needle[length - 1]:
            border = borders[border]
        borders.append(border + 1 if needle[border] == needle[length - 1] else border)


class StopStrings:
    """Lets text through up to what may still become a stop string.

    The stop string that is complete first wins; of several that end at the same character, the
    longest. The text is cut before it, or after it with `include`. What is let through never has
    to be taken back: it is held as long as it is the beginning of a stop string, and no longer.
    """

    __slots__ = ("_held", "_include", "_matchers", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, heed: bool = True) -> str:
        """Take new text, return what may be shown. After a match nothing more is shown.

        Without `heed` a stop string that is complete in this text means nothing; one that begins
        in it may still match later.
        """
        if not self._matchers:
            return text
        if self.matched is not None:
            return ""
        buffer = self._held + text
        for index, char in enumerate(text, len(self._held)):
            hits = [matcher.needle for matcher in self._matchers if matcher.push(char)]
            if hits and heed:
                self.matched = hits[0]
                self._held = ""
                return buffer[: index + 1 - (0 if self._include else len(hits[0]))]
        if self._include:
            return text
        keep = max(matcher.state for matcher in self._matchers)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut]

    def finish(self) -> str:
        """The end without a match: release what is held."""
        held, self._held = self._held, ""
        return held
