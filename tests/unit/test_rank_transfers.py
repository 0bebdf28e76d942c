"""Transfers of a worker of several ranks: one read for all, terminal when all ranks are."""

import asyncio
import functools
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from contracts.errors import EngineFailure, TransferFailed
from contracts.memory import RankProcess
from kv_transfer.connector import ReadState
from kv_transfer.layout import RankLayout
from kv_transfer.memory import MemoryConnector, MemoryHub
from kv_transfer.rank_frames import Frame, receive
from kv_transfer.rank_regions import rank_reads
from kv_transfer.rank_remote import RemoteTransfers
from kv_transfer.rank_transfers import RankPeer, RankTransfers
from tests.support.connector_rigs import unique_name
from tests.support.rank_rigs import NUM_BLOCKS, RankMemory, Ranks, content, gathered

TIME_LIMIT_S = 10.0
SRC, DST = [7, 8, 9, 3, 20], [1, 2, 3, 4, 15]
WORDS = np.arange(100, 100 + NUM_BLOCKS, dtype=np.uint64)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIME_LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what changes it is another thread
            await asyncio.sleep(0.001)


async def fault(transfers: RankTransfers) -> str:
    """Wait until it says that it can do nothing more: why."""
    async with asyncio.timeout(TIME_LIMIT_S):
        while True:
            try:
                transfers.assert_pulse()
            except EngineFailure as error:
                return str(error)
            await asyncio.sleep(0.001)


def deadline() -> float:
    return time.monotonic() + TIME_LIMIT_S


async def peer_of(prefill: Ranks, decode: RankTransfers) -> RankPeer:
    return await decode.add_peer(prefill.transfers.layout, prefill.transfers.metadata)


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub()


@pytest.fixture
async def two(hub: MemoryHub) -> AsyncIterator[tuple[Ranks, Ranks]]:
    """A P and a D of two ranks each; P's memory is filled."""
    prefill = await Ranks.start(hub, 2, reads=False)
    decode = await Ranks.start(hub, 2, reads=True)
    prefill.fill(content(1), WORDS)
    yield prefill, decode
    await decode.close()
    await prefill.close()


@pytest.mark.parametrize(("p_ranks", "d_ranks"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4)])
async def test_each_rank_gets_its_heads(hub: MemoryHub, p_ranks: int, d_ranks: int) -> None:
    prefill = await Ranks.start(hub, p_ranks, reads=False)
    decode = await Ranks.start(hub, d_ranks, reads=True)
    data = content(p_ranks)
    prefill.fill(data, WORDS)
    peer = await peer_of(prefill, decode.transfers)
    ended: list[str] = []
    plan = decode.transfers.plan(peer, SRC, DST, (SRC[1:], DST[1:]))
    result = await decode.transfers.read(
        plan, deadline=deadline(), on_terminal=lambda: ended.append("terminal")
    )
    assert ended == ["terminal"]
    assert (result.ok, result.num_bytes) == (True, len(SRC) * data[0].nbytes)
    expected = np.zeros_like(data)
    expected[DST] = data[SRC]
    np.testing.assert_array_equal(gathered(decode.memories), expected)
    assert decode.transfers.words(plan) == WORDS[SRC[1:]].tolist()
    await decode.transfers.remove_peer(peer)
    await decode.close()
    await prefill.close()


async def test_words_on_which_ranks_do_not_agree_are_no_generation(
    two: tuple[Ranks, Ranks],
) -> None:
    """F7, F9: one rank that says otherwise is enough."""
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    prefill.memories[1].words[9] += np.uint64(1)
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    await decode.transfers.read(plan, deadline=deadline())
    assert decode.transfers.words(plan) == [107, 108, 0, 103, 120]
    prefill.memories[0].words[9] += np.uint64(1)
    await decode.transfers.read(plan, deadline=deadline())
    assert decode.transfers.words(plan) == [107, 108, 110, 103, 120]


async def test_words_of_an_earlier_read_do_not_count(
    hub: MemoryHub, two: tuple[Ranks, Ranks]
) -> None:
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    await decode.transfers.read(plan, deadline=deadline())
    hub.disconnect(peer.handles[1].name)
    with pytest.raises(TransferFailed):
        await decode.transfers.read(plan, deadline=deadline())
    assert decode.transfers.words(plan) == [0] * len(DST)


