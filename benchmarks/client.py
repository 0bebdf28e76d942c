"""A streaming chat client that stamps each chunk as it is read from the socket."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.metrics import Chunk, RequestRecord, spread_tokens
from benchmarks.schedule import PlannedRequest

DONE = "[DONE]"


class ServerError(Exception):
    """The server cannot be measured: not reachable, no model, or it refuses the probe."""


class SseParser:
    """Splits a byte stream into the payloads of its `data:` lines. Comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The payloads that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip().decode() for line in lines if line.startswith(b"data:")]


@dataclass(slots=True)
class Recording:
    """What is known of one request so far. Written by the client, read when it is over."""

    planned: PlannedRequest
    sent_s: float | None = None
    contents: list[tuple[float, int | None]] = field(default_factory=list[tuple[float, int | None]])
    end_s: float | None = None
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    finished: bool = False
    error: str = ""

    @property
    def tokens(self) -> int:
        """Completion tokens by the server's latest count; without one, the chunks."""
        return int(self.usage.get("completion_tokens") or len(self.contents))

    def take(self, event: dict[str, Any], at_s: float) -> None:
        """Note one event of the stream.

        A chunk carries tokens if the running usage says so. Where the server sends no running
        usage, it does if a delta has text, reasoning or a tool call in it: neither the role alone
        nor an empty last chunk is a token.
        """
        if "error" in event:
            self.error = "error event"
            return
        usage = event.get("usage")
        before = int(self.usage.get("completion_tokens") or 0)
        choices = event.get("choices") or []
        if isinstance(usage, dict):
            self.usage = usage
            if choices:
                new = int(usage.get("completion_tokens") or 0) - before
                if new > 0:
                    self.contents.append((at_s, new))
                return
        if any(_has_content(choice.get("delta") or {}) for choice in choices):
            self.contents.append((at_s, None))

    def record(self) -> RequestRecord:
        """The raw record. Chunks of unknown size share the tokens that `usage` reports."""
        details = self.usage.get("prompt_tokens_details") or {}
        completion_tokens = self.tokens
        known = [tokens for _, tokens in self.contents if tokens is not None]
        sizes = (
            tuple(known)
            if len(known) == len(self.contents)
            else spread_tokens(len(self.contents), completion_tokens)
        )
        error = self.error
        if not error and not self.finished:
            error = "unfinished"
        if not error and completion_tokens < self.planned.wanted_tokens:
            error = "short output"
        return RequestRecord(
            index=self.planned.index,
            phase=self.planned.phase,
            intended_s=self.planned.intended_s,
            wanted_tokens=self.planned.wanted_tokens,
            sent_s=self.sent_s,
            chunks=tuple(
                Chunk(at_s, size) for (at_s, _), size in zip(self.contents, sizes, strict=True)
            ),
            end_s=self.end_s,
            prompt_tokens=int(self.usage.get("prompt_tokens") or 0),
            completion_tokens=completion_tokens,
            cached_tokens=int(details.get("cached_tokens") or 0),
            error=error,
        )


def _has_content(delta: dict[str, Any]) -> bool:
    return any(
        delta.get(key) for key in ("content", "reasoning", "reasoning_content", "tool_calls")
    )


class ChatClient:
    """One OpenAI-compatible server. Open it as a context manager.

    Connections are kept alive and unlimited in number; connecting counts as the server's time.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._clock = clock

    async def __aenter__(self) -> "ChatClient":
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=headers,
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """The served names.

        Raises:
            ServerError: it does not answer, or serves none.
        """
        reply = await self._json("GET", "/v1/models")
        names = [str(model["id"]) for model in reply.get("data", [])]
        if not names:
            raise ServerError(f"{self._url} serves no model")
        return names

    async def prompt_tokens(self, model: str, prompt: str) -> int:
        """How many tokens the server makes of `prompt`, its chat template included.

        Raises:
            ServerError: it refuses the request.
        """
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "max_tokens": 1}
        reply = await self._json("POST", "/v1/chat/completions", json.dumps(body).encode())
        return int((reply.get("usage") or {}).get("prompt_tokens") or 0)

    async def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._url + path, data=body) as response:
                text = await response.text()
                if response.status != 200:
                    raise ServerError(f"{method} {path}: HTTP {response.status}: {text[:300]}")
                reply: dict[str, Any] = json.loads(text)
                return reply
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerError(f"{method} {self._url}{path}: {error or 'timed out'}") from error

    async def stream(self, recording: Recording, origin: float) -> None:
        """Send the request and note all that comes back, until the stream ends.

        Never raises but when cancelled; a failure is the recording's `error`.

        Args:
            recording: written as things happen.
            origin: the clock's reading at the start of the measured window.
        """
        recording.sent_s = self._clock() - origin
        try:
            async with self._session.post(
                self._url + "/v1/chat/completions", data=recording.planned.body
            ) as response:
                if response.status != 200:
                    recording.error = f"http {response.status}"
                    await response.read()
                    return
                parser = SseParser()
                async for data in response.content.iter_any():
                    at_s = self._clock() - origin
                    for payload in parser.feed(data):
                        if payload == DONE:
                            recording.finished = True
                        else:
                            recording.take(json.loads(payload), at_s)
                if not recording.finished and not recording.error:
                    recording.error = "cut off"  # an end without [DONE]
        except TimeoutError:
            recording.error = "timeout"
        except aiohttp.ClientConnectorError:
            recording.error = "no connection"
        except aiohttp.ClientError:
            recording.error = "cut off"
        except ValueError:
            recording.error = "bad event"
        finally:
            recording.end_s = self._clock() - origin
