"""One client's request: sent, read to its end or left, and judged."""

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from benchmarks.client import SseParser
from tests.soak.answers import Choices, Wrong, assert_equal, events_of, streamed, whole
from tests.soak.mix import Ask, Json, Leave, Plan, body_bytes

TIMEOUT_S = 120.0
MALFORMED_STATUSES = (200, 400, 404, 413, 429)
_ASK: Json = {"do_remote_decode": True, "do_remote_prefill": False}
_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. `failure` names what went wrong: its kind, a colon, details."""

    how: Literal["answered", "left", "refused", "failed"]
    tokens: int = 0
    failure: str = ""


class Clients:
    """Any number of clients of one server; `forget` ends all their connections."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None
        self.known: dict[int, Choices] = {}  # answers to the reference questions

    async def forget(self) -> None:
        """Close every connection; the next request opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def learn(self, number: int, question: Ask) -> None:
        """Ask a reference question alone and keep the answer.

        Raises:
            Wrong: no good answer.
        """
        plan = Plan(-1, question.kind, question.path, {**question.fields}, question.choices)
        self.known[number] = await self._complete(plan, plan.body)

    async def send(self, plan: Plan) -> Outcome:
        """Never raises (but for a cancel); never takes longer than twice TIMEOUT_S."""
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                return await self._send(plan)
        except Wrong as error:
            return Outcome("failed", failure=str(error))
        except TimeoutError:
            return Outcome("failed", failure="time-out: no end of the answer")
        except (aiohttp.ClientError, OSError) as error:
            return Outcome("failed", failure=f"connection: {type(error).__name__}: {error}")
        except (KeyError, TypeError, ValueError) as error:
            return Outcome("failed", failure=f"form: {type(error).__name__}: {error}")

    async def text(self, path: str) -> str:
        """What a GET gives.

        Raises:
            aiohttp.ClientError: no answer, or not 200.
        """
        async with self._http.get(path) as answer:
            answer.raise_for_status()
            return await answer.text()

    # -- inside -----------------------------------------------------------------------------

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                self._url,
                # The server closes connections that are idle for 5 s; never race with that.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=1.0),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                headers=_HEADERS,
                read_bufsize=1 << 20,
            )
        return self._session

    async def _send(self, plan: Plan) -> Outcome:
        if plan.raw is not None:
            return await self._malformed(plan.path, plan.raw)
        leave = plan.leave
        if plan.two_step:
            return await self._two_steps(plan)
        if leave is None:
            return self._judged(plan, await self._complete(plan, plan.body))
        if leave.how == "stalls":
            return await self._stalls(plan, leave)
        if leave.how == "events":
            return await self._some_events(plan, leave.events)
        try:
            async with asyncio.timeout(leave.after_s):
                return self._judged(plan, await self._complete(plan, plan.body))
        except TimeoutError:
            return Outcome("left")

    def _judged(self, plan: Plan, answer: Choices) -> Outcome:
        if plan.reference is not None:
            assert_equal(answer, self.known[plan.reference])
        return Outcome("answered", sum(len(choice.token_ids) for choice in answer.values()))

    async def _complete(self, plan: Plan, body: Json) -> Choices:
        async with self._http.post(plan.path, data=body_bytes(body)) as answer:
            text = await answer.text()
            _check_status(answer.status, text)
        if not plan.stream:
            return whole(json.loads(text), plan.choices)
        payloads = events_of(SseParser().feed(text.encode()))
        return streamed(map(json.loads, payloads), plan.choices)

    async def _malformed(self, path: str, raw: bytes) -> Outcome:
        async with self._http.post(path, data=raw) as answer:
            text = await answer.text()
        if answer.status not in MALFORMED_STATUSES:
            raise Wrong(f"status-{answer.status}: mutated: {text[:300]}")
        if answer.status != 200:
            return Outcome("refused")
        if text.startswith("data:"):
            events_of(SseParser().feed(text.encode()))
        return Outcome("answered")

    async def _two_steps(self, plan: Plan) -> Outcome:
        """As a proxy: P first, then D, or nobody."""
        left_out = ("stream", "stream_options", "min_tokens")
        first = {name: value for name, value in plan.body.items() if name not in left_out}
        first |= {"max_tokens": 1, "kv_transfer_params": _ASK}
        async with self._http.post(plan.path, data=body_bytes(first)) as answer:
            text = await answer.text()
            _check_status(answer.status, text)
        params: Any = json.loads(text)["kv_transfer_params"]
        if not params:
            raise Wrong("params: the first step gave none")
        if plan.two_step == "abandon":
            return Outcome("left")
        second = {**plan.body, "kv_transfer_params": params}
        if plan.leave is None:
            return self._judged(plan, await self._complete(plan, second))
        try:
            async with asyncio.timeout(plan.leave.after_s):
                return self._judged(plan, await self._complete(plan, second))
        except TimeoutError:
            return Outcome("left")

    async def _some_events(self, plan: Plan, events: int) -> Outcome:
        parser, payloads = SseParser(), list[str]()
        async with self._http.post(plan.path, data=body_bytes(plan.body)) as answer:
            if answer.status != 200:
                _check_status(answer.status, await answer.text())
            async for data in answer.content.iter_any():
                payloads += parser.feed(data)
                if len(payloads) >= events:
                    answer.close()
                    return Outcome("left")
        found = streamed(map(json.loads, events_of(payloads)), plan.choices)
        return self._judged(plan, found)  # it was shorter than the client's patience

    async def _stalls(self, plan: Plan, leave: Leave) -> Outcome:
        """Read the first bytes over a narrow socket, then nothing, then go without a word."""
        where = urlsplit(self._url)
        assert where.hostname is not None
        body = body_bytes(plan.body)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (where.hostname, where.port))
        except BaseException:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock, limit=2048)
        try:
            head = f"POST {plan.path} HTTP/1.1\r\nHost: {where.netloc}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            async with asyncio.timeout(TIMEOUT_S):
                first = await reader.read(100)
            if not first.startswith(b"HTTP/1.1 200"):
                raise Wrong(f"status-{first[9:12].decode()}: {first!r}")
            await asyncio.sleep(leave.after_s)
            return Outcome("left")
        finally:
            writer.transport.abort()


def _check_status(status: int, text: str) -> None:
    if status != 200:
        raise Wrong(f"status-{status}: {text[:300]}")
