"""A plain HTTP/1.1 client that can leave, or stop reading, at any moment."""

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, cast

Json = dict[str, Any]


@dataclass(eq=False)
class Reply:
    """What came back. `complete`: the HTTP message ended as it should."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    complete: bool = False
    left: bool = False  # the client went away itself
    problem: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def json(self) -> Json:
        """A full answer or an error."""
        value: Json = json.loads(self.body)
        return value

    def events(self) -> tuple[list[Json], bool]:
        """A stream's events, and whether [DONE] came after them."""
        done = False
        found: list[Json] = []
        for part in self.body.split(b"\n\n")[:-1]:  # what follows the last blank line is torn
            data = part.removeprefix(b"data: ")
            if data == b"[DONE]":
                done = True
            elif part.startswith(b"data: "):
                found.append(json.loads(data))
        return found, done


class Client:
    """One request on a connection of its own."""

    def __init__(self, port: int, path: str, body: Json, label: str, *, slow: bool = False) -> None:
        self.reply = Reply()
        self.body = body
        self.label = label  # X-Request-Id
        self.tokens_seen = asyncio.Event()  # the first bytes of the body came
        self._port = port
        self._path = path
        self._slow = slow
        self._reading = asyncio.Event()
        self._reading.set()
        self._writer: asyncio.StreamWriter | None = None
        self._left = False

    async def run(self) -> Reply:
        """Send and read to the end, or until `leave`. Never raises."""
        reply = self.reply
        reply.started_at = time.monotonic()
        try:
            await self._exchange(reply)
        except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as error:
            reply.problem = f"{type(error).__name__}: {error}"
        finally:
            reply.ended_at = time.monotonic()
            reply.left = self._left
            if self._writer is not None:
                self._writer.transport.abort()
        return reply

    def leave(self, *, abruptly: bool) -> float:
        """Go away now; the moment."""
        self._left = True
        self._reading.set()
        if self._writer is not None:
            if abruptly:
                self._writer.transport.abort()
            else:
                self._writer.close()
        return time.monotonic()

    def stop_reading(self) -> None:
        """Leave what comes in the socket."""
        self._reading.clear()
        if self._writer is not None:
            transport = cast(asyncio.Transport, self._writer.transport)
            if transport.is_reading():
                transport.pause_reading()

    def go_on_reading(self) -> None:
        """Read again."""
        if self._writer is not None and not self._left:
            transport = cast(asyncio.Transport, self._writer.transport)
            if not transport.is_closing():
                transport.resume_reading()
        self._reading.set()

    async def _exchange(self, reply: Reply) -> None:
        payload = json.dumps(self.body).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: campaign\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
            f"X-Request-Id: {self.label}\r\n\r\n"
        )
        sock = socket.socket()
        sock.setblocking(False)
        if self._slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        limit = 4096 if self._slow else 1 << 20
        reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        self._writer.write(head.encode() + payload)
        status = await reader.readuntil(b"\r\n")
        reply.status = int(status.split()[1])
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            reply.headers[name.lower()] = value.strip()
        if reply.headers.get("transfer-encoding") == "chunked":
            await self._chunks(reader, reply)
        else:
            reply.body = await reader.readexactly(int(reply.headers["content-length"]))
            self.tokens_seen.set()
        reply.complete = True

    async def _chunks(self, reader: asyncio.StreamReader, reply: Reply) -> None:
        while True:
            await self._reading.wait()
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = await reader.readexactly(size + 2)
            if not size:
                return
            reply.body += data[:-2]
            self.tokens_seen.set()
