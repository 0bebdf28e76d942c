"""Memory for an arriving handoff: in turn, all or none, within a time (M2, M7)."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future

from contracts.errors import OutOfBlocks, TransferFailed
from contracts.request import GenerationRequest
from decode_worker.turns import Line
from engine.host import EngineHost
from engine.sequence import Reservation

_RETRY_S = 0.005


async def reserve(
    host: EngineHost,
    line: Line,
    request: GenerationRequest,
    *,
    timeout_s: float,
    on_reclaimed: Callable[[], None],
) -> Reservation:
    """Wait for a turn and for blocks. `on_reclaimed` is called in the engine's thread (M3).

    Cancelled, it gives back what the engine may still answer.

    Raises:
        TransferFailed: no blocks became free within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    keys: list[bytes] = []  # the prompt is hashed once

    def undo(done: "Future[Reservation]") -> None:
        if not done.cancelled() and done.exception() is None:
            reservation = done.result()
            host.call(lambda scheduler: scheduler.unreserve(reservation))

    with line.turn(request.priority) as turn:
        while True:  # a big prompt does not starve behind small ones
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await turn.come()
            except TimeoutError:
                raise TransferFailed("no KV blocks became free in time") from None
            asked = host.call(lambda scheduler: scheduler.reserve(request, keys, on_reclaimed))
            try:
                return await asyncio.shield(asyncio.wrap_future(asked))
            except OutOfBlocks:
                if time.monotonic() > deadline:
                    raise TransferFailed("no KV blocks became free in time") from None
                await asyncio.sleep(_RETRY_S)
            except asyncio.CancelledError:
                asked.add_done_callback(undo)
                raise
