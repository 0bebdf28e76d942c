"""Who may reserve memory next: the lowest priority number, then the first to come."""

import asyncio
from bisect import insort
from types import TracebackType


class Turn:
    """A place in the line, from `with` to its end. It may be overtaken until it leaves."""

    def __init__(self, line: "Line", order: tuple[int, int]) -> None:
        self.order = order
        self._line = line
        self._changed = asyncio.Event()

    async def come(self) -> None:
        """Wait until nobody is before this one; at once if it stands first."""
        while not self._line.first(self):
            self._changed.clear()
            await self._changed.wait()

    def wake(self) -> None:
        """Look again whether it is first."""
        self._changed.set()

    def __enter__(self) -> "Turn":
        self._line.join(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.leave(self)


class Line:
    """Those who wait for their turn, and the one who has it, in order. On one event loop."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._turns)

    def turn(self, priority: int) -> Turn:
        """A new place; lower `priority` goes first."""
        self._arrivals += 1
        return Turn(self, (priority, self._arrivals))

    def first(self, turn: Turn) -> bool:
        """Whether nobody is before `turn`."""
        return self._turns[0] is turn

    def join(self, turn: Turn) -> None:
        """Stand in line."""
        insort(self._turns, turn, key=lambda t: t.order)

    def leave(self, turn: Turn) -> None:
        """Leave it, from whichever place."""
        self._turns.remove(turn)
        if self._turns:
            self._turns[0].wake()
