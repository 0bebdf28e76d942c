"""Workers of several ranks, of hand-made memory: what their engines would be to RankTransfers."""

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from contracts.memory import KvMemory, RankProcess
from kv_transfer.memory import MemoryConnector, MemoryHub
from kv_transfer.rank_server import serve
from kv_transfer.rank_transfers import RankTransfers
from tests.support.connector_rigs import unique_name

NUM_HEADS, NUM_BLOCKS, BYTES_PER_HEAD = 4, 24, 512


def content(seed: int) -> NDArray[np.uint8]:
    """Of all blocks, by block, head, byte; no byte is 0."""
    shape = (NUM_BLOCKS, NUM_HEADS, BYTES_PER_HEAD)
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def heads_of(rank: int, num_ranks: int) -> slice:
    each = NUM_HEADS // num_ranks
    return slice(rank * each, (rank + 1) * each)


@dataclass(eq=False)
class RankMemory:
    """One rank's blocks and words, wherever they are."""

    kv: NDArray[np.uint8]
    words: NDArray[np.uint64]
    addresses: tuple[int, int] | None = None  # in another process

    @property
    def described(self) -> KvMemory:
        addresses = self.addresses or (self.kv.ctypes.data, self.words.ctypes.data)
        return memory_of(*addresses, self.kv.nbytes)

    @classmethod
    def zeros(cls, num_ranks: int) -> "RankMemory":
        kv = np.zeros((NUM_BLOCKS, NUM_HEADS // num_ranks, BYTES_PER_HEAD), dtype=np.uint8)
        return cls(kv, np.zeros(NUM_BLOCKS, dtype=np.uint64))


def memory_of(kv_address: int, words_address: int, num_bytes: int) -> KvMemory:
    return KvMemory(
        dtype="uint8",
        block_size=4,
        base_address=kv_address,
        bytes_per_block=num_bytes // NUM_BLOCKS,
        num_blocks=NUM_BLOCKS,
        words_address=words_address,
        num_layers=2,
        num_kv_heads=num_bytes // NUM_BLOCKS // BYTES_PER_HEAD,
        head_dim=8,
        device_index=None,
    )


@dataclass(eq=False)
class Ranks:
    """One worker's ranks, all in this process; the followers are reached over channels."""

    hub: MemoryHub
    memories: list[RankMemory]
    transfers: RankTransfers
    serving: list["asyncio.Task[None]"] = field(default_factory=list["asyncio.Task[None]"])

    @classmethod
    async def start(cls, hub: MemoryHub, num_ranks: int, *, reads: bool) -> "Ranks":
        memories = [RankMemory.zeros(num_ranks) for _ in range(num_ranks)]

        def make(name: str) -> MemoryConnector:
            return MemoryConnector(name, hub)

        serving, followers = [], []
        for rank, memory in enumerate(memories[1:], 1):
            ours, theirs = socket.socketpair()
            serving.append(asyncio.ensure_future(serve(theirs, memory.described, make)))
            followers.append(RankProcess(rank, os.getpid(), ours))
        transfers = RankTransfers(
            [memory.described for memory in memories],
            unique_name("ranks"),
            followers,
            reads=reads,
            make_connector=make,
        )
        await transfers.start()
        return cls(hub, memories, transfers, serving)

    def fill(self, data: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        fill(self.memories, data, words)

    async def close(self) -> None:
        assert await self.transfers.close()
        await asyncio.gather(*self.serving)


def fill(
    memories: Sequence[RankMemory], data: NDArray[np.uint8], words: NDArray[np.uint64]
) -> None:
    """Give each rank the heads that it holds, and the words, which are the same on all."""
    for rank, memory in enumerate(memories):
        memory.kv[:] = data[:, heads_of(rank, len(memories))]
        memory.words[:] = words


def gathered(memories: Sequence[RankMemory]) -> NDArray[np.uint8]:
    """All heads of all blocks, from the ranks that hold them."""
    return np.concatenate([memory.kv for memory in memories], axis=1)
