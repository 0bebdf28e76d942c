"""What surrounds every route: keys, and the request id in the response's headers. Plain ASGI."""

import hmac
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http_errors import encode, error_body

OPEN_PATHS = frozenset({"/health", "/metrics", "/openapi.json", "/ping", "/version"})
"""No key is asked for here; it is for everything else, so that no route is forgotten."""

_BODY_401 = encode(error_body(401, "missing or wrong API key", "AuthenticationError", None))
_REQUEST_ID_CHARS = 256


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header (name in lower case)."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


def sent_request_id(scope: Scope) -> str | None:
    """The client's `X-Request-Id`; None if it sent none, or one that is long or not printable."""
    value = header(scope, b"x-request-id") or b""
    text = value.decode("latin-1").strip()
    fits = 0 < len(text) <= _REQUEST_ID_CHARS and text.isascii() and text.isprintable()
    return text if fits else None


class ApiKeyMiddleware:
    """Needs `Authorization: Bearer <key>` on all but the open paths, except for OPTIONS."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 401."""
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        response = Response(
            _BODY_401,
            status_code=401,
            media_type="application/json",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        token = token.strip()
        matches = [hmac.compare_digest(token, key) for key in self._keys]  # all, in equal time
        return any(matches)


class RequestIdMiddleware:
    """Echoes `X-Request-Id` if the client sent one that is fit to be shown."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the header to the response's."""
        value = sent_request_id(scope) if scope["type"] == "http" else None
        if value is None:
            await self._app(scope, receive, send)
            return
        echo = (b"x-request-id", value.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), echo]
            await send(message)

        await self._app(scope, receive, send_with_id)
