"""TransferThread: whoever stops waiting for a read still learns when it is over."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from contracts.errors import EngineFailure, TransferFailed
from kv_transfer import reading
from kv_transfer.connector import KvConnector, PeerHandle, Read, ReadState
from kv_transfer.flight import ReadResult
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
        self.landing = np.zeros(8, dtype=np.uint64)

    async def open(self) -> None:
        await self.thread.start()
        await self.thread.register(
            MemoryRegion(self.ours.ctypes.data, SIZE), MemoryRegion(self.landing.ctypes.data, 64)
        )
        self.peer = await self.thread.add_peer(self.exporter.agent_metadata())

    @property
    def fence(self) -> tuple[Read, ...]:
        """Of the first two words."""
        words = MemoryRegion(self.words.ctypes.data, 64)
        return (Read(self.peer, "words", [Region(0, 0, 16)], words),)

    def kv(self, offset: int, length: int = 8) -> Read:
        return Read(self.peer, "kv", [Region(offset, offset, length)], self.remote)

    def read(
        self,
        count: int,
        timeout_s: float = TIME_LIMIT_S,
        lease_deadline: Callable[[], float] | None = None,
        then: tuple[Read, ...] = (),
    ) -> "asyncio.Task[ReadResult]":
        return asyncio.ensure_future(
            reading.read(
                [reading.Lane(self.thread, [self.kv(i * 8) for i in range(count)])],
                fencer=self.thread,
                deadline=time.monotonic() + timeout_s,
                on_terminal=lambda: self.ended.append("terminal"),
                lease_deadline=lease_deadline,
                then=then,
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


async def test_what_follows_is_read_when_all_slices_have_landed(bench: Bench) -> None:
    """F5: the words as they are then, not as they were when the slices were posted."""
    bench.hub.hold()
    task = bench.read(count=3, then=bench.fence)
    await until(lambda: bench.hub.num_held == 2)
    bench.hub.land(hold=True)
    await until(lambda: bench.hub.num_held == 1)  # slice 3
    assert not bench.landing.any()
    bench.words[:2] = 7, 9
    bench.hub.land()
    result = await task
    assert bench.landing[:3].tolist() == [7, 9, 0]
    assert (result.num_bytes, result.num_descriptors) == (24, 3)  # without the words
    assert bench.ended == ["terminal"]


async def test_what_follows_is_waited_for_after_a_cancellation(bench: Bench) -> None:
    """Q1: once posted, it may write as late as any other."""
    bench.hub.hold()
    task = bench.read(count=1, then=bench.fence)
    await until(lambda: bench.hub.num_held == 1)
    bench.hub.land(hold=True)
    await until(lambda: bench.hub.num_held == 1)  # the words
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.thread.agent_metadata()  # it has seen the cancellation
    await asyncio.sleep(0)
    assert bench.ended == []
    bench.hub.land()
    await until(lambda: bench.ended == ["terminal"])


@pytest.mark.parametrize("how", ["cancelled", "failed", "late", "closed"])
async def test_what_follows_is_not_read_after_what_did_not_end_well(bench: Bench, how: str) -> None:
    bench.words[:2] = 7, 9
    bench.hub.hold()
    timeout_s = 0.01 if how == "late" else TIME_LIMIT_S
    task = bench.read(count=3, then=bench.fence, timeout_s=timeout_s)
    if how != "late":
        await until(lambda: bench.hub.num_held == 2)
    match how:
        case "cancelled":
            task.cancel()
        case "failed":
            bench.hub.fail()
        case "closed":
            assert await bench.thread.close(TIME_LIMIT_S)
    with pytest.raises((TransferFailed, asyncio.CancelledError)):
        await task
    if how in ("cancelled", "late"):
        assert bench.ended == []
        bench.hub.land()
    await until(lambda: bench.ended == ["terminal"])
    assert not bench.landing.any()


async def test_nothing_cannot_be_followed(bench: Bench) -> None:
    with pytest.raises(ValueError, match="follow"):
        await bench.read(count=0, then=bench.fence)


async def test_what_cannot_be_posted_is_over(bench: Bench) -> None:
    future = bench.thread.submit(bench.kv(0, SIZE + 1))
    result = await asyncio.wrap_future(future)
    assert not result.ok
    assert "outside" in result.error


async def test_a_future_resolves_only_at_the_end_and_cannot_be_cancelled(bench: Bench) -> None:
    bench.hub.hold()
    future = bench.thread.submit(bench.kv(0))
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
    future = bench.thread.submit(bench.kv(0))
    with pytest.raises(TransferFailed, match="pending"):
        await bench.thread.remove_peer(bench.peer)
    bench.hub.land()
    await asyncio.wrap_future(future)
    await bench.thread.remove_peer(bench.peer)


async def test_a_fault_of_the_connector_is_told_to_who_watches(bench: Bench) -> None:
    """A D that can read nothing any more is to be replaced, not to recompute for ever."""
    bench.thread.assert_pulse()
    task = bench.read(count=1)

    def broken(self: MemoryConnector, handle: object) -> ReadState:
        raise OSError("no such device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryConnector, "poll", broken)
        with pytest.raises(TransferFailed, match="closed"):
            await task
    with pytest.raises(EngineFailure, match="no such device"):
        bench.thread.assert_pulse()


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
