"""Server-sent events: one chunk a piece, written without waiting for anything but the client."""

import asyncio
import json
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from contracts.errors import ServingError
from router.choice import Piece
from router.disconnect import disconnected
from router.http_errors import body_of, encode
from router.job import Usage
from router.metrics import RouterMetrics
from router.outbox import SlowReader
from router.request import Generation
from router.responses import AnswerHead, logprobs_json, usage_json

DONE = b"data: [DONE]\n\n"
HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class ChunkEncoder:
    """Pieces to events. What all chunks share is written once, ahead of time."""

    def __init__(
        self, head: AnswerHead, *, include_usage: bool = False, continuous_usage: bool = False
    ) -> None:
        self._head = head
        self._include_usage = include_usage
        self._continuous = include_usage and continuous_usage
        self._always = head.want_token_ids or head.want_logprobs
        self._prefix = (
            f'data: {{"id":{_dumps(head.response_id)},"object":"chat.completion.chunk",'
            f'"created":{head.created},"model":{_dumps(head.model)},"choices":['
        )

    def encode(self, piece: Piece, usage: Usage) -> str:
        """The chunk or chunks of a piece; empty if there is nothing to see in it.

        The role goes out with the choice's first token. A choice that ends with its first piece
        has two chunks, so that each choice has a first one and a finish one.
        """
        finish = self._finish(piece)
        tail = self._usage_field(piece, usage)
        if piece.first:
            head = self._chunk(piece, '"role":"assistant",', self._NOT_FINISHED, tail, first=True)
            if piece.finish_reason is None:
                return head
            end = f'{{"index":{piece.choice},"delta":{{"content":""}},"logprobs":null,{finish}}}]'
            return f"{head}{self._prefix}{end}{tail}}}\n\n"
        if not piece.text and piece.finish_reason is None and not self._always:
            return ""
        return self._chunk(piece, "", finish, tail)

    _NOT_FINISHED = '"finish_reason":null'

    def _finish(self, piece: Piece) -> str:
        if piece.finish_reason is None:
            return self._NOT_FINISHED
        return f'"finish_reason":"{piece.finish_reason}","stop_reason":{_dumps(piece.stop_reason)}'

    def _usage_field(self, piece: Piece, usage: Usage) -> str:
        if not self._continuous:
            return ""
        now = Usage(usage.prompt_tokens, piece.completion_tokens, usage.cached_tokens)
        return f',"usage":{_dumps(usage_json(now))}'

    def _chunk(
        self, piece: Piece, role: str, finish: str, tail: str, *, first: bool = False
    ) -> str:
        logprobs = "null"
        if self._head.want_logprobs and piece.logprobs:
            logprobs = _dumps(logprobs_json(piece.logprobs))
        ids = prompt = ""
        if self._head.want_token_ids:
            ids = f',"token_ids":{_dumps(piece.token_ids)}'
            if first:
                prompt = f',"prompt_token_ids":{_dumps(self._head.prompt_ids)}'
        return (
            f'{self._prefix}{{"index":{piece.choice},"delta":{{{role}"content":'
            f'{encode_basestring(piece.text)}}},"logprobs":{logprobs},{finish}{ids}}}]'
            f"{prompt}{tail}}}\n\n"
        )

    def end(self, usage: Usage) -> bytes:
        """The last events: usage if it was asked for, then the end mark."""
        if not self._include_usage:
            return DONE
        chunk = f'{self._prefix}],"usage":{_dumps(usage_json(usage))}}}\n\n'
        return chunk.encode() + DONE


def error_events(error: ServingError) -> bytes:
    """An error after the first chunk, then the end mark."""
    return b"data: " + encode(body_of(error)) + b"\n\n" + DONE


class EventStream(StreamingResponse):
    """Streams a generation that has something to say. However it ends, the generation does too."""

    def __init__(
        self,
        generation: Generation,
        encoder: ChunkEncoder,
        metrics: RouterMetrics,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(content=(), media_type="text/event-stream", headers=HEADERS)
        self._generation = generation
        self._encoder = encoder
        self._metrics = metrics
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, the client's disconnect, or a full buffer."""
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        full = asyncio.create_task(self._generation.outbox.overflowed())
        try:
            await asyncio.wait({writer, gone, full}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            elif gone.done():
                self._metrics.disconnects.inc()
        except OSError:  # the connection broke while writing
            self._metrics.disconnects.inc()
        except asyncio.CancelledError:  # how Ray Serve tells that the client has left
            self._metrics.disconnects.inc()
            raise
        finally:
            for task in (writer, gone, full):
                task.cancel()
            self._generation.stop()
            self._on_end()
            await asyncio.gather(writer, gone, full, return_exceptions=True)
            await self._generation.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        outbox, encoder = self._generation.outbox, self._encoder
        try:
            while pieces := await outbox.take():
                usage = self._generation.usage
                text = "".join(encoder.encode(piece, usage) for piece in pieces)
                if text:
                    await self._send(send, text.encode())
            last = encoder.end(self._generation.usage)
        except SlowReader:
            return  # the connection is cut: it would not be read
        except ServingError as error:
            last = error_events(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    @staticmethod
    async def _send(send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
