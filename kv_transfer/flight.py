"""The reads that belong together, as the event loop sees them."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from contracts.errors import TransferFailed


@dataclass(frozen=True, slots=True)
class ReadResult:
    """How one or more reads ended. `seconds`: from the first post to the last end."""

    ok: bool
    num_bytes: int
    num_descriptors: int
    seconds: float
    error: str = ""


@dataclass(slots=True, eq=False)
class Flight:
    """The reads of one `read` call. Touched on the event loop only, but for `_tell`.

    `on_terminal` is called once, when none of them can write local memory any more.
    """

    loop: asyncio.AbstractEventLoop
    on_terminal: Callable[[], None] | None
    num_bytes: int = 0
    num_descriptors: int = 0
    pending: int = 0
    following: bool = False  # the one that follows them is not terminal
    following_s: float = 0.0
    error: str = ""
    sealed: bool = False
    landed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, future: Future[ReadResult]) -> None:
        """Count a posted read in."""
        self.pending += 1
        future.add_done_callback(lambda _: self._tell(self._land, future.result()))

    def follow(self, future: Future[ReadResult]) -> None:
        """Count in the read that comes after all others."""
        self.following = True
        future.add_done_callback(lambda _: self._tell(self._followed, future.result()))

    async def until_below(self, limit: int) -> None:
        """Wait until fewer than `limit` reads are pending; 0: until all is over.

        Raises:
            TransferFailed: one of them failed.
        """
        while not self.error and (self.pending >= limit if limit else self._open):
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
        return self.following or self.pending > 0

    def _tell(self, fact: Callable[[ReadResult], None], result: ReadResult) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self.loop.call_soon_threadsafe(fact, result)

    def _land(self, result: ReadResult) -> None:
        self.pending -= 1
        self.num_bytes += result.num_bytes
        self.num_descriptors += result.num_descriptors
        self._ended(result)

    def _followed(self, result: ReadResult) -> None:
        self.following = False
        self.following_s = result.seconds
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
