"""What KvConnector promises, of the in-memory and of the NIXL connector alike."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from contracts.errors import TransferFailed
from kv_transfer import reading
from kv_transfer.connector import PeerHandle, Read, ReadState
from kv_transfer.layout import WORD_BYTES, MemoryRegion, Region, coalesce, slices
from kv_transfer.nixl import NixlConnector
from kv_transfer.transfer_thread import TransferThread
from tests.support.connector_rigs import (
    BYTES_PER_BLOCK,
    NUM_BLOCKS,
    TIME_LIMIT_S,
    MemoryWorld,
    NixlWorld,
    Own,
    Remote,
    World,
)


@pytest.fixture(scope="module", params=["memory", "nixl", "nixl-tcp"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "memory":
        return MemoryWorld()
    return NixlWorld("tcp" if request.param == "nixl-tcp" else "")


@pytest.fixture(params=["memory", "nixl-tcp"])
def holding_world(request: pytest.FixtureRequest) -> World:
    """Where reads can be pending for long (over shared memory they are over when posted)."""
    return MemoryWorld() if request.param == "memory" else NixlWorld("tcp")


@pytest.fixture(scope="module")
def remote(world: World) -> Iterator[Remote]:
    remote = world.remote()
    yield remote
    remote.close()


@pytest.fixture
def more_remotes() -> Iterator[Callable[[World], Remote]]:
    """Makes peers to be frozen and killed; none outlives the test, however it ends."""
    made: list[Remote] = []

    def make(world: World) -> Remote:
        made.append(world.remote(seed=9))
        return made[-1]

    yield make
    for remote in made:
        remote.close()


@pytest.fixture
def own(world: World) -> Iterator[Own]:
    own = Own(world.make_connector())
    yield own
    own.connector.close()


def blocks(src_ids: list[int], dst_ids: list[int]) -> list[Region]:
    return coalesce(src_ids, dst_ids, BYTES_PER_BLOCK)


def test_scattered_and_coalesced_blocks_land_where_they_belong(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    src, dst = [7, 8, 9, 3, 60, 61, 20], [10, 11, 12, 40, 0, 63, 5]
    handle = own.connector.post_read(peer, "kv", blocks(src, dst), remote.kv)
    assert (handle.num_bytes, handle.num_descriptors) == (len(src) * BYTES_PER_BLOCK, 5)
    assert own.finish(handle) == [ReadState.DONE]
    expected = np.zeros_like(own.kv).reshape(NUM_BLOCKS, BYTES_PER_BLOCK)
    expected[dst] = remote.kv_bytes.reshape(NUM_BLOCKS, BYTES_PER_BLOCK)[src]
    np.testing.assert_array_equal(own.kv.reshape(NUM_BLOCKS, -1), expected)
    own.connector.release(handle)
    own.connector.release(handle)  # a second time is nothing


def test_words_land_in_the_slots_of_the_own_blocks(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    src, dst = [0, 1, 33, 63], [4, 5, 6, 0]
    regions = coalesce(src, dst, WORD_BYTES)
    handle = own.connector.post_read(peer, "words", regions, remote.words)
    assert own.finish(handle) == [ReadState.DONE]
    expected = np.zeros_like(own.words)
    expected[dst] = remote.word_values[src]
    np.testing.assert_array_equal(own.words, expected)
    assert not own.kv.any()


def test_many_reads_are_in_flight_at_once(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    order = np.random.default_rng(5).permutation(NUM_BLOCKS).tolist()
    handles = [
        own.connector.post_read(peer, "kv", blocks([src], [dst]), remote.kv)
        for dst, src in enumerate(order)
    ]
    assert set(own.finish(*handles)) == {ReadState.DONE}
    expected = remote.kv_bytes.reshape(NUM_BLOCKS, BYTES_PER_BLOCK)[order]
    np.testing.assert_array_equal(own.kv.reshape(NUM_BLOCKS, -1), expected)


def test_a_pending_read_is_neither_released_nor_orphaned(
    holding_world: World, more_remotes: Callable[[World], Remote]
) -> None:
    """Q1: its bytes still land, so its end must stay visible; a peer's death ends it."""
    own, remote = Own(holding_world.make_connector()), more_remotes(holding_world)
    peer = own.connector.add_peer(remote.metadata)
    assert own.finish(own.connector.post_read(peer, "kv", blocks([1], [1]), remote.kv)) == [
        ReadState.DONE
    ]
    remote.hold()
    handle = own.connector.post_read(peer, "kv", blocks([2], [2]), remote.kv)
    assert own.connector.poll(handle) is ReadState.PENDING
    with pytest.raises(RuntimeError, match="Q1"):
        own.connector.release(handle)
    with pytest.raises(TransferFailed, match="1 reads"):
        own.connector.remove_peer(peer)
    assert own.connector.add_peer(remote.metadata) == peer  # a second Hello does not disturb it
    assert own.connector.poll(handle) is ReadState.PENDING
    remote.resume()
    assert own.finish(handle) == [ReadState.DONE]
    expected = remote.kv_bytes[2 * BYTES_PER_BLOCK : 3 * BYTES_PER_BLOCK]
    np.testing.assert_array_equal(own.block(2), expected)
    own.connector.release(handle)
    remote.hold()
    handles = [
        own.connector.post_read(peer, "kv", blocks([i], [i]), remote.kv) for i in range(4, 8)
    ]
    assert own.connector.poll(handles[0]) is ReadState.PENDING
    remote.kill()
    assert own.finish(*handles) == [ReadState.FAILED] * 4
    assert not any(own.block(i).any() for i in range(4, 8))
    own.connector.remove_peer(peer)
    own.connector.close()


