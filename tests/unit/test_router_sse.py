"""The stream as it is written to the client."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from contracts.errors import EngineFailure
from router.job import Usage
from router.metrics import RouterMetrics
from router.outbox import Outbox
from router.pieces import Piece
from router.responses import AnswerHead
from router.sse import KEEP_ALIVE, ChunkEncoder, EventStream


class Source:
    """A generation that says what the test says."""

    def __init__(self) -> None:
        self.outbox = Outbox(None)
        self.usage = Usage(1, 1, 0)
        self.stopped = 0

    def stop(self) -> None:
        self.stopped += 1
        self.outbox.close()

    async def aclose(self) -> None:
        self.stop()


class Client:
    """An ASGI connection: what was sent, and no disconnect until the end."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.more = asyncio.Event()
        self.closed = False

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            assert not self.closed
            self.sent.append(message["body"])
            self.closed = not message["more_body"]
            self.more.set()

    async def next(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < count:
                self.more.clear()
                await self.more.wait()


def stream(source: Source, client: Client, keep_alive_s: float) -> asyncio.Task[None]:
    encoder = ChunkEncoder(AnswerHead("id", 1, "m", (1,)))
    response = EventStream(
        source, encoder, RouterMetrics("m"), lambda: None, keep_alive_s=keep_alive_s
    )
    return asyncio.create_task(response({}, client.receive, client.send))


async def writer_has_looked() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_comments_while_idle_and_only_then() -> None:
    source, client = Source(), Client()
    task = stream(source, client, 0.01)
    await client.next(2)
    assert client.sent == [KEEP_ALIVE] * len(client.sent)
    source.outbox.put(Piece(0, "a", (1,), first=True))
    source.outbox.close()
    await task
    rest = [body for body in client.sent if body != KEEP_ALIVE]
    assert rest[0].startswith(b'data: {"id":"id"')
    assert rest[1:] == [b"data: [DONE]\n\n"]
    assert source.stopped


async def test_no_comment_before_its_time() -> None:
    source, client = Source(), Client()
    task = stream(source, client, 1000.0)
    source.outbox.put(Piece(0, "a", (1,), first=True))
    await client.next(1)
    source.outbox.put(Piece(0, "", (1,)))  # nothing to see in it
    await writer_has_looked()
    source.outbox.nudge()
    await writer_has_looked()
    source.outbox.close(EngineFailure("x"))
    await task
    assert KEEP_ALIVE not in client.sent
    assert b'"error"' in client.sent[-1]
    assert client.sent[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
async def test_text_that_is_not_unicode_is_replaced(text: str) -> None:
    source, client = Source(), Client()
    task = stream(source, client, 1000.0)
    source.outbox.put(Piece(0, text, (1,), first=True))
    source.outbox.close()
    await task
    assert b"?" in client.sent[0]
