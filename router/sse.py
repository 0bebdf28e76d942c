"""Server-sent events: pieces to chunks, written without waiting for anything but the client."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from contracts.errors import ServingError
from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart
from router.disconnect import cut, disconnected
from router.http_errors import body_of, encode
from router.job import Usage
from router.logprobs import logprobs_json
from router.metrics import RouterMetrics
from router.offload import apart, dumps, in_thread
from router.outbox import Outbox, SlowReader
from router.pieces import Piece
from router.responses import AnswerHead, usage_json

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0  # of silence, until such a comment is sent
WRITE_TIMEOUT_S = 60.0

_WRITE_BYTES = 1 << 14  # at once: a slow client is seen to go on between two writes

_BODY = "http.response.body"
_NOT_FINISHED = '"finish_reason":null'
_NO_LOGPROBS = '"logprobs":null'
_CONTENT = '"content":'


class EventEncoder(Protocol):
    """Pieces to events, for one endpoint's kind of stream."""

    def encode(self, piece: Piece, usage: Usage) -> str:
        """The events of a piece; empty if there is nothing to see in it."""
        ...

    def heavy(self, pieces: Sequence[Piece]) -> bool:
        """Whether these (none: the end) may take long to write, so that a thread is to do it."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last events of a stream that ended well."""
        ...

    def error(self, error: ServingError) -> bytes:
        """The last events of one that did not."""
        ...


def error_events(error: ServingError) -> bytes:
    """An error after the first chunk, then the end mark."""
    return b"data: " + encode(body_of(error)) + b"\n\n" + DONE


def delta_json(delta: Delta) -> str:
    """The inside of a chat chunk's `delta` object."""
    match delta:
        case Content(text):
            return _CONTENT + encode_basestring(text)
        case Reasoning(text):
            thoughts = encode_basestring(text)
            return f'"reasoning":{thoughts},"reasoning_content":{thoughts}'
        case ToolCallStart(index, call_id, name):
            call: dict[str, Any] = {"index": index, "id": call_id, "type": "function"}
            call["function"] = {"name": name, "arguments": ""}
        case ToolArguments(index, text):
            call = {"index": index, "function": {"arguments": text}}
    return f'"tool_calls":[{dumps(call)}]'


class ChunkEncoder:
    """Pieces to a chat's chunks. What all of them share is written once, ahead of time."""

    def __init__(
        self, head: AnswerHead, *, include_usage: bool = False, continuous_usage: bool = False
    ) -> None:
        self._head = head
        self._include_usage = include_usage
        self._continuous = include_usage and continuous_usage
        self._prefix = (
            f'data: {{"id":{dumps(head.response_id)},"object":"chat.completion.chunk",'
            f'"created":{head.created},"model":{dumps(head.model)},"choices":['
        )
        self._role = f'"role":{dumps(head.role)},'

    def encode(self, piece: Piece, usage: Usage) -> str:
        """The chunk or chunks of a piece; empty if there is nothing to see in it."""
        tail = self._usage_field(piece, usage) if self._continuous else ""
        if piece.first or piece.deltas:
            return self._several(piece, tail)
        logprobs, ids = self._logprobs(piece), self._ids(piece)
        if not piece.text and piece.finish_reason is None and logprobs is _NO_LOGPROBS and not ids:
            return ""
        return (
            f'{self._prefix}{{"index":{piece.choice},"delta":{{{_CONTENT}'
            f"{encode_basestring(piece.text)}}},{logprobs},{self._finish(piece)}{ids}}}]{tail}}}\n\n"
        )

    def heavy(self, pieces: Sequence[Piece]) -> bool:
        """Never: a piece is what one frame brought."""
        return False

    def _several(self, piece: Piece, tail: str) -> str:
        """The chunks of a choice's first piece, or of one that was parsed: one for each part.

        The role goes out with the first token, and `echo`'s text before that token's. Each choice
        has a first chunk and another one that finishes it; only content shares the finishing one.
        Ids and log-probabilities are in the first chunk that shows a part of the piece.
        """
        deltas = [delta_json(part) for part in piece.parts]
        described = 0
        if piece.first:
            if deltas and deltas[0].startswith(_CONTENT) and not self._head.echo:
                deltas[0] = self._role + deltas[0]
            else:
                described = 1 if deltas else 0
                deltas.insert(0, f"{self._role}{_CONTENT}{encode_basestring(self._head.echo)}")
        if piece.finish_reason is not None and (piece.first or not deltas[-1].startswith(_CONTENT)):
            deltas.append(f'{_CONTENT}""')
        chunks: list[str] = []
        for index, delta in enumerate(deltas):
            logprobs, ids, prompt = _NO_LOGPROBS, "", ""
            if index == described:
                logprobs, ids = self._logprobs(piece), self._ids(piece)
            if index == 0 and piece.first and self._head.want_token_ids:
                prompt = f',"prompt_token_ids":{dumps(self._head.prompt_ids)}'
            finish = self._finish(piece) if index == len(deltas) - 1 else _NOT_FINISHED
            chunks.append(
                f'{self._prefix}{{"index":{piece.choice},"delta":{{{delta}}},'
                f"{logprobs},{finish}{ids}}}]{prompt}{tail}}}\n\n"
            )
        return "".join(chunks)

    def _finish(self, piece: Piece) -> str:
        if piece.finish_reason is None:
            return _NOT_FINISHED
        return f'"finish_reason":"{piece.finish_reason}","stop_reason":{dumps(piece.stop_reason)}'

    def _logprobs(self, piece: Piece) -> str:
        if not (piece.logprobs and self._head.want_logprobs):
            return _NO_LOGPROBS
        return f'"logprobs":{dumps(logprobs_json(piece.logprobs))}'

    def _ids(self, piece: Piece) -> str:
        if not (piece.token_ids and self._head.want_token_ids):
            return ""
        return f',"token_ids":{dumps(piece.token_ids)}'

    def _usage_field(self, piece: Piece, usage: Usage) -> str:
        thoughts = None if usage.reasoning_tokens is None else piece.reasoning_tokens
        now = replace(usage, completion_tokens=piece.completion_tokens, reasoning_tokens=thoughts)
        return f',"usage":{dumps(usage_json(now))}'

    def end(self, usage: Usage) -> bytes:
        """The last events: usage if it was asked for, then the end mark."""
        if not self._include_usage:
            return DONE
        chunk = f'{self._prefix}],"usage":{dumps(usage_json(usage))}}}\n\n'
        return chunk.encode() + DONE

    def error(self, error: ServingError) -> bytes:
        """The error, then the end mark."""
        return error_events(error)


