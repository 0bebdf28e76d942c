"""POST /v1/responses, on the chat engine: nothing is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contracts.errors import InvalidRequest, NotFound, ServingError
from router.chat import ChatCall, ChatService
from router.deltas import Content
from router.endpoints.calls import Body
from router.endpoints.completions_answer import event
from router.endpoints.responses_answer import Event, ResponseBuilder
from router.endpoints.responses_request import (
    ResponsesCall,
    parse_responses_request,
    their_param,
)
from router.http_errors import body_of
from router.job import Usage
from router.logprobs import LIGHT_ENTRIES
from router.offload import apart, is_heavy
from router.pieces import Piece
from router.request import Generation
from router.sse import EventEncoder, PieceSource


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A checked request."""

    service: ChatService
    chat: ChatCall
    asked: ResponsesCall

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.asked.stream

    def start(self) -> Generation:
        """Begin; the caller closes it."""
        return self.service.start(self.chat)

    async def encoder(self, source: PieceSource) -> EventEncoder:
        """How the stream is written."""
        return ResponseEvents(self._builder())

    async def full(self, source: PieceSource) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ServingError: there will be none.
        """
        builder = self._builder()
        while pieces := await source.outbox.take():
            for piece in pieces:
                builder.add(piece)
        return builder.whole(source.usage)

    def _builder(self) -> ResponseBuilder:
        head, params = self.chat.head, self.chat.job.params
        return ResponseBuilder(
            f"resp_{head.response_id.removeprefix('chatcmpl-')}",
            head.created,
            head.model,
            {
                **self.asked.echoed,
                "temperature": params.temperature,
                "top_p": params.top_p,
            },
            want_logprobs=self.asked.want_logprobs,
        )


class ResponseEvents:
    """Pieces to this API's typed events."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder
        self._begun = False

    def heavy(self, pieces: Sequence[Piece]) -> bool:
        """Whether whole items with many log-probabilities are to be written."""
        if self._builder.num_entries <= LIGHT_ENTRIES:
            return False
        return not pieces or any(
            piece.finish_reason or any(not isinstance(d, Content) for d in piece.deltas)
            for piece in pieces
        )

    def encode(self, piece: Piece, usage: Usage) -> str:
        """The events of a piece, after the two that begin a stream."""
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events += self._builder.begin()
        return _text([*events, *self._builder.add(piece)], heavy=self.heavy([piece]))

    def end(self, usage: Usage) -> bytes:
        """The whole response."""
        heavy = self.heavy(())
        return _text(self._builder.end(usage), heavy=heavy).encode("utf-8", "replace")

    def error(self, error: ServingError) -> bytes:
        """The response that failed."""
        details = body_of(error)["error"]
        assert isinstance(details, dict)
        return _text(self._builder.failed(str(details["message"]))).encode("utf-8", "replace")


def _text(events: list[Event], *, heavy: bool = False) -> str:
    return "".join(event(one, one["type"], heavy=heavy) for one in events)


async def check_response(service: ChatService, body: Body, header_id: str | None) -> ResponseCall:
    """Resolve a request completely.

    Raises:
        ServingError: what is wrong with it; `param` may be named as in the chat API.
    """
    asked = await apart(is_heavy(body), lambda: parse_responses_request(body))
    return ResponseCall(service, await service.check(asked.chat_body, header_id), asked)


def translate(error: ServingError) -> ServingError:
    """The same error with this API's name of the field."""
    if isinstance(error, InvalidRequest | NotFound):
        error.param = their_param(error.param)
    return error


def stored(response_id: str) -> NotFound:
    """For whoever asks for an earlier response."""
    return NotFound(f"there is no response {response_id[:80]!r}: none are stored here")
