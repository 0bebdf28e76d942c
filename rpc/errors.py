"""The error tree on the wire: a gRPC status for the call, the class's name beside it.

Statuses are for generic tools; between our own processes the class name (in the trailing
metadata, or a RequestFailed's and ClaimDenied's `kind`) brings the same class back.
"""

import asyncio
import re
from typing import Any, Final, Never

from grpc import StatusCode, aio

from contracts.errors import (
    ClaimRefused,
    ConfigurationError,
    EngineFailure,
    FenceBroken,
    HandoffError,
    InvalidRequest,
    NotFound,
    OutOfBlocks,
    Overloaded,
    ServingError,
    TransferFailed,
    TransferGone,
    Unavailable,
    UnsupportedModel,
)
from contracts.events import RequestFailed
from contracts.ids import RequestId

STATUS: Final[dict[type[ServingError], StatusCode]] = {
    ServingError: StatusCode.UNKNOWN,
    InvalidRequest: StatusCode.INVALID_ARGUMENT,
    NotFound: StatusCode.NOT_FOUND,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: StatusCode.UNAVAILABLE,
    HandoffError: StatusCode.ABORTED,
    TransferGone: StatusCode.ABORTED,
    ClaimRefused: StatusCode.PERMISSION_DENIED,
    FenceBroken: StatusCode.DATA_LOSS,
    TransferFailed: StatusCode.ABORTED,
    OutOfBlocks: StatusCode.RESOURCE_EXHAUSTED,
    UnsupportedModel: StatusCode.UNIMPLEMENTED,
    ConfigurationError: StatusCode.FAILED_PRECONDITION,
    EngineFailure: StatusCode.INTERNAL,
}

# For a status without a class name, so one that gRPC itself or a stranger made.
_FROM_STATUS: Final[dict[StatusCode, type[ServingError]]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequest,
    StatusCode.OUT_OF_RANGE: InvalidRequest,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    StatusCode.UNAVAILABLE: Unavailable,
    StatusCode.DEADLINE_EXCEEDED: Unavailable,
    StatusCode.CANCELLED: Unavailable,
    StatusCode.UNAUTHENTICATED: ConfigurationError,
    StatusCode.FAILED_PRECONDITION: ConfigurationError,
    StatusCode.UNIMPLEMENTED: ConfigurationError,
}

_KIND_KEY: Final = "baton-error"
_MAX_DETAILS: Final = 2000  # characters; HTTP/2 headers have a size limit
_ABORT_TIMEOUT_S: Final = 1.0


def kind_of(error: ServingError) -> str:
    """The name under which `error` travels: that of its class."""
    return type(error).__name__


def failed(request_id: RequestId, attempt: int, error: BaseException) -> RequestFailed:
    """What a router is told of a request that `error` ended; a stranger's is a fault of ours."""
    kind = kind_of(error) if isinstance(error, ServingError) else EngineFailure.__name__
    param = (error.param or "") if isinstance(error, InvalidRequest | NotFound) else ""
    return RequestFailed(request_id, attempt, kind, str(error), param)


def status_of(error: ServingError) -> StatusCode:
    """The gRPC status of `error`: its class's, or its nearest base's."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def error_named(kind: str, message: str) -> ServingError:
    """The error that was raised as class `kind` in another process.

    An unknown name becomes an EngineFailure that mentions it. Fields other than the message
    take their defaults, but OutOfBlocks, whose message holds them.
    """
    cls = _BY_NAME.get(kind)
    if cls is None:
        return EngineFailure(f"{kind}: {message}")
    if cls is OutOfBlocks:
        wanted, available, *_ = [*map(int, re.findall(r"\d+", message)), 0, 0]
        return OutOfBlocks(wanted=wanted, available=available)
    return cls(message)


def error_of_call(error: aio.AioRpcError) -> ServingError:
    """The error that ended a call: the worker's own, or what gRPC's status stands for."""
    message = error.details() or error.code().name
    for key, value in error.trailing_metadata() or ():
        if key == _KIND_KEY:
            return error_named(value if isinstance(value, str) else value.decode(), message)
    return _FROM_STATUS.get(error.code(), EngineFailure)(message)


async def abort_with(context: aio.ServicerContext[Any, Any], error: ServingError) -> Never:
    """End a call with `error`. Never returns; takes a second at most, even to a frozen peer."""
    try:
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort(
                status_of(error), str(error)[:_MAX_DETAILS], ((_KIND_KEY, kind_of(error)),)
            )
    except TimeoutError:
        # The peer's window is full, so the status cannot leave. gRPC logs any other exception.
        raise asyncio.CancelledError("the peer does not read") from None


def _tree(root: type[ServingError]) -> dict[str, type[ServingError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_NAME: Final = _tree(ServingError)
