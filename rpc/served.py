"""The streams that a servicer serves now, so that it can end them all and wait for that."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from contracts.errors import Unavailable
from rpc.duplex import Duplex

_log = logging.getLogger(__name__)

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
        """Let every stream write what it has gathered, then end it; `grace_s` for all together.

        Returns within seconds of that, whatever they do.
        """
        self.closing = True
        for stream in self._gone:
            stream.duplex.finish(reason)
        events = list(self._gone.values())
        if await _all_set(events, grace_s):
            return
        for stream in self._gone:
            stream.duplex.end(reason)
        if not await _all_set(events, _GONE_TIMEOUT_S):
            _log.error("%d streams do not end", len(self._gone))


async def _all_set(events: list[asyncio.Event], timeout_s: float) -> bool:
    """Whether all were set in time."""
    try:
        async with asyncio.timeout(timeout_s):
            for event in events:
                await event.wait()
    except TimeoutError:
        return False
    return True
