"""What all endpoints with a JSON body share: admission, the body, errors, clients that leave."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from contracts.errors import EngineFailure, InvalidRequest, ServingError
from contracts.worker import Role
from router.body import check_media_type, parse_object, read_body
from router.chat import ChatService
from router.disconnect import ClientGone, unless_disconnected
from router.http_errors import body_of, encode, headers_of, status_of
from router.middleware import sent_request_id
from router.offload import apart, dumps_in_steps, in_thread, is_heavy
from router.sse import EventEncoder, EventStream, PieceSource

logger = logging.getLogger(__name__)

_INLINE_BYTES = 1 << 16  # a longer body is parsed in a thread
_CLIENT_CLOSED = 499  # nobody reads it; for the access log
_RANK = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)

Body = dict[str, object]
T = TypeVar("T")


class Call(Protocol):
    """A checked request that can be run."""

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream of events."""
        ...

    def start(self) -> PieceSource:
        """Begin; the caller closes it."""
        ...

    async def encoder(self, source: PieceSource) -> EventEncoder:
        """How the stream is written; asked for once the source has something to say."""
        ...

    async def full(self, source: PieceSource) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ServingError: there will be none.
        """
        ...


def as_is(error: ServingError) -> ServingError:
    """For endpoints whose errors need no translation."""
    return error


async def run_call(
    request: Request,
    service: ChatService,
    check: Callable[[Body, str | None], Awaitable[Call]],
    *,
    translate: Callable[[ServingError], ServingError] = as_is,
) -> Response:
    """Answer a request that generates; whatever happens, nothing outlives its client.

    `check` gets the body and the client's request id.
    """

    async def work() -> Response:
        call = await _checked(request, service, lambda body: check(body, sent_request_id(scope)))
        source = call.start()
        keep = False
        try:
            if not call.stream:
                full = await unless_disconnected(request.receive, call.full(source))
                return await answered(full)
            await unless_disconnected(request.receive, source.outbox.ready())
            encoder = await call.encoder(source)
            keep = True
            return EventStream(
                source,
                encoder,
                service.metrics,
                service.leave,
                write_timeout_s=service.config.write_timeout_s,
            )
        finally:
            if not keep:
                await source.aclose()

    scope = request.scope
    return await _admitted(service, work, translate)


async def run_plain(
    request: Request, service: ChatService, work: Callable[[Body], Awaitable[dict[str, Any]]]
) -> Response:
    """Answer a request that needs no worker."""

    async def answer() -> Response:
        return await answered(await _checked(request, service, work))

    return await _admitted(service, answer, as_is)


async def _checked(
    request: Request, service: ChatService, work: Callable[[Body], Awaitable[T]]
) -> T:
    """Read the body and do what the endpoint does with it, as long as the client waits.

    Raises:
        ServingError: the request is refused, which has been counted.
        ClientGone: nobody waits any more.
    """

    async def do(body: Body) -> T:
        return await work(body)

    try:
        _check_rank(request.headers.get("x-data-parallel-rank"), service)
        check_media_type(request.headers.get("content-type"))
        length = request.headers.get("content-length")
        config = service.config
        raw = await read_body(
            request.stream(), length, config.max_body_bytes, config.body_timeout_s
        )
        body = await apart(len(raw) > _INLINE_BYTES, lambda: parse_object(raw))
        return await unless_disconnected(request.receive, do(body))
    except ServingError as error:
        service.refused(error)
        raise


def _check_rank(header: str | None, service: ChatService) -> None:
    """A hint that need not be followed; one that cannot be meant is refused.

    Raises:
        InvalidRequest: a number that is no decode worker's.
    """
    if header is None or not _RANK.fullmatch(header.strip()):
        return
    workers = sum(worker.role is Role.DECODE for worker in service.pool.snapshot())
    if not 0 <= int(header) < max(workers, 1):
        raise InvalidRequest(
            f"X-data-parallel-rank must be from 0 to {max(workers, 1) - 1}", "X-data-parallel-rank"
        )


async def _admitted(
    service: ChatService,
    work: Callable[[], Awaitable[Response]],
    translate: Callable[[ServingError], ServingError],
) -> Response:
    """Do it in one of the places for requests, which a stream gives back at its own end."""
    try:
        service.enter()
    except ServingError as error:
        service.refused(error)
        return error_response(error)
    streaming = False
    try:
        response = await work()
        streaming = isinstance(response, EventStream)
        return response
    except (ClientGone, ClientDisconnect):
        service.metrics.disconnects.inc()
        return Response(status_code=_CLIENT_CLOSED)
    except asyncio.CancelledError:  # how Ray Serve tells that the client has left
        service.metrics.disconnects.inc()
        raise
    except ServingError as error:
        return error_response(translate(error))
    except Exception:  # a bug of ours is still an answer
        logger.exception("a request failed")
        return error_response(EngineFailure("unexpected error in the router"))
    finally:
        if not streaming:
            service.leave()


def error_response(error: ServingError) -> Response:
    """The answer for an error."""
    return json_response(body_of(error), status_of(error)[0], headers_of(error))


async def answered(body: dict[str, Any]) -> Response:
    """JSON of any size."""
    if not is_heavy(body):
        return json_response(body)
    text = await in_thread(lambda: dumps_in_steps(body).encode("utf-8", "replace"))
    return Response(text, media_type="application/json")


def json_response(
    body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON in UTF-8."""
    return Response(
        encode(body), status_code=status, headers=headers, media_type="application/json"
    )
