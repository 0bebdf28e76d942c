"""An output parser small enough to be right at a glance: `<t>thoughts</t>`, `<c>name|json</c>`."""

from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart

_MARKERS = {
    "content": {"<t>": "thoughts", "<c>": "name"},
    "thoughts": {"</t>": "content"},
    "name": {"|": "arguments"},
    "arguments": {"</c>": "content"},
}


class TinyParser:
    """Starts in the thoughts if `thinking`. A name is held until it is complete."""

    def __init__(self, *, thinking: bool = False) -> None:
        self.calls = 0
        self._mode = "thoughts" if thinking else "content"
        self._buffer = ""

    @property
    def thinking(self) -> bool:
        return self._mode == "thoughts"

    def push(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        self._buffer += text
        while True:
            markers = _MARKERS[self._mode]
            found = [(at, m) for m in markers if (at := self._buffer.find(m)) >= 0]
            if not found:
                break
            at, marker = min(found)
            before, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            deltas += [self._delta(before)] if before or self._mode == "name" else []
            self._mode = markers[marker]
        if self._mode != "name":
            keep = self._held()
            shown = self._buffer[: len(self._buffer) - keep]
            self._buffer = self._buffer[len(shown) :]
            deltas += [self._delta(shown)] if shown else []
        return deltas

    def finish(self) -> list[Delta]:
        rest, self._buffer = self._buffer, ""
        if self._mode == "name":  # no call after all
            return [Content("<c>" + rest)]
        return [self._delta(rest)] if rest else []

    def _held(self) -> int:
        """Characters at the buffer's end that may become a marker."""
        markers = _MARKERS[self._mode]
        return max(
            size
            for marker in markers
            for size in range(len(marker))
            if self._buffer.endswith(marker[:size])
        )

    def _delta(self, text: str) -> Delta:
        match self._mode:
            case "content":
                return Content(text)
            case "thoughts":
                return Reasoning(text)
            case "name":
                self.calls += 1
                return ToolCallStart(self.calls - 1, f"id{self.calls - 1}", text)
            case _:
                return ToolArguments(self.calls - 1, text)
