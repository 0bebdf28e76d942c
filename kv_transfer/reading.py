"""Reading what belongs together, in slices, on one or several ranks, and the fence after it."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from contracts.errors import TransferFailed
from kv_transfer.connector import Read
from kv_transfer.flight import Flight, ReadResult
from kv_transfer.transfer_thread import Chain, TransferThread


class Reader(Protocol):
    """What reads into one rank's memory."""

    def submit(self, read: Read) -> Future[ReadResult]:
        """See TransferThread.submit. On the event loop."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What one rank is to read, slice by slice (Q3)."""

    reader: Reader
    slices: Sequence[Read]


async def read(
    lanes: Sequence[Lane],
    *,
    deadline: float,
    fencer: TransferThread | None = None,
    then: Sequence[Read] = (),
    lease_deadline: Callable[[], float] | None = None,
    on_terminal: Callable[[], None] | None = None,
    depth: int = 2,
) -> ReadResult:
    """Read all slices of all lanes, `depth` of each lane in flight at a time (Q3).

    Args:
        lanes: each slice is posted as one read.
        deadline: give up at this time of the monotonic clock; what is posted lands all the same.
        fencer: the thread that reads `then`.
        then: read this too, posted the moment the last slice of the last lane has landed (F5);
            not if one of them failed or this call was given up. The result counts neither its
            bytes nor its time.
        lease_deadline: asked before each post; no slice is posted after it (L1).
        on_terminal: called exactly once, on the event loop, when nothing posted by this call can
            write any rank's memory any more: before a successful return, else possibly long
            after the raise or cancellation. Until then the target blocks are quarantined (Q1).
        depth: 2 keeps the link busy while the loop turns around.

    Raises:
        TransferFailed: a read failed, or a deadline passed. Nothing more is posted after that,
            nor after a cancellation.
        ValueError: there is nothing for `then` to follow.
    """
    num_slices = sum(len(lane.slices) for lane in lanes)
    if then and not num_slices:
        raise ValueError("there is no read for another to follow")
    flight = Flight(asyncio.get_running_loop(), on_terminal)
    started_at = time.monotonic()
    chain: Chain | None = None
    if then:
        assert fencer is not None
        chain = fencer.chain(then, num_slices)
        for future in chain.futures:
            flight.follow(future)
    left = {number: deque(lane.slices) for number, lane in enumerate(lanes) if lane.slices}
    try:
        async with asyncio.timeout(max(0.0, deadline - started_at)):
            while left:
                number = await flight.room(left, depth)
                now = time.monotonic()
                if now >= deadline or (lease_deadline is not None and now >= lease_deadline()):
                    raise TransferFailed("the time for reading is over")
                future = lanes[number].reader.submit(left[number].popleft())
                flight.add(number, future)
                if chain is not None:
                    future.add_done_callback(chain.landed)
                if not left[number]:
                    del left[number]
            await flight.over()
    except TimeoutError:
        raise TransferFailed("the read did not end in time") from None
    finally:
        flight.seal()
        if chain is not None and not all(future.done() for future in chain.futures):
            chain.give_up()
    seconds = time.monotonic() - started_at - flight.following_s
    return ReadResult(True, flight.num_bytes, flight.num_descriptors, seconds)