def _encoded(encoder: EventEncoder, pieces: Sequence[Piece], usage: Usage) -> bytes:
    return "".join([encoder.encode(piece, usage) for piece in pieces]).encode("utf-8", "replace")


class PieceSource(Protocol):
    """What is streamed; a Generation is one."""

    @property
    def outbox(self) -> Outbox:
        """The pieces."""
        ...

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        ...

    def stop(self) -> None:
        """Release everything now; the outbox ends. Idempotent."""
        ...

    async def aclose(self) -> None:
        """`stop`, then wait until it is done."""
        ...


class EventStream(StreamingResponse):
    """Streams a source that has something to say. However it ends, the source does too.

    A client that takes nothing for `write_timeout_s` while there is something to take is given up;
    one that is slow is not, as long as it goes on.
    """

    def __init__(
        self,
        source: PieceSource,
        encoder: EventEncoder,
        metrics: RouterMetrics,
        on_end: Callable[[], None],
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        super().__init__(content=(), media_type="text/event-stream", headers=HEADERS)
        self._source = source
        self._encoder = encoder
        self._metrics = metrics
        self._on_end = on_end
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s
        self._silent = False  # nothing was written since the timer fired
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, the client's disconnect, a full buffer, or a stuck write."""
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        full = asyncio.create_task(self._source.outbox.overflowed())
        ticker = asyncio.create_task(self._tick())
        tasks = (writer, gone, full, ticker)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if full.done() or ticker.done():
                if ticker.done():  # the other one counts itself
                    self._metrics.failed(SlowReader.__name__)
                cut(receive)
            elif writer.done():
                writer.result()
            else:
                self._metrics.disconnects.inc()
        except OSError:  # the connection broke while writing
            self._metrics.disconnects.inc()
        except asyncio.CancelledError:  # how Ray Serve tells that the client has left
            self._metrics.disconnects.inc()
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._source.stop()
            self._on_end()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._source.aclose()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        try:
            await self._write_pieces(send)
            usage = self._source.usage
            last = await apart(self._encoder.heavy(()), lambda: self._encoder.end(usage))
        except SlowReader:
            return  # the connection is cut: it would not be read
        except ServingError as error:
            last = self._encoder.error(error)
        await self._send_body(send, last, more_body=False)

    async def _write_pieces(self, send: Send) -> None:
        outbox, encoder = self._source.outbox, self._encoder
        while (pieces := await outbox.take()) or not outbox.over:
            usage = self._source.usage
            if encoder.heavy(pieces):
                body = await in_thread(partial(_encoded, encoder, pieces, usage))
            else:
                body = _encoded(encoder, pieces, usage)
            if not body and self._silent:
                body = KEEP_ALIVE
            if body:
                self._silent = False
                await self._send_body(send, body, more_body=True)

    async def _send_body(self, send: Send, body: bytes, *, more_body: bool) -> None:
        last = max(len(body) - 1, 0) // _WRITE_BYTES * _WRITE_BYTES
        for start in range(0, last, _WRITE_BYTES):
            part = body[start : start + _WRITE_BYTES]
            await self._send(send, {"type": _BODY, "body": part, "more_body": True})
        await self._send(send, {"type": _BODY, "body": body[last:], "more_body": more_body})

    async def _send(self, send: Send, message: Message) -> None:
        """Send; the ticker looks how long that takes, for a timer each would cost more."""
        self._writing_since = time.monotonic()
        await send(message)
        self._writing_since = None

    async def _tick(self) -> None:
        """Wake the writer when it has been silent for one to two intervals.

        Returns when it is stuck.
        """
        while True:
            await asyncio.sleep(min(self._keep_alive_s, self._write_timeout_s) / 2)
            since = self._writing_since
            if since is not None:
                if time.monotonic() - since >= self._write_timeout_s:
                    logger.warning("a client took nothing for %g s", self._write_timeout_s)
                    return
                continue
            if self._silent:
                self._source.outbox.nudge()
            self._silent = True
