"""A small OpenAI-compatible server with a known behaviour, for tests of clients.

It notes when it got each request and when it wrote each chunk, by the same clock as a client in
the same process, so a test compares stamps instead of hoping for speed.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Seen:
    """One chat request as the server saw it."""

    body: dict[str, Any]
    received_s: float
    written_s: list[float] = field(default_factory=list[float])  # before each content chunk
    aborted: bool = False


@dataclass
class Behaviour:
    """How to answer. Faults are chosen by the request's number: every so-many-th."""

    tokens_per_chunk: int = 1
    running_usage: bool = True  # if asked for
    first_s: float = 0.0  # before the first chunk
    gap_s: float = 0.0  # before each later one
    refuse_every: int = 0  # HTTP 429
    cut_every: int = 0  # ends without [DONE]
    hang_after_chunks: int | None = None  # then nothing more comes


class ChatStandIn:
    """Serves on a free loopback port between `start` and `stop`."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.seen: list[Seen] = []  # streamed requests only, not the client's probes
        self.streaming = asyncio.Event()
        self.url = ""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        # Without cancellation a handler would not learn that its client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True)

    async def start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "stand-in"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        received_s = time.perf_counter()
        body: dict[str, Any] = await request.json()
        words = len(body["messages"][-1]["content"].split())
        usage: dict[str, Any] = {
            "prompt_tokens": 5 + 2 * words,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        if not body.get("stream"):
            return web.json_response({"choices": [], "usage": usage | {"completion_tokens": 1}})
        seen = Seen(body, received_s)
        self.seen.append(seen)
        self.streaming.set()
        number, how = len(self.seen), self._behaviour
        if how.refuse_every and number % how.refuse_every == 0:
            return web.json_response({"error": {"message": "later"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self._stream(response, seen, usage)
        except (asyncio.CancelledError, ConnectionError):
            seen.aborted = True
            raise
        if not (how.cut_every and number % how.cut_every == 0):
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _stream(
        self, response: web.StreamResponse, seen: Seen, usage: dict[str, Any]
    ) -> None:
        how = self._behaviour
        asked: dict[str, Any] = seen.body.get("stream_options") or {}
        running_usage = how.running_usage and bool(asked.get("continuous_usage_stats"))

        async def send(choices: list[dict[str, Any]], with_usage: bool) -> None:
            event = {"choices": choices} | ({"usage": usage} if with_usage else {})
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        def choice(content: str, **more: str) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": {"content": content} | more, "finish_reason": None}]

        await send(choice("", role="assistant"), running_usage)
        wanted = int(seen.body["max_tokens"])
        while usage["completion_tokens"] < wanted:
            if len(seen.written_s) == how.hang_after_chunks:
                await asyncio.Event().wait()
            await asyncio.sleep(how.gap_s if seen.written_s else how.first_s)
            new = min(how.tokens_per_chunk, wanted - usage["completion_tokens"])
            usage["completion_tokens"] += new
            seen.written_s.append(time.perf_counter())
            await send(choice("word " * new), running_usage)
        await send([{"index": 0, "delta": {}, "finish_reason": "length"}], running_usage)
        await send([], True)