async def test_a_read_is_terminal_when_it_is_on_every_rank(
    hub: MemoryHub, two: tuple[Ranks, Ranks]
) -> None:
    """Q1: until then all its blocks are quarantined, whichever rank is late."""
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    hub.hold()
    ended: list[str] = []
    plan = decode.transfers.plan(peer, SRC, DST)
    task = asyncio.ensure_future(
        decode.transfers.read(
            plan, deadline=deadline(), on_terminal=lambda: ended.append("terminal")
        )
    )
    await until(lambda: hub.num_held == 2)
    with pytest.raises(TransferFailed, match="1 reads"):
        await decode.transfers.remove_peer(peer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.disconnect(peer.handles[0].name)  # ends what rank 0 reads
    await until(lambda: hub.num_held == 1)
    await decode.transfers.add_peer(prefill.transfers.layout, prefill.transfers.metadata)
    assert ended == []  # every rank has been asked something since
    hub.land()
    await until(lambda: ended == ["terminal"])


async def test_an_abort_stops_all_ranks_after_what_is_posted(
    hub: MemoryHub, two: tuple[Ranks, Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q3."""
    prefill, decode = two
    sliced = functools.partial(rank_reads, max_bytes=1)
    monkeypatch.setattr("kv_transfer.rank_transfers.rank_reads", sliced)
    peer = await peer_of(prefill, decode.transfers)
    hub.hold()
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    assert [len(lane.slices) for lane in plan.lanes] == [5, 5]
    ended: list[str] = []
    task = asyncio.ensure_future(
        decode.transfers.read(
            plan, deadline=deadline(), on_terminal=lambda: ended.append("terminal")
        )
    )
    await until(lambda: hub.num_held == 4)  # two for each rank
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.land()
    await until(lambda: ended == ["terminal"])
    landed = [np.flatnonzero(memory.kv.any(axis=(1, 2))).tolist() for memory in decode.memories]
    assert landed == [[1, 2], [1, 2]]
    assert decode.transfers.words(plan) == [0] * len(DST)


async def test_nothing_is_posted_on_any_rank_after_the_lease(
    hub: MemoryHub, two: tuple[Ranks, Ranks]
) -> None:
    """L1."""
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    plan = decode.transfers.plan(peer, SRC, DST)
    with pytest.raises(TransferFailed, match="over"):
        await decode.transfers.read(
            plan, deadline=deadline(), lease_deadline=lambda: time.monotonic() - 1
        )
    assert not gathered(decode.memories).any()


async def test_close_ends_the_reads_of_all_ranks(hub: MemoryHub, two: tuple[Ranks, Ranks]) -> None:
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    hub.hold()
    ended: list[str] = []
    plan = decode.transfers.plan(peer, SRC, DST)
    task = asyncio.ensure_future(
        decode.transfers.read(
            plan, deadline=deadline(), on_terminal=lambda: ended.append("terminal")
        )
    )
    await until(lambda: hub.num_held == 2)
    assert await decode.transfers.close(TIME_LIMIT_S)
    with pytest.raises(TransferFailed, match="closed"):
        await task
    await until(lambda: ended == ["terminal"])
    hub.land()
    assert not gathered(decode.memories).any()
    with pytest.raises(TransferFailed, match="closed"):
        await decode.transfers.read(plan, deadline=deadline())


async def test_bad_metadata_of_any_rank_is_refused(two: tuple[Ranks, Ranks]) -> None:
    prefill, decode = two
    layout, metadata = prefill.transfers.layout, prefill.transfers.metadata
    with pytest.raises(TransferFailed, match="not readable"):
        await decode.transfers.add_peer(layout, (metadata[0], b"?"))
    with pytest.raises(TransferFailed, match="all its ranks"):
        await decode.transfers.add_peer(layout, metadata[:1])
    decode.transfers.assert_pulse()


async def test_a_fault_of_another_rank_is_told_to_who_watches(two: tuple[Ranks, Ranks]) -> None:
    prefill, decode = two
    peer = await peer_of(prefill, decode.transfers)
    mine, poll = peer.handles[0], MemoryConnector.poll

    def broken(self: MemoryConnector, handle: object) -> ReadState:
        if handle.peer == mine:  # type: ignore[attr-defined]
            return poll(self, handle)  # type: ignore[arg-type]
        raise OSError("no such device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryConnector, "poll", broken)
        plan = decode.transfers.plan(peer, SRC, DST)
        with pytest.raises(TransferFailed, match="closed"):
            await decode.transfers.read(plan, deadline=deadline())
        assert "no such device" in await fault(decode.transfers)


class Puppet:
    """A follower of a D, played by the test: its process, and its end of the channel."""

    def __init__(self, hub: MemoryHub) -> None:
        self.process = subprocess.Popen(["sleep", "60"])
        ours, theirs = socket.socketpair()
        self._theirs = theirs
        self.memories = [RankMemory.zeros(2) for _ in range(2)]
        self.transfers = RankTransfers(
            [memory.described for memory in self.memories],
            unique_name("puppet"),
            [RankProcess(1, self.process.pid, ours)],
            reads=True,
            make_connector=lambda name: MemoryConnector(name, hub),
        )
        self.ended: list[str] = []

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self._theirs)
        started = asyncio.ensure_future(self.transfers.start())
        assert str((await self.asked("open", metadata=b"agent"))["name"]).endswith("-1")
        await started

    async def asked(self, ask: str, metadata: bytes = b"", **answer: object) -> dict[str, object]:
        """Wait for a question; answer it."""
        frame = await receive(self.reader)
        assert frame.head["ask"] == ask
        self.answer(frame.head["number"], metadata, **answer)
        return frame.head

    def answer(self, number: object, metadata: bytes = b"", **answer: object) -> None:
        self.writer.write(Frame({"number": number, **answer}, metadata).encode())

    async def peer(self, prefill: Ranks) -> RankPeer:
        adding = asyncio.ensure_future(peer_of(prefill, self.transfers))
        await self.asked("add", name="p1")
        return await adding

    def read(self, peer: RankPeer, timeout_s: float = TIME_LIMIT_S) -> "asyncio.Task[object]":
        self.plan = self.transfers.plan(peer, SRC, DST, (SRC, DST))
        return asyncio.ensure_future(
            self.transfers.read(
                self.plan,
                deadline=time.monotonic() + timeout_s,
                on_terminal=lambda: self.ended.append("terminal"),
            )
        )

    async def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.writer.close()
        await self.transfers.close(0.1)


@pytest.fixture
async def puppet(hub: MemoryHub) -> AsyncIterator[Puppet]:
    puppet = Puppet(hub)
    await puppet.open()
    yield puppet
    await puppet.close()


async def test_the_words_wait_for_the_slowest_rank(puppet: Puppet, hub: MemoryHub) -> None:
    """F5."""
    prefill = await Ranks.start(hub, 2, reads=False)
    prefill.fill(content(1), WORDS)
    task = puppet.read(await puppet.peer(prefill))
    frame = await receive(puppet.reader)
    await until(lambda: bool(puppet.memories[0].kv[DST[-1]].any()))
    assert puppet.transfers.words(puppet.plan) == [0] * len(DST)
    for memory in prefill.memories:
        memory.words[SRC[0]] = 5
    result = {"ok": True, "num_bytes": 10, "num_descriptors": 1, "seconds": 0.1, "error": ""}
    puppet.answer(frame.head["number"], result=result)
    await task
    assert puppet.transfers.words(puppet.plan) == [5, *WORDS[SRC[1:]].tolist()]
    assert puppet.ended == ["terminal"]
    await prefill.close()


@pytest.mark.parametrize("channel_first", [False, True])
async def test_what_a_rank_reads_is_over_when_its_process_is(
    puppet: Puppet, hub: MemoryHub, channel_first: bool
) -> None:
    """Neither time nor a closed channel ends a read: its bytes may land as long as it lives."""
    prefill = await Ranks.start(hub, 2, reads=False)
    task = puppet.read(await puppet.peer(prefill), timeout_s=60 if channel_first else 0.05)
    await receive(puppet.reader)
    if channel_first:
        puppet.writer.close()
        assert "channel" in await fault(puppet.transfers)
        assert not task.done()
        task.cancel()
    with pytest.raises((TransferFailed, asyncio.CancelledError)):
        await task
    assert puppet.ended == []
    puppet.process.kill()
    await until(lambda: puppet.ended == ["terminal"])
    assert "rank 1" in await fault(puppet.transfers)
    await prefill.close()


async def test_a_dead_rank_fails_reads_at_once(puppet: Puppet, hub: MemoryHub) -> None:
    prefill = await Ranks.start(hub, 2, reads=False)
    peer = await puppet.peer(prefill)
    task = puppet.read(peer)
    await receive(puppet.reader)
    puppet.process.kill()
    with pytest.raises(TransferFailed, match="rank 1 has ended"):
        await task
    await until(lambda: puppet.ended == ["terminal"])
    with pytest.raises(TransferFailed, match="ended"):
        await puppet.read(peer)
    await until(lambda: puppet.ended == ["terminal"] * 2)
    await prefill.close()


async def test_a_rank_that_cannot_begin_is_named() -> None:
    ours, theirs = socket.socketpair()
    remote = RemoteTransfers(RankProcess(3, os.getpid(), ours))
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    opening = asyncio.ensure_future(remote.open("name"))
    frame = await receive(reader)
    writer.write(Frame({"number": frame.head["number"], "error": "no device"}).encode())
    with pytest.raises(EngineFailure, match="rank 3 cannot transfer KV: no device"):
        await opening
    writer.close()
    assert await remote.close()


def test_layouts_of_ranks_follow_each_other() -> None:
    memories = [RankMemory.zeros(2).described for _ in range(2)]
    ranks: tuple[RankLayout, ...] = RankTransfers(memories, "n", reads=True).layout.ranks
    assert [(rank.heads, rank.agent, rank.tp_rank) for rank in ranks] == [
        ((0, 1), 0, 0),
        ((2, 3), 1, 1),
    ]
