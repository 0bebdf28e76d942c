"""The transfers of all ranks of one worker: of this process, and of its followers.

A P registers the memory of each rank. A D's ranks each read, from every rank of P, the heads that
they hold. The generation words of all of P's ranks are read by D's rank 0, when the data of all
is there (F5), and are good only if all ranks of P say the same (F7, F9).
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from contracts.errors import TransferFailed
from contracts.memory import KvMemory, RankProcess
from kv_transfer import reading
from kv_transfer.connector import KvConnector, PeerHandle, Read
from kv_transfer.flight import ReadResult
from kv_transfer.layout import KvLayout, MemoryRegion
from kv_transfer.local import local_layout, registered
from kv_transfer.nixl import NixlConnector
from kv_transfer.rank_regions import overlaps, rank_reads, word_reads
from kv_transfer.rank_remote import RemoteTransfers
from kv_transfer.transfer_thread import TransferThread


@dataclass(frozen=True, slots=True)
class RankPeer:
    """All ranks of one P, as the connectors of a D know them."""

    layout: KvLayout
    handles: tuple[PeerHandle, ...]  # by P's rank


@dataclass(frozen=True, slots=True)
class Plan:
    """Reads of some blocks, and of the words of others after them."""

    peer: RankPeer
    lanes: tuple[reading.Lane, ...]
    words: tuple[Read, ...]
    word_slots: Sequence[int]


class RankTransfers:
    """On the event loop only. `layout` and `metadata` (by rank) are what peers are told."""

    def __init__(
        self,
        memories: Sequence[KvMemory],
        name: str,
        followers: Sequence[RankProcess] = (),
        *,
        reads: bool,
        make_connector: Callable[[str], KvConnector] = NixlConnector,
    ) -> None:
        """Nothing is done before `start`.

        Args:
            memories: of all ranks, this process's first.
            name: of rank 0's agent; unique per process start.
            followers: the processes of the others.
            reads: a D: the words that it reads land in a table of its own.
            make_connector: for rank 0; the others make their own.
        """
        self.layout = local_layout(memories)
        self.metadata: tuple[bytes, ...] = ()
        self._name = name
        self._local = TransferThread(lambda: make_connector(name))
        self._followers = tuple(RemoteTransfers(process) for process in followers)
        self._ranks: tuple[TransferThread | RemoteTransfers, ...] = (self._local, *self._followers)
        self._kv, self._words = registered(memories[0])
        num_blocks = self.layout.num_blocks
        # By P's rank and D's block. Heads are not replicated, so a P has no more ranks than heads.
        rows = len(self.layout.groups[0].heads) if reads else 0
        self._landing: npt.NDArray[np.uint64] = np.zeros((rows, num_blocks), dtype=np.uint64)
        if reads:
            self._words = MemoryRegion(self._landing.ctypes.data, self._landing.nbytes)

    async def start(self) -> Self:
        """Make all connectors and register all memory.

        Raises:
            EngineFailure: a follower does not answer.
        """
        try:
            await self._local.start()
            await self._local.register(self._kv, self._words)
            for follower in self._followers:
                await follower.open(f"{self._name}-{follower.rank}")
            own = await self._local.agent_metadata()
        except BaseException:
            await self.close()
            raise
        self.metadata = (own, *(follower.metadata for follower in self._followers))
        return self

    def assert_pulse(self) -> None:
        """Raise EngineFailure if a rank can read nothing more."""
        for rank in self._ranks:
            rank.assert_pulse()

    async def add_peer(self, layout: KvLayout, metadata: Sequence[bytes]) -> RankPeer:
        """Make all ranks of a P readable, for those ranks that read from them.

        Raises:
            TransferFailed: the metadata is no good.
        """
        agents = [rank.agent for rank in layout.ranks]
        if any(agent >= len(metadata) for agent in agents):
            raise TransferFailed("the peer has not told the agents of all its ranks")
        handles = [await self._local.add_peer(metadata[agent]) for agent in agents]
        await asyncio.gather(
            *(
                self._followers[reader - 1].add_peer(metadata[agents[source]])
                for reader, source, _ in overlaps(layout, self.layout)
                if reader
            )
        )
        return RankPeer(layout, tuple(handles))

    async def remove_peer(self, peer: RankPeer) -> None:
        """Forget a P on all ranks; may be repeated.

        Raises:
            TransferFailed: reads from it are pending.
        """
        for reader in self._ranks:
            for handle in peer.handles:
                await reader.remove_peer(handle)

    def plan(
        self,
        peer: RankPeer,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
        fence: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> Plan:
        """What to read to have P's blocks `remote_ids` in `local_ids`.

        `fence`: the same of the blocks whose words to read after that.

        Raises:
            TransferFailed: P has no such block.
            ValueError: this D has not, or one twice.
        """
        sources, readers = peer.layout.ranks, self._ranks
        by_reader: list[list[list[Read]]] = [[] for _ in readers]
        for found in rank_reads(peer.layout, self.layout, remote_ids, local_ids):
            handle, kv = peer.handles[found.src_rank], sources[found.src_rank].kv_region
            reads = [Read(handle, "kv", regions, kv) for regions in found.slices]
            by_reader[found.dst_rank].append(reads)
        lanes = tuple(
            reading.Lane(reader, _in_turns(several))
            for reader, several in zip(readers, by_reader, strict=True)
        )
        if fence is None:
            return Plan(peer, lanes, (), ())
        pieces = word_reads(peer.layout, *fence, num_slots=self.layout.num_blocks)
        words = tuple(
            Read(handle, "words", regions, rank.words_region)
            for handle, rank, regions in zip(peer.handles, sources, pieces, strict=True)
        )
        return Plan(peer, lanes, words, fence[1])

    async def read(
        self,
        plan: Plan,
        *,
        deadline: float,
        lease_deadline: Callable[[], float] | None = None,
        on_terminal: Callable[[], None] | None = None,
    ) -> ReadResult:
        """Carry a plan out; see `reading.read`. `on_terminal`: on all ranks."""
        if plan.words:
            # No generation is 0: an unread word never matches.
            self._landing[: len(plan.words), plan.word_slots] = 0
        return await reading.read(
            plan.lanes,
            fencer=self._local,
            then=plan.words,
            deadline=deadline,
            lease_deadline=lease_deadline,
            on_terminal=on_terminal,
        )

    def words(self, plan: Plan) -> list[int]:
        """The words that were read last, in the plan's order; 0 where P's ranks do not agree."""
        found = self._landing[: len(plan.words), plan.word_slots]
        agreed = (found == found[0]).all(axis=0)
        merged: list[int] = np.where(agreed, found[0], np.uint64(0)).tolist()
        return merged

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Close all connectors; whether nothing lands any more on any rank. Idempotent."""
        ended = await asyncio.gather(
            self._local.close(timeout_s),
            *(follower.close(timeout_s) for follower in self._followers),
        )
        return all(ended)


def _in_turns(several: Sequence[Sequence[Read]]) -> list[Read]:
    """So that all of P's ranks are read from at the same time."""
    turns = itertools.zip_longest(*several)
    return [read for turn in turns for read in turn if read is not None]
