"""The one table from the error tree to HTTP, and the body every error has."""

import json
import math

from contracts.errors import (
    ConfigurationError,
    EngineFailure,
    HandoffError,
    InvalidRequest,
    NotFound,
    OutOfBlocks,
    Overloaded,
    ServingError,
    Unavailable,
    UnsupportedModel,
)


class MalformedRequest(InvalidRequest):
    """The body is not JSON, or a field has the wrong type; `param` reads like `body.n`."""


class BodyTooLarge(InvalidRequest):
    """More bytes than the operator allows."""


class BodyTooSlow(InvalidRequest):
    """The client does not go on sending it."""


STATUS: dict[type[ServingError], tuple[int, str]] = {
    InvalidRequest: (400, "BadRequestError"),
    MalformedRequest: (400, "Bad Request"),
    BodyTooLarge: (413, "RequestEntityTooLargeError"),
    BodyTooSlow: (408, "RequestTimeoutError"),
    NotFound: (404, "NotFoundError"),
    Overloaded: (429, "RateLimitError"),
    Unavailable: (503, "ServiceUnavailableError"),
    HandoffError: (503, "ServiceUnavailableError"),
    OutOfBlocks: (503, "ServiceUnavailableError"),
    UnsupportedModel: (501, "NotImplementedError"),
    ConfigurationError: (500, "InternalServerError"),
    EngineFailure: (500, "InternalServerError"),
}
"""Status and `type` for each class; a class without an entry takes its nearest base's."""

BY_STATUS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
}

_PUBLIC = (InvalidRequest, NotFound, Overloaded, Unavailable)
_MESSAGE_CHARS = 500


def status_of(error: ServingError) -> tuple[int, str]:
    """HTTP status and error type of an error."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return 500, "InternalServerError"


def error_body(
    status: int, message: str, kind: str | None = None, param: str | None = None
) -> dict[str, object]:
    """The body of section 5 of the API; `kind` defaults to the one usual for the status."""
    if kind is None:
        kind = BY_STATUS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    if len(message) > _MESSAGE_CHARS:
        message = message[: _MESSAGE_CHARS - 1] + "…"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def body_of(error: ServingError) -> dict[str, object]:
    """The body for an error. What concerns only the operator is in the log, not here."""
    status, kind = status_of(error)
    if isinstance(error, _PUBLIC):
        message = str(error) or kind
    elif status == 503:
        message = "The request could not be completed now; please try again."
    else:
        message = "The server failed to complete the request."
    return error_body(status, message, kind, getattr(error, "param", None))


def headers_of(error: ServingError) -> dict[str, str]:
    """`Retry-After` (whole seconds) where trying again helps."""
    status, _ = status_of(error)
    if isinstance(error, BodyTooSlow):
        return {"Connection": "close"}  # whatever still comes is no request
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return {"Retry-After": "1"} if status == 503 else {}


def encode(body: dict[str, object]) -> bytes:
    """JSON as UTF-8. Text that is not Unicode (lone surrogates) is replaced, never an error."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