def test_after_close_nothing_lands_any_more(
    holding_world: World, more_remotes: Callable[[World], Remote]
) -> None:
    """Q2: the last resort."""
    own, remote = Own(holding_world.make_connector()), more_remotes(holding_world)
    peer = own.connector.add_peer(remote.metadata)
    own.finish(own.connector.post_read(peer, "kv", blocks([1], [1]), remote.kv))
    remote.hold()
    handle = own.connector.post_read(peer, "kv", blocks([2], [2]), remote.kv)
    assert own.connector.poll(handle) is ReadState.PENDING
    own.connector.close()
    assert own.connector.poll(handle) is ReadState.FAILED
    remote.resume()
    remote.close()  # has ended, so it has sent all it ever will
    assert not own.block(2).any()
    own.connector.release(handle)
    own.connector.close()  # a second time is nothing


def test_reads_from_a_dead_peer_fail_and_another_peer_is_not_harmed(
    own: Own, remote: Remote, world: World, more_remotes: Callable[[World], Remote]
) -> None:
    doomed = more_remotes(world)
    good, bad = (own.connector.add_peer(r.metadata) for r in (remote, doomed))
    assert own.finish(own.connector.post_read(bad, "kv", blocks([0], [0]), doomed.kv)) == [
        ReadState.DONE
    ]
    doomed.kill()
    for _ in range(2):  # also the one that finds the connection already lost
        handle = own.connector.post_read(bad, "kv", blocks([1], [1]), doomed.kv)
        assert own.finish(handle) == [ReadState.FAILED]
        own.connector.release(handle)
    assert not own.block(1).any()
    own.connector.remove_peer(bad)
    handle = own.connector.post_read(good, "kv", blocks([1], [1]), remote.kv)
    assert own.finish(handle) == [ReadState.DONE]


