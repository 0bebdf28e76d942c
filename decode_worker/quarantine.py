"""Which reads of a D may still write its memory, and how long that has been so (Q1, Q2)."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Posted:
    blocks: tuple[int, ...]
    since: float | None = None  # in quarantine


class Quarantine:
    """All reads that are not terminal, from `posted` to `terminal`. On the event loop only.

    Args:
        give_free: called with blocks that left the quarantine.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        give_free: Callable[[tuple[int, ...]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._give_free = give_free
        self._clock = clock
        self._posted: dict[Hashable, _Posted] = {}
        self._ending: dict[Hashable, _Posted] = {}

    def posted(self, read: Hashable, blocks: Sequence[int]) -> None:
        """A read into `blocks` begins."""
        self._posted[read] = _Posted(tuple(blocks))

    def begin(self, reads: Sequence[Hashable]) -> set[int]:
        """These reads' request is over, they are not. Returns the blocks they may write."""
        blocks: set[int] = set()
        for read in reads:
            posted = self._posted[read]
            posted.since = self._clock()
            blocks |= set(posted.blocks)
        return blocks

    def terminal(self, read: Hashable) -> None:
        """It is: nothing of it writes any more."""
        posted = self._posted.pop(read)
        if posted.since is not None:
            self._ending[read] = posted

    def end(self, read: Hashable) -> None:
        """Free what it held; after `terminal`."""
        self._give_free(self._ending.pop(read).blocks)

    def blocks(self) -> Counter[int]:
        """Quarantined blocks, with the number of reads that hold each."""
        held: Counter[int] = Counter()
        for posted in self._posted.values():
            if posted.since is not None:
                held.update(posted.blocks)
        return held

    @property
    def oldest_s(self) -> float:
        """For how long the oldest of them has been quarantined; 0 without any."""
        since = [p.since for p in self._posted.values() if p.since is not None]
        return self._clock() - min(since) if since else 0.0
