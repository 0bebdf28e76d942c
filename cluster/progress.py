"""The lines that `baton serve` writes while it starts."""

import sys
import time
from typing import TextIO

_FRAMES = "|/-\\"


class Progress:
    """One line that changes on a terminal; one line a stage elsewhere."""

    def __init__(self, started_at: float, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.started_at = started_at
        self._terminal = self._stream.isatty()
        self._text = ""
        self._frame = 0
        self.stages: list[tuple[float, str]] = []

    def stage(self, text: str, at: float) -> None:
        """A new stage began at `at` (time.monotonic())."""
        self.stages.append((at - self.started_at, text))
        self._text = text
        if not self._terminal:
            self._write(f"[{at - self.started_at:5.1f} s] {text}\n")

    def tick(self) -> None:
        """Move the line a little."""
        if self._terminal and self._text:
            self._frame += 1
            sign = _FRAMES[self._frame % len(_FRAMES)]
            elapsed_s = time.monotonic() - self.started_at
            self._write(f"\r\x1b[K{sign} {elapsed_s:4.1f} s  {self._text}")

    def clear(self) -> None:
        """Take the line away."""
        if self._terminal and self._text:
            self._write("\r\x1b[K")
        self._text = ""

    def timings(self, ended_at: float) -> None:
        """A table of the stages' durations, in seconds."""
        ends = [at for at, _ in self.stages[1:]] + [ended_at - self.started_at]
        for (at, text), end in zip(self.stages, ends, strict=True):
            self._write(f"  {at:6.2f}  +{end - at:5.2f}  {text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