def test_a_peer_can_be_removed_and_added_again(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    for _ in range(2):
        own.connector.remove_peer(peer)
        own.connector.remove_peer(peer)  # a second time is nothing
        handle = own.connector.post_read(peer, "kv", blocks([5], [5]), remote.kv)
        assert own.finish(handle) == [ReadState.FAILED]
        assert not own.block(5).any()
        assert own.connector.add_peer(remote.metadata) == peer
        handle = own.connector.post_read(peer, "kv", blocks([5], [6]), remote.kv)
        assert own.finish(handle) == [ReadState.DONE]
        assert own.block(6).any()
        own.block(6)[:] = 0


def test_a_failed_peer_works_again_once_it_is_added_again(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    nowhere = MemoryRegion(remote.kv.address + (1 << 40), remote.kv.num_bytes)
    handle = own.connector.post_read(peer, "kv", blocks([1], [1]), nowhere)
    assert own.finish(handle) == [ReadState.FAILED]
    assert own.connector.add_peer(remote.metadata) == peer
    handle = own.connector.post_read(peer, "kv", blocks([1], [1]), remote.kv)
    assert own.finish(handle) == [ReadState.DONE]


@pytest.mark.parametrize(
    "region",
    [
        pytest.param(Region(0, 0, 0), id="empty"),
        pytest.param(Region(-1, 0, 8), id="before-remote"),
        pytest.param(Region(0, -8, 8), id="before-own"),
        pytest.param(Region(NUM_BLOCKS * BYTES_PER_BLOCK - 4, 0, 8), id="past-remote"),
        pytest.param(Region(0, NUM_BLOCKS * BYTES_PER_BLOCK - 4, 8), id="past-own"),
    ],
)
def test_what_lies_outside_is_not_posted(own: Own, remote: Remote, region: Region) -> None:
    peer = own.connector.add_peer(remote.metadata)
    with pytest.raises(ValueError, match="Region"):
        own.connector.post_read(peer, "kv", [Region(0, 0, 8), region], remote.kv)
    assert not own.kv.any()
    own.connector.remove_peer(peer)  # so nothing is pending


def test_no_regions_and_unknown_peers_and_bad_metadata(own: Own, remote: Remote) -> None:
    peer = own.connector.add_peer(remote.metadata)
    with pytest.raises(ValueError, match="at least one"):
        own.connector.post_read(peer, "kv", [], remote.kv)
    stranger = PeerHandle("nobody")
    handle = own.connector.post_read(stranger, "kv", blocks([0], [0]), remote.kv)
    assert own.finish(handle) == [ReadState.FAILED]
    with pytest.raises(TransferFailed, match="not readable"):
        own.connector.add_peer(b"\x00garbage")


async def test_the_transfer_thread_reads_slices(world: World, remote: Remote) -> None:
    thread = TransferThread(world.make_connector)
    await thread.start()
    own_kv = np.zeros(NUM_BLOCKS * BYTES_PER_BLOCK, dtype=np.uint8)
    own_words = np.zeros(NUM_BLOCKS, dtype=np.uint64)
    await thread.register(
        MemoryRegion(own_kv.ctypes.data, own_kv.nbytes),
        MemoryRegion(own_words.ctypes.data, own_words.nbytes),
    )
    peer = await thread.add_peer(remote.metadata)
    ids = list(range(NUM_BLOCKS))
    ended: list[str] = []
    pieces = slices(blocks(ids, ids), BYTES_PER_BLOCK, max_bytes=5 * BYTES_PER_BLOCK)
    result = await reading.read(
        [reading.Lane(thread, [Read(peer, "kv", regions, remote.kv) for regions in pieces])],
        deadline=time.monotonic() + TIME_LIMIT_S,
        on_terminal=lambda: ended.append("terminal"),
    )
    assert ended == ["terminal"]
    assert (result.num_bytes, result.num_descriptors) == (own_kv.nbytes, 13)
    np.testing.assert_array_equal(own_kv, remote.kv_bytes)
    assert await thread.close(TIME_LIMIT_S)


def test_nixl_writes_to_no_stream(capfd: pytest.CaptureFixture[str]) -> None:
    connector = NixlConnector("quiet")
    Own(connector).connector.close()
    assert capfd.readouterr() == ("", "")
