"""TransferThread: whoever stops waiting for a read still learns when it is over."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from contracts.errors import TransferFailed
from kv_transfer.connector import KvConnector, PeerHandle
from kv_transfer.layout import MemoryRegion, Region
from kv_transfer.memory import MemoryConnector, MemoryHub
from kv_transfer.transfer_thread import TransferThread

SIZE = 4096
TIME_LIMIT_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIME_LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what changes it is another thread
            await asyncio.sleep(0.001)


class Bench:
    """A P's connector, and a D's transfer thread that reads from it."""

    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.theirs = np.arange(SIZE, dtype=np.uint8)
        self.ours = np.zeros(SIZE, dtype=np.uint8)
        self.remote = MemoryRegion(self.theirs.ctypes.data, SIZE)
        self.words = np.zeros(8, dtype=np.uint64)
        self.exporter = MemoryConnector("p", self.hub)
        self.exporter.register(self.remote, MemoryRegion(self.words.ctypes.data, 64))
        self.thread = TransferThread(lambda: MemoryConnector("d", self.hub))
        self.peer = PeerHandle("")
        self.ended: list[str] = []

    async def open(self) -> None:
        await self.thread.start()
        await self.thread.register(
            MemoryRegion(self.ours.ctypes.data, SIZE), MemoryRegion(self.words.ctypes.data, 64)
        )
        self.peer = await self.thread.add_peer(self.exporter.agent_metadata())

    def read(
        self,
        count: int,
        timeout_s: float = TIME_LIMIT_S,
        lease_deadline: Callable[[], float] | None = None,
    ) -> "asyncio.Task[object]":
        slices = [[Region(i * 8, i * 8, 8)] for i in range(count)]
        return asyncio.ensure_future(
            self.thread.read(
                self.peer,
                "kv",
                slices,
                self.remote,
                deadline=time.monotonic() + timeout_s,
                on_terminal=lambda: self.ended.append("terminal"),
                lease_deadline=lease_deadline,
            )
        )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.open()
    yield bench
    assert await bench.thread.close(TIME_LIMIT_S)


async def test_few_slices_are_in_flight_at_a_time(bench: Bench) -> None:
    """Q3: an abort takes effect after the slices in flight."""
    bench.hub.hold()
    task = bench.read(count=5)
    await until(lambda: bench.hub.num_held == 2)
    bench.hub.land()
    await task
    np.testing.assert_array_equal(bench.ours[:40], bench.theirs[:40])
    assert bench.ended == ["terminal"]


async def test_a_cancelled_read_posts_no_more_and_tells_when_the_rest_has_landed(
    bench: Bench,
) -> None:
    """Q1."""
    bench.hub.hold()
    task = bench.read(count=5)
    await until(lambda: bench.hub.num_held == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.ended == []  # quarantine
    bench.hub.land()
    await until(lambda: bench.ended == ["terminal"])
    assert bench.ours[:16].any()
    assert not bench.ours[16:].any()


async def test_a_deadline_ends_the_wait_and_not_the_transfer(bench: Bench) -> None:
    bench.hub.hold()
    with pytest.raises(TransferFailed, match="in time"):
        await bench.read(count=2, timeout_s=0.01)
    assert (bench.ended, bench.hub.num_held) == ([], 2)
    bench.hub.fail()
    await until(lambda: bench.ended == ["terminal"])


async def test_nothing_is_posted_after_the_lease(bench: Bench) -> None:
    """L1."""
    bench.hub.hold()
    lease_end = [time.monotonic() + TIME_LIMIT_S]
    task = bench.read(count=5, lease_deadline=lambda: lease_end[0])
    await until(lambda: bench.hub.num_held == 2)
    lease_end[0] = time.monotonic()
    bench.hub.land()
    with pytest.raises(TransferFailed, match="over"):
        await task
    await until(lambda: bench.ended == ["terminal"])
    assert not bench.ours[24:].any()


async def test_a_failed_slice_fails_the_read_at_once(bench: Bench) -> None:
    bench.hub.hold()
    task = bench.read(count=5)
    await until(lambda: bench.hub.num_held == 2)
    bench.hub.disconnect("p")
    with pytest.raises(TransferFailed, match="failed read"):
        await task
    await until(lambda: bench.ended == ["terminal"])


async def test_a_read_of_nothing_is_over(bench: Bench) -> None:
    await bench.read(count=0)
    assert bench.ended == ["terminal"]


async def test_what_cannot_be_posted_is_over(bench: Bench) -> None:
    future = bench.thread.submit_read(bench.peer, "kv", [Region(0, 0, SIZE + 1)], bench.remote)
    result = await asyncio.wrap_future(future)
    assert not result.ok
    assert "outside" in result.error


async def test_a_future_resolves_only_at_the_end_and_cannot_be_cancelled(bench: Bench) -> None:
    bench.hub.hold()
    future = bench.thread.submit_read(bench.peer, "kv", [Region(0, 0, 8)], bench.remote)
    await until(lambda: bench.hub.num_held == 1)
    assert not future.cancel()
    assert not future.done()
    bench.hub.land()
    result = await asyncio.wrap_future(future)
    assert (result.ok, result.num_bytes, result.num_descriptors) == (True, 8, 1)


async def test_close_ends_pending_reads_without_their_bytes(bench: Bench) -> None:
    bench.hub.hold()
    task = bench.read(count=2)
    await until(lambda: bench.hub.num_held == 2)
    assert await bench.thread.close(TIME_LIMIT_S)
    with pytest.raises(TransferFailed, match="closed"):
        await task
    await until(lambda: bench.ended == ["terminal"])
    bench.hub.land()
    assert not bench.ours.any()


async def test_a_closed_thread_refuses_and_closes_again(bench: Bench) -> None:
    assert await bench.thread.close(TIME_LIMIT_S)
    assert await bench.thread.close(TIME_LIMIT_S)
    with pytest.raises(TransferFailed, match="closed"):
        await bench.thread.agent_metadata()
    with pytest.raises(TransferFailed, match="closed"):
        await bench.read(count=1)
    assert bench.ended == ["terminal"]


async def test_errors_of_the_connector_reach_the_caller(bench: Bench) -> None:
    with pytest.raises(TransferFailed, match="not readable"):
        await bench.thread.add_peer(b"?")
    bench.hub.hold()
    future = bench.thread.submit_read(bench.peer, "kv", [Region(0, 0, 8)], bench.remote)
    with pytest.raises(TransferFailed, match="pending"):
        await bench.thread.remove_peer(bench.peer)
    bench.hub.land()
    await asyncio.wrap_future(future)
    await bench.thread.remove_peer(bench.peer)


async def test_a_connector_that_cannot_be_made_is_reported() -> None:
    def broken() -> KvConnector:
        raise OSError("no such device")

    thread = TransferThread(broken)
    with pytest.raises(OSError, match="no such device"):
        await thread.start()
    with pytest.raises(TransferFailed, match="closed"):
        await thread.agent_metadata()
    assert await thread.close(TIME_LIMIT_S)


async def test_a_thread_that_was_never_started_closes() -> None:
    thread = TransferThread(lambda: MemoryConnector("d", MemoryHub()))
    assert await thread.close(TIME_LIMIT_S)
    with pytest.raises(TransferFailed, match="closed"):
        await thread.agent_metadata()
