"""What a worker looks after again and again, such as requests that outlive their deadline."""

import asyncio
import heapq
import logging
import time
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
_EVERY_S = 0.1
_SPARE = 64  # keys kept although they are over
_GRACE_S = 1.0  # the router's own clock comes first

K = TypeVar("K", bound=Hashable)


class Overdue(Generic[K]):
    """Keys by deadline. One that is over earlier is still told; whoever hears it looks.

    Args:
        clock: monotonic seconds.
        grace_s: added to every deadline.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, grace_s: float = _GRACE_S
    ) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self._heap: list[tuple[float, int, K]] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: K, deadline_s: float | None) -> None:
        """`deadline_s` from now, the key is due. None: never."""
        if deadline_s is not None:
            self._added += 1
            due = self._clock() + deadline_s + self._grace_s
            heapq.heappush(self._heap, (due, self._added, key))

    def tell(self, expire: Callable[[K], None], live: Collection[K] | None = None) -> None:
        """Call `expire` with each key whose time has come, once.

        Keys that are not in `live` may be dropped: deadlines are long, and requests are short.
        """
        if live is not None and len(self._heap) > 2 * len(live) + _SPARE:
            self._heap = [entry for entry in self._heap if entry[2] in live]
            heapq.heapify(self._heap)
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            expire(heapq.heappop(self._heap)[2])


def start_housekeeping(*chores: Callable[[], None]) -> "asyncio.Task[None]":
    """Do all chores ten times a second until cancelled; one that raises is logged."""

    async def keep_house() -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            for chore in chores:
                try:
                    chore()
                except Exception:  # without it no lease would ever end again
                    log.exception("housekeeping")

    return asyncio.create_task(keep_house(), name="baton-housekeeping")
