"""Opening a stream: one connection, one call, the hellos, all under one deadline."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from grpc import StatusCode, aio

from contracts.errors import HandoffError, ServingError, Unavailable
from rpc.auth import credentials
from rpc.errors import error_of_call
from rpc.wire import CHANNEL_OPTIONS

_log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

_CLOSE_TIMEOUT_S = 2.0


class Dialled(Generic[In, Out]):
    """An open call and the connection it owns."""

    def __init__(self, channel: aio.Channel, call: aio.StreamStreamCall[Out, In]) -> None:
        self.call = call
        self._channel = channel

    async def explain(self, reason: str) -> str:
        """Why the stream ended: the worker's word if the call has a status, else `reason`."""
        if not self.call.done() or self.call.cancelled():
            return reason
        if await self.call.code() is StatusCode.OK:
            return reason
        return await self.call.details() or reason

    async def hang_up(self) -> None:
        """Cancel the call and close the connection; bounded, never raises. The last call.

        grpc keeps the connection for as long as somebody holds the call.
        """
        self.call.cancel()
        await _close(self._channel)
        del self.call, self._channel


async def dial(
    name: str,
    address: str,
    method: Callable[[aio.Channel], aio.StreamStreamMultiCallable[Out, In]],
    hello: Out,
    *,
    cluster_key: str,
    timeout_s: float,
) -> tuple[Dialled[In, Out], In]:
    """Open a stream, say hello, and wait for the answer's first message.

    Raises:
        HandoffError: a P refuses this D (ClaimRefused).
        Unavailable: nobody answers in time, or whoever answers refuses; the message says which.
        ConfigurationError: the cluster key is empty.
    """
    metadata = credentials(cluster_key)
    channel = aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    call: aio.StreamStreamCall[Out, In] | None = None
    try:
        async with asyncio.timeout(timeout_s):
            call = method(channel)(metadata=aio.Metadata(*metadata))
            await call.write(hello)
            first: Any = await call.read()
        if first is aio.EOF:
            raise Unavailable("it closed the stream at once")
    except BaseException as error:
        if call is not None:
            call.cancel()
        await _close(channel)
        refusal = _refusal(f"{name} at {address}", timeout_s, error)
        if refusal is None:
            raise
        raise refusal from error
    return Dialled(channel, call), first


def _refusal(who: str, timeout_s: float, error: BaseException) -> ServingError | None:
    """What `error` means to who dialled; None for what is not about the other side."""
    if isinstance(error, TimeoutError):
        return Unavailable(f"{who} did not answer within {timeout_s:g} s")
    if isinstance(error, aio.AioRpcError):
        error = error_of_call(error)
    if isinstance(error, HandoffError):
        return error
    if isinstance(error, ServingError | aio.BaseError | asyncio.InvalidStateError):
        return Unavailable(f"{who} refuses: {error}")
    return None


async def _close(channel: aio.Channel) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await channel.close()
    except TimeoutError:
        _log.warning("a connection did not close within %g s", _CLOSE_TIMEOUT_S)
