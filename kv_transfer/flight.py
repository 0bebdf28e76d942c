"""The reads that belong together, as the event loop sees them."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from contracts.errors import TransferFailed

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ReadResult:
    """How one or more reads ended. `seconds`: from the first post to the last end."""

    ok: bool
    num_bytes: int
    num_descriptors: int
    seconds: float
    error: str = ""


def failed(error: str, seconds: float = 0.0) -> ReadResult:
    """One that did not end well."""
    return ReadResult(False, 0, 0, seconds, error)


def running_future() -> Future[_T]:
    """A future whose waiters cannot cancel it."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class Flight:
    """The reads of one `reading.read`. Touched on the event loop only, but for `_tell`.

    `on_terminal` is called once, when none of them can write local memory any more.
    """

    loop: asyncio.AbstractEventLoop
    on_terminal: Callable[[], None] | None
    num_bytes: int = 0
    num_descriptors: int = 0
    pending: Counter[int] = field(default_factory=Counter[int])  # by lane
    following: int = 0  # of those that come after, the ones that are not terminal
    following_s: float = 0.0
    error: str = ""
    sealed: bool = False
    landed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, lane: int, future: Future[ReadResult]) -> None:
        """Count a posted read in."""
        self.pending[lane] += 1

        def land(result: ReadResult) -> None:
            self._land(lane, result)

        future.add_done_callback(lambda _: self._tell(land, future.result()))

    def follow(self, future: Future[ReadResult]) -> None:
        """Count in a read that comes after all others."""
        self.following += 1
        future.add_done_callback(lambda _: self._tell(self._followed, future.result()))

    async def room(self, lanes: Collection[int], depth: int) -> int:
        """Wait until one of `lanes` has fewer than `depth` reads pending: which.

        Raises:
            TransferFailed: a read failed.
        """
        await self._until(lambda: any(self.pending[lane] < depth for lane in lanes))
        return min(lanes, key=lambda lane: self.pending[lane])

    async def over(self) -> None:
        """Wait until all of them are.

        Raises:
            TransferFailed: one of them failed.
        """
        await self._until(lambda: not self._open)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not self.error and not condition():
            self.landed.clear()
            await self.landed.wait()
        if self.error:
            raise TransferFailed(self.error)

    def seal(self) -> None:
        """No read will be added any more."""
        self.sealed = True
        self._report()

    @property
    def _open(self) -> bool:
        return self.following > 0 or self.pending.total() > 0

    def _tell(self, fact: Callable[[ReadResult], None], result: ReadResult) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self.loop.call_soon_threadsafe(fact, result)

    def _land(self, lane: int, result: ReadResult) -> None:
        self.pending[lane] -= 1
        self.num_bytes += result.num_bytes
        self.num_descriptors += result.num_descriptors
        self._ended(result)

    def _followed(self, result: ReadResult) -> None:
        self.following -= 1
        self.following_s = max(self.following_s, result.seconds)
        self._ended(result)

    def _ended(self, result: ReadResult) -> None:
        if not result.ok and not self.error:
            self.error = result.error
        self.landed.set()
        self._report()

    def _report(self) -> None:
        if self.sealed and not self._open and self.on_terminal is not None:
            callback, self.on_terminal = self.on_terminal, None
            callback()
