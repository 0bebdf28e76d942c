"""A TCP proxy whose wire can be cut, stalled one way or both, and healed."""

import asyncio
import socket
import struct
from typing import Literal, cast

Way = Literal["up", "down"]  # from who dialled; to who dialled
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class _End(asyncio.Protocol):
    """One of the two connections of a pair."""

    def __init__(self, wire: "Proxy", way: Way) -> None:
        self._wire = wire
        self._way: Way = way  # of what arrives here
        self._held = bytearray()
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire.ends.add(self)
        if self._way == "up":
            self._wire.dial(self)

    def data_received(self, data: bytes) -> None:
        if self._held or self.other is None or self._way in self._wire.stalled:
            self._held += data
            return
        self._forward(data)

    def _forward(self, data: bytes) -> None:
        to = None if self.other is None else self.other.transport
        if to is not None and not to.is_closing():
            to.write(data)

    def flush(self) -> None:
        """Pass on what was held, if nothing holds it any more."""
        if self._held and self.other is not None and self._way not in self._wire.stalled:
            data, self._held = bytes(self._held), bytearray()
            self._forward(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._wire.ends.discard(self)
        other, self.other = self.other, None
        if other is not None:
            other.flush()
            if other.transport is not None:
                other.transport.close()

    def reset(self) -> None:
        """Close with RST, as a broken network does not but a crashed host's kernel does."""
        if self.transport is None:
            return
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


class Proxy:
    """Listens on `port` and forwards to `target`. Stalled ways keep their bytes until healed."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.stalled: set[Way] = set()
        self.ends: set[_End] = set()
        self._server: asyncio.Server | None = None
        self._dialling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self, "up"), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def dial(self, end: _End) -> None:
        """Connect an accepted connection through."""
        task = asyncio.create_task(self._dial(end))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial(self, end: _End) -> None:
        loop = asyncio.get_running_loop()
        while len(self.stalled) == 2 and end in self.ends:  # noqa: ASYNC110 - a dead wire
            await asyncio.sleep(0.02)
        try:
            _, far = await loop.create_connection(
                lambda: _End(self, "down"), "127.0.0.1", self.target
            )
        except OSError:
            end.reset()
            return
        if end not in self.ends:
            far.reset()
            return
        far.other, end.other = end, far
        end.flush()
        far.flush()

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        for end in list(self.ends):
            end.reset()

    def stall(self, *ways: Way) -> None:
        """Let nothing through that way."""
        self.stalled |= set(ways)

    def heal(self) -> None:
        """Let everything through again, what was held first."""
        self.stalled.clear()
        for end in list(self.ends):
            end.flush()

    async def close(self) -> None:
        """End."""
        for task in list(self._dialling):
            task.cancel()
        self.cut()
        if self._server is not None:
            self._server.close()
            await asyncio.sleep(0)
