"""Over a real socket: nobody holds a place for ever, and a router that leaves does so in time."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from contracts.events import TokensOut
from router.app import stop_admission
from tests.support.fake_worker import until
from tests.support.router_http import Served, listening, serve

# Bodies that do not come


def head(length: int) -> bytes:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def in_flight(served: Served) -> int:
    flight: int = served.app.state.serving.service.in_flight
    return flight


@pytest.mark.parametrize("sent", [b"", b'{"messages": ['], ids=["nothing", "a-part"])
async def test_a_body_that_stops_coming_is_given_up(tmp_path: Path, sent: bytes) -> None:
    async with (
        serve(tmp_path, body_timeout_s=0.1) as served,
        listening(served.app) as (_, url),
    ):
        async with connected(url) as (reader, writer):
            writer.write(head(100) + sent)
            await until(lambda: in_flight(served) == 1)
            answer = await asyncio.wait_for(reader.read(), 10)  # to the connection's end
        assert in_flight(served) == 0
    status, _, rest = answer.partition(b"\r\n")
    assert status == b"HTTP/1.1 408 Request Timeout"
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == (408, "RequestTimeoutError")
    assert f"{len(sent)} bytes" in error["message"]


async def test_a_body_that_trickles_in_is_given_up_too(tmp_path: Path) -> None:
    """Never silent for long, and yet the place is not held as long as it pleases the client."""
    async with (
        serve(tmp_path, body_timeout_s=0.2) as served,
        listening(served.app) as (_, url),
        connected(url) as (reader, writer),
    ):
        writer.write(head(100_000))
        await until(lambda: in_flight(served) == 1)
        answered = asyncio.create_task(reader.readline())
        async with asyncio.timeout(10):
            while in_flight(served):
                writer.write(b" ")
                await asyncio.wait({answered}, timeout=0.02)
        with suppress(ConnectionResetError):  # the answer crossed our last byte
            assert b" 408 " in await asyncio.wait_for(answered, 10)


async def test_a_slow_but_steady_body_is_read(tmp_path: Path) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode().ljust(30_000)
    async with (
        serve(tmp_path, body_timeout_s=2.0) as served,
        listening(served.app) as (_, url),
        connected(url) as (reader, writer),
    ):
        writer.write(head(len(body)))
        for start in range(0, len(body), 10_000):
            writer.write(body[start : start + 10_000])
            await asyncio.sleep(0.02)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)


# Clients that do not read


async def much(served: Served) -> int:
    """The running request's worker says much at once, and then nothing; how many bytes."""
    await until(lambda: served.d.paused.is_set())
    request = served.d.adopted[-1][0]
    part = served.tokenizer.encode("the cat " * 1000).ids
    for number in range(100):
        tokens = TokensOut(request.request_id, 0, 0, 1 + number * len(part), tuple(part))
        served.d.session.send(tokens)
        await asyncio.sleep(0)
    return 800_000


class SlowClient:
    """Asks for a stream; takes of it what the test wants, for its buffers are small."""

    def __init__(self, url: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)
        self._url = url

    async def __aenter__(self) -> "SlowClient":
        loop = asyncio.get_running_loop()
        host, _, port = self._url.removeprefix("http://").partition(":")
        await loop.sock_connect(self._socket, (host, int(port)))
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})
        await loop.sock_sendall(self._socket, head(len(body)) + body.encode())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._socket.close()

    async def take(self, num_bytes: int) -> int:
        """At most so many; 0 at the end, however it came about."""
        try:
            return len(await asyncio.get_running_loop().sock_recv(self._socket, num_bytes))
        except ConnectionResetError:
            return 0


async def test_a_client_that_takes_nothing_is_given_up(tmp_path: Path) -> None:
    """The buffer is not full, and the worker has nothing more to say: time alone ends it."""
    async with (
        serve(tmp_path, write_timeout_s=0.3, write_buffer_bytes=64 << 20) as served,
        listening(served.app, send_buffer_bytes=8192) as (_, url),
        SlowClient(url) as client,
    ):
        served.d.pause_at = 1
        said = await much(served)
        await until(lambda: served.d.aborted and in_flight(served) == 0)
        got = 0
        async with asyncio.timeout(10):
            while count := await client.take(1 << 20):
                got += count
        assert got < said / 2  # the connection is gone, and with it what waited in the server
        assert served.idle


async def test_a_slow_client_that_goes_on_reading_is_not(tmp_path: Path) -> None:
    async with (
        serve(tmp_path, write_timeout_s=1.5, write_buffer_bytes=64 << 20) as served,
        listening(served.app, send_buffer_bytes=8192) as (_, url),
        SlowClient(url) as client,
    ):
        served.d.pause_at = 1
        said = await much(served)
        got, begun = 0, time.monotonic()
        while time.monotonic() - begun < 3.5:  # more than twice the limit
            wanted = got + 85_000  # more than what uvicorn takes at once
            while got < wanted:
                count = await client.take(16_000)
                assert count, f"cut after {got} bytes"
                got += count
            await asyncio.sleep(0.5)
        assert got < said
        assert not served.d.aborted
        assert in_flight(served) == 1


# A router that leaves


async def test_streams_end_before_the_router_does(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, listening(served.app) as (server, url):
        served.d.pause_at = 3
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        async with (
            httpx.AsyncClient(base_url=url) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            await until(lambda: served.d.paused.is_set())
            stop_admission(served.app)
            health = await client.get("/health")
            refused = await client.post("/v1/chat/completions", json=body)
            server.should_exit = True
            await until(lambda: not server.servers[0].is_serving())
            served.d.resume()
            text = (await response.aread()).decode()
    assert health.status_code == 503
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "shutting down" in refused.json()["error"]["message"]
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text


async def test_a_stream_that_does_not_end_in_time_is_cut_and_released(tmp_path: Path) -> None:
    async with (
        serve(tmp_path) as served,
        listening(served.app, timeout_graceful_shutdown=0.2) as (server, url),
    ):
        served.d.pause_at = 3
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        async with (
            httpx.AsyncClient(base_url=url) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            await until(lambda: served.d.paused.is_set())
            server.should_exit = True
            with pytest.raises(httpx.RemoteProtocolError):
                await response.aread()
        await until(lambda: served.idle)
        assert len(served.d.aborted) == 1
        assert in_flight(served) == 0
