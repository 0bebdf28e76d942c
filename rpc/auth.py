"""Who may open a session or a peer link: holders of the cluster key.

The key itself never travels: both ends derive a token from it. The token is sent as metadata
and never logged. It authenticates; it does not encrypt (docs/operations: use a private network).
"""

import hmac
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from contracts.errors import ConfigurationError

_METADATA_KEY = "baton-token"
_PURPOSE = b"baton rpc token, version 1"

Metadata = tuple[tuple[str, str], ...]
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic in the stubs only


def _token(cluster_key: str) -> str:
    if not cluster_key:
        raise ConfigurationError("the cluster key is empty; every process needs the same key")
    return hmac.new(cluster_key.encode(), _PURPOSE, sha256).hexdigest()


def credentials(cluster_key: str) -> Metadata:
    """What a client sends with each call.

    Raises:
        ConfigurationError: the key is empty.
    """
    return ((_METADATA_KEY, _token(cluster_key)),)


class AuthInterceptor(aio.ServerInterceptor):
    """Refuses every call without the cluster's token, before its handler sees it."""

    def __init__(self, cluster_key: str) -> None:
        self._expected = _token(cluster_key).encode()
        # On the wire a unary call is a stream of one message, so one refusal fits all methods.
        self._refusal: _Handler = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Look at the metadata; compared in constant time."""
        for key, value in handler_call_details.invocation_metadata or ():
            if key == _METADATA_KEY:
                given = value if isinstance(value, bytes) else value.encode()
                if hmac.compare_digest(given, self._expected):
                    return await continuation(handler_call_details)
        return self._refusal


async def _refuse(_requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "this worker has another cluster key (or none was sent)"
    )
