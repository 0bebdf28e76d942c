"""Noticing that a client has left, while something else is being waited for."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


async def disconnected(receive: Receive) -> None:
    """Return when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def cut(receive: Receive) -> None:
    """Break the connection of a client that does not read.

    An application can only stop answering; uvicorn then keeps the connection, and what was
    written to it, until the client has read that. Its own `receive` knows the transport. With
    another server nothing happens here.
    """
    cycle = getattr(receive, "__self__", None)
    abort = getattr(getattr(cycle, "transport", None), "abort", None)
    if callable(abort):
        abort()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, or give it up when the client leaves.

    Raises:
        ClientGone: it left first; `work` was cancelled.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
