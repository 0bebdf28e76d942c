"""The bounded buffer between a request's events and the client that reads its answer."""

import asyncio

from contracts.errors import Overloaded, ServingError
from router.pieces import Piece


class SlowReader(Overloaded):
    """The client reads more slowly than the answer grows; its buffer is full."""


class Outbox:
    """Pieces in order, then the end or an error. One reader; the writer never waits."""

    def __init__(self, limit_bytes: int | None) -> None:
        """`limit_bytes` None: no bound (an answer that is gathered, not streamed)."""
        self._limit = limit_bytes
        self._pieces: list[Piece] = []
        self._bytes = 0
        self._closed = False
        self._error: ServingError | None = None
        self._wake = asyncio.Event()
        self._overflowed = asyncio.Event()

    def put(self, piece: Piece) -> None:
        """Add a piece.

        Raises:
            SlowReader: the buffer is full; the piece was not added.
        """
        size = piece.num_bytes
        if self._limit is not None and self._bytes + size > self._limit:
            self._overflowed.set()
            raise SlowReader(f"the client left {self._bytes} bytes of the answer unread")
        self._bytes += size
        self._pieces.append(piece)
        self._wake.set()

    def close(self, error: ServingError | None = None) -> None:
        """Nothing more comes; the first call decides."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._wake.set()

    async def ready(self) -> None:
        """Wait for the first piece or the end.

        Raises:
            ServingError: the request failed before it had anything to say.
        """
        await self._wake.wait()
        if not self._pieces and self._error is not None:
            raise self._error

    @property
    def over(self) -> bool:
        """Whether the end has come and everything was taken."""
        return self._closed and not self._pieces

    def nudge(self) -> None:
        """Make a waiting `take` return, with nothing if there is nothing."""
        self._wake.set()

    async def take(self) -> list[Piece]:
        """All pieces that have gathered; empty at the end, or after a `nudge`.

        Raises:
            ServingError: the request failed; all pieces before that were taken.
        """
        await self._wake.wait()
        pieces, self._pieces, self._bytes = self._pieces, [], 0
        if self._closed:
            if not pieces and self._error is not None:
                raise self._error
        else:
            self._wake.clear()
        return pieces

    async def overflowed(self) -> None:
        """Return when a piece did not fit any more."""
        await self._overflowed.wait()
