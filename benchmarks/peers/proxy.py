"""The smallest proxy for one vLLM prefill and one vLLM decode server (NIXL connector).

    client --chat--> proxy --same, max_tokens=1, do_remote_decode--> P
                     proxy <--kv_transfer_params-------------------- P
                     proxy --same, with those params---------------> D
    client <-stream- proxy <-stream--------------------------------- D

One connection pool, no parsing of the stream: what it costs is two hops on loopback.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import aiohttp
from aiohttp import web

_REMOTE_DECODE: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_STREAM_FIELDS = ("stream", "stream_options", "max_completion_tokens", "min_tokens")


class PrefillRefused(Exception):
    """The prefill server's answer to a client's request is an error. Args: status, body."""


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """What P is asked: the same prompt, one token, and its KV kept for D."""
    asked = {key: value for key, value in body.items() if key not in _STREAM_FIELDS}
    return asked | {"max_tokens": 1, "stream": False, "kv_transfer_params": _REMOTE_DECODE}


def decode_body(body: dict[str, Any], prefilled: dict[str, Any]) -> dict[str, Any]:
    """What D is asked: the client's request, with what P said about its KV.

    Raises:
        PrefillRefused: P said nothing about it (it runs without the connector).
    """
    params = prefilled.get("kv_transfer_params")
    if not isinstance(params, dict):
        raise PrefillRefused(502, b"the prefill server gave no kv_transfer_params")
    return body | {"kv_transfer_params": params}


class Proxy:
    """Forwards chat completions. Use `make_app`; the session lives as long as the app."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill_url = prefill_url
        self._decode_url = decode_url
        self._session: aiohttp.ClientSession

    def make_app(self) -> web.Application:
        """The application, with its routes."""
        app = web.Application(client_max_size=32 << 20)
        app.cleanup_ctx.append(self._lifetime)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        return app

    async def _lifetime(self, _: web.Application) -> Any:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 20,
        ) as self._session:
            yield

    async def health(self, _: web.Request) -> web.Response:
        """200 if both answer theirs."""
        for url in (self._prefill_url, self._decode_url):
            async with self._session.get(f"{url}/health") as reply:
                if reply.status != 200:
                    return web.Response(status=503)
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        """What D serves."""
        async with self._session.get(f"{self._decode_url}/v1/models") as reply:
            return web.Response(
                status=reply.status, body=await reply.read(), content_type="application/json"
            )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Prefill on P, then D's answer as it comes."""
        body = json.loads(await request.read())
        headers = {"X-Request-Id": uuid4().hex}
        try:
            asked = decode_body(body, await self._prefill(body, headers))
        except PrefillRefused as refusal:
            status, text = refusal.args
            return web.Response(status=status, body=text, content_type="application/json")
        url = f"{self._decode_url}/v1/chat/completions"
        async with self._session.post(url, json=asked, headers=headers) as reply:
            answer = web.StreamResponse(
                status=reply.status,
                headers={"Content-Type": reply.headers.get("Content-Type", "application/json")},
            )
            await answer.prepare(request)
            async for data in reply.content.iter_any():
                await answer.write(data)
            await answer.write_eof()
            return answer

    async def _prefill(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        url = f"{self._prefill_url}/v1/chat/completions"
        async with self._session.post(url, json=prefill_body(body), headers=headers) as reply:
            text = await reply.read()
            if reply.status != 200:
                raise PrefillRefused(reply.status, text)
            answer: dict[str, Any] = json.loads(text)
            return answer


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.proxy")
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    parser.add_argument("--port", required=True, type=int)
    options = parser.parse_args(argv)
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    app = Proxy(options.prefill, options.decode).make_app()
    web.run_app(app, host="127.0.0.1", port=options.port, loop=loop, print=None, access_log=None)
    return 0


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
