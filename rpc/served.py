"""The streams that a servicer serves now, so that it can end them all and wait for that."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from contracts.errors import Unavailable
from rpc.duplex import Duplex

_GONE_TIMEOUT_S = 5.0


class HasDuplex(Protocol):
    """One end of a stream."""

    @property
    def duplex(self) -> Duplex[Any, Any]:
        """What runs it."""


S = TypeVar("S", bound=HasDuplex)


class Served(Generic[S]):
    """Streams by identity, each with an event that is set when its handler has let go of it."""

    def __init__(self) -> None:
        self.closing = False
        self._gone: dict[S, asyncio.Event] = {}

    @contextmanager
    def serving(self, stream: S) -> Iterator[None]:
        """While the handler holds `stream`; its last word to the service falls in here."""
        gone = self._gone[stream] = asyncio.Event()
        try:
            yield
        finally:
            del self._gone[stream]
            gone.set()

    async def gone(self, stream: S) -> None:
        """Wait until the handler of an ended stream has let go of it.

        Raises:
            Unavailable: it did not within seconds.
        """
        event = self._gone.get(stream)
        if event is None:
            return
        try:
            async with asyncio.timeout(_GONE_TIMEOUT_S):
                await event.wait()
        except TimeoutError:
            raise Unavailable("an older session does not end") from None

    async def close(self, grace_s: float, reason: str) -> None:
        """Let every stream write what it has gathered, then end it; `grace_s` for all together."""
        self.closing = True
        for stream in self._gone:
            stream.duplex.finish(reason)
        events = list(self._gone.values())
        try:
            async with asyncio.timeout(grace_s):
                for event in events:
                    await event.wait()
        except TimeoutError:
            for stream in list(self._gone):
                stream.duplex.end(reason)
                await self.gone(stream)
