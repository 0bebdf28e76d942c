"""A control channel: calls one way, events the other, over one unix socket.

A frame is a pickle behind its length. The campaign (`Control`) calls; the process at the other
end (`serve`) answers, and tells events of its own accord.
"""

import asyncio
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, cast

_HEAD = struct.Struct("<I")
Handler = Callable[..., Awaitable[Any]]


class Lost(Exception):
    """The process at the other end is gone."""


class CallFailed(Exception):
    """It answered with an error."""


def write_frame(sock: socket.socket, value: object) -> None:
    """Blocking, for what happens before a loop runs."""
    body = pickle.dumps(value)
    sock.sendall(_HEAD.pack(len(body)) + body)


def read_frame(sock: socket.socket) -> Any:
    """Blocking. Raises EOFError at the other end's end."""
    (size,) = _HEAD.unpack(_exactly(sock, _HEAD.size))
    return pickle.loads(_exactly(sock, size))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


class _Frames(asyncio.Protocol):
    def __init__(self, on_frame: Callable[[Any], None], on_lost: Callable[[], None]) -> None:
        self._buffer = bytearray()
        self._on_frame = on_frame
        self._on_lost = on_lost
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._buffer)
            if len(self._buffer) < _HEAD.size + size:
                return
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + size])
            del self._buffer[: _HEAD.size + size]
            self._on_frame(pickle.loads(body))

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()

    def send(self, value: object) -> None:
        if self.transport is not None and not self.transport.is_closing():
            body = pickle.dumps(value)
            self.transport.write(_HEAD.pack(len(body)) + body)


class Control:
    """The campaign's end."""

    def __init__(self, on_event: Callable[[str, Any], None], on_lost: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_lost = on_lost
        self._next = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._frames = _Frames(self._frame, self._gone)
        self.lost = False

    async def attach(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._frames, sock=sock)

    async def call(self, method: str, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Run a handler there.

        Raises:
            Lost: the process is gone.
            CallFailed: the handler raised; the message says what.
            TimeoutError: no answer.
        """
        if self.lost:
            raise Lost
        self._next += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[self._next] = future
        number = self._next
        self._frames.send((number, method, arguments))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Hang up."""
        if self._frames.transport is not None:
            self._frames.transport.abort()

    def _frame(self, frame: Any) -> None:
        kind, key, value = frame
        if kind == "event":
            self._on_event(key, value)
            return
        future = self._waiting.get(key)
        if future is not None and not future.done():
            if kind == "reply":
                future.set_result(value)
            else:
                future.set_exception(CallFailed(value))

    def _gone(self) -> None:
        self.lost = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Lost())
        self._on_lost()


class Served:
    """The process's end: `handlers` answer calls by name."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._frames = _Frames(self._frame, self._gone)
        self._tasks: set[asyncio.Task[None]] = set()
        self.over = asyncio.Event()

    async def attach(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        sock.setblocking(False)
        await self._loop.create_unix_connection(lambda: self._frames, sock=sock)

    def tell(self, name: str, value: Any = None) -> None:
        """Send an event; from any thread."""
        self._loop.call_soon_threadsafe(self._frames.send, ("event", name, value))

    def _frame(self, frame: Any) -> None:
        task = asyncio.create_task(self._answer(*frame))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, method: str, arguments: dict[str, Any]) -> None:
        try:
            value = await self._handlers[method](**arguments)
        except Exception as error:
            self._frames.send(("error", number, f"{method}: {type(error).__name__}: {error}"))
            return
        self._frames.send(("reply", number, value))

    def _gone(self) -> None:
        self.over.set()
