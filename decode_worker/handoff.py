"""One handoff on D's side: claim, reserve, read as P computes, verify, join.

    WAIT ──granted, reserved──> RESERVED ──a read is posted──> READ ──verified──> RUN
      └──────────── revoked, refused, lost, late: HandoffError, D recomputes ───────┘

WAIT holds nothing (M2). Whatever ends it, blocks that a posted read may still write go into
quarantine until that read is terminal (Q1), and P is told to release.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from contracts.errors import (
    ClaimRefused,
    FenceBroken,
    OutOfBlocks,
    TransferFailed,
    TransferGone,
)
from contracts.events import TokensOut
from contracts.handoff import (
    ChunkReady,
    Claim,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    Release,
    Revoked,
)
from contracts.request import GenerationRequest
from decode_worker.peers import Peer, PeerTable, TransferMessage
from decode_worker.turns import Line
from engine.guide import Guide
from engine.host import EngineHost, needs_guide
from engine.sequence import Reservation, blocks_for
from kv_transfer.layout import WORD_BYTES, Region, coalesce, slices
from kv_transfer.params import KvTransferParams, decode_incarnation
from kv_transfer.transfer_thread import TransferThread

log = logging.getLogger(__name__)
_RESERVE_RETRY_S = 0.005
_READ_BYTES = 256 << 20  # of one `read` call: its time limit is for that much
_REPEATS_BEATS = 4  # a lease is this many beats: own deadline = last acknowledged + lease - margin


class HandoffState(StrEnum):
    """How far a handoff is; also the words of metrics and logs."""

    WAIT = "wait"
    RESERVED = "reserved"
    READ = "read"
    RUN = "run"
    OVER = "over"


class HandoffEnded(Exception):
    """P says that there is nothing to decode."""


class NotPrepared(Exception):
    """The request cannot run here, whatever its prompt's KV: `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """What a handoff moved."""

    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    hit_blocks: int = 0


@dataclass(slots=True, eq=False)
class _Posting:
    """Local blocks that one `read` call may write, until it is terminal."""

    blocks: tuple[int, ...]
    terminal: bool = False
    quarantined: bool = False


@dataclass(slots=True, eq=False)
class Handoff:
    """Drives one transfer; `run` ends in a joined sequence or in a HandoffError.

    `landing` is this worker's table of words read from peers, slot = local block id. `line` is
    one for all handoffs of this worker: they reserve in order of priority, then arrival. The
    request's grammar and processors are prepared meanwhile.
    """

    request: GenerationRequest
    params: KvTransferParams
    digest: str
    host: EngineHost
    peers: PeerTable
    transfers: TransferThread
    landing: npt.NDArray[np.uint64]
    line: Line
    block_size: int
    read_timeout_s: float
    state: HandoffState = HandoffState.WAIT
    first_tokens: tuple[TokensOut, ...] = ()
    guide: Guide | None = None
    stats: HandoffStats = field(default_factory=HandoffStats)
    _preparing: "asyncio.Task[None] | None" = None
    _peer: Peer | None = None
    _grant: ClaimGranted | None = None
    _ready_tokens: int = 0
    _failure: Exception | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _reservation: Reservation | None = None
    _postings: list[_Posting] = field(default_factory=list[_Posting])
    _reading: asyncio.Timeout | None = None

    async def run(self, joined: Callable[["Handoff"], None]) -> None:
        """Do all of it; `joined` is called just before the sequence enters the engine.

        Raises:
            HandoffError: nothing was adopted; recompute (with `first_tokens` if known).
            HandoffEnded: token 1 ended every choice.
            NotPrepared: the request fails.
        """
        try:
            if needs_guide(self.request.params):
                self._preparing = asyncio.create_task(self._prepare(), name="baton-prepare")
            await self._claim()
            await self._reserve()
            await self._read_all()
            await self._until(lambda: bool(self.first_tokens), "token 1 did not come in time")
            await self._verify()
            self._release_peer()
            await self.prepared()
            joined(self)
            await self._join()
        finally:
            self._give_back()

    async def prepared(self) -> None:
        """Wait until `guide` is what the request needs. Raises NotPrepared."""
        if self._preparing is not None:
            await self._preparing

    async def close(self) -> None:
        """End the preparation if it still runs; after `run`."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)

    # -- the steps --------------------------------------------------------------------------

    async def _prepare(self) -> None:
        try:
            self.guide = await self.host.prepare(self.request)
        except Exception as error:
            failure = NotPrepared(error)
            self._fail(failure)
            self._changed.set()
            raise failure from error

    async def _claim(self) -> None:
        self._peer = await self.peers.peer(self.params.peer_address)
        if self._peer.link.remote.incarnation != decode_incarnation(self.params.incarnation):
            raise TransferGone("P has restarted since it gave the params")
        transfer_id = self.params.transfer_id
        self.peers.listen(self._peer, transfer_id, self._on_message)
        self._peer.link.send(Claim(transfer_id, secrets.token_hex(16), self.digest))
        await self._until(lambda: self._grant is not None, "P did not answer the claim in time")
        grant = self._granted()
        if grant.num_tokens != len(self.request.prompt_ids):
            raise ClaimRefused("the transfer's prompt is of another length")
        need = blocks_for(grant.num_tokens, self.block_size)
        if len(grant.block_ids) != need or len(grant.generations) != need:
            raise ClaimRefused(f"{need} blocks expected, {len(grant.block_ids)} granted")

    async def _reserve(self) -> None:
        deadline = time.monotonic() + self.read_timeout_s
        keys: list[bytes] = []
        with self.line.turn(self.request.priority) as turn:
            while self._reservation is None:  # a big prompt does not starve behind small ones (M7)
                await turn.come()
                self._raise_failure()
                asked = self.host.call(lambda scheduler: scheduler.reserve(self.request, keys))
                try:
                    self._reservation = await asyncio.shield(asyncio.wrap_future(asked))
                except OutOfBlocks:
                    if time.monotonic() > deadline:
                        raise TransferFailed("no KV blocks became free in time") from None
                    await asyncio.sleep(_RESERVE_RETRY_S)
                except asyncio.CancelledError:
                    asked.add_done_callback(self._undo_reserve)
                    raise
        self.state = HandoffState.RESERVED

    def _undo_reserve(self, done: "Future[Reservation]") -> None:
        if not done.cancelled() and done.exception() is None:
            reservation = done.result()
            self.host.call(lambda scheduler: scheduler.unreserve(reservation))

    async def _read_all(self) -> None:
        """Read what this worker's own cache lacks, block by block as P announces it (F2)."""
        grant, reservation, peer = self._granted(), self._reserved(), self._linked()
        rank = peer.layout.rank
        total = len(grant.block_ids)
        most = max(1, _READ_BYTES // rank.bytes_per_block)
        done = reservation.num_hits
        self.stats = HandoffStats(hit_blocks=done)
        self._ready_tokens = max(self._ready_tokens, grant.ready_tokens)
        while done < total:
            await self._until(self._more_than(done), "P computed nothing in time")
            ready = min(self._ready_blocks(), done + most)
            local = reservation.blocks[done:ready]
            regions = coalesce(grant.block_ids[done:ready], local, rank.bytes_per_block)
            await self._read(
                peer,
                local,
                list(slices(regions, rank.bytes_per_block)),
                words=False,
            )
            done = ready

    def _more_than(self, done: int) -> Callable[[], bool]:
        return lambda: self._ready_blocks() > done

    def _ready_blocks(self) -> int:
        total = len(self.request.prompt_ids)
        if self._ready_tokens >= total:
            return blocks_for(total, self.block_size)
        return self._ready_tokens // self.block_size

    async def _verify(self) -> None:
        """Compare the generations now with the claim's, after all data (F5, F7)."""
        grant, reservation, peer = self._granted(), self._reserved(), self._linked()
        first, end = reservation.num_hits, len(grant.block_ids)
        if first == end:
            return  # nothing was read
        local = reservation.blocks[first:end]
        self.landing[local] = 0  # no generation is 0: an unread word never matches
        regions = coalesce(grant.block_ids[first:end], local, WORD_BYTES)
        await self._read(peer, local, [regions], words=True)
        self._raise_failure()
        found = self.landing[local].tolist()
        if found != list(grant.generations[first:end]):
            changed = sum(a != b for a, b in zip(found, grant.generations[first:], strict=True))
            raise FenceBroken(f"{changed} of {end - first} blocks changed hands while being read")

    async def _read(
        self, peer: Peer, local: list[int], pieces: Sequence[Sequence[Region]], *, words: bool
    ) -> None:
        posting = _Posting(tuple(local))
        self._postings.append(posting)
        self.state = HandoffState.READ
        rank = peer.layout.rank
        lease_s = self._granted().lease_ms / 1000
        margin_s = lease_s / _REPEATS_BEATS
        try:
            async with asyncio.timeout(None) as self._reading:  # until `_fail`, if that comes first
                result = await self.transfers.read(
                    peer.handle,
                    "words" if words else "kv",
                    pieces,
                    rank.words_region if words else rank.kv_region,
                    deadline=time.monotonic() + self.read_timeout_s,
                    lease_deadline=lambda: peer.link.acknowledged_at + lease_s - margin_s,
                    on_terminal=lambda: self._terminal(posting),
                )
        except TimeoutError:
            self._raise_failure()
            raise
        finally:
            self._reading = None
        if not words:
            self.stats = HandoffStats(
                self.stats.num_bytes + result.num_bytes,
                self.stats.num_descriptors + result.num_descriptors,
                self.stats.read_s + result.seconds,
                self.stats.hit_blocks,
            )

    async def _join(self) -> None:
        reservation, first, guide = self._reserved(), self.first_tokens, self.guide
        self._reservation = None  # the engine's from here on
        self.state = HandoffState.RUN
        adopted = self.host.call(lambda scheduler: scheduler.adopt(reservation, first, guide))
        await asyncio.shield(asyncio.wrap_future(adopted))

    # -- ends -------------------------------------------------------------------------------

    def _release_peer(self) -> None:
        if self._peer is not None:
            self.peers.forget(self._peer, self.params.transfer_id)
            self._peer.link.send(Release(self.params.transfer_id))
            self._peer = None

    def _give_back(self) -> None:
        """Release on both sides; what may still be written is quarantined. Idempotent."""
        self._release_peer()
        if self.state is not HandoffState.RUN:
            self.state = HandoffState.OVER
        reservation, self._reservation = self._reservation, None
        if reservation is None:
            return
        in_flight: set[int] = set()
        for posting in self._postings:
            if not posting.terminal:
                posting.quarantined = True
                in_flight |= set(posting.blocks)
        self.host.call(lambda scheduler: scheduler.unreserve(reservation, in_flight))

    def _terminal(self, posting: _Posting) -> None:
        posting.terminal = True
        if posting.quarantined:
            self.host.call(lambda scheduler: scheduler.pool.unquarantine(posting.blocks))

    # -- what P says ------------------------------------------------------------------------

    def _on_message(self, message: TransferMessage | None) -> None:
        match message:
            case None:
                self._fail(TransferFailed("the peer link is lost"))
            case ClaimGranted():
                self._grant = message
                self._ready_tokens = max(self._ready_tokens, message.ready_tokens)
                self.first_tokens = self.first_tokens or message.first_tokens
            case ClaimDenied():
                kind = ClaimRefused if message.kind == "ClaimRefused" else TransferGone
                self._fail(kind(message.message))
            case ChunkReady():
                self._ready_tokens = max(self._ready_tokens, message.ready_tokens)
            case FirstTokens():
                self.first_tokens = message.tokens
            case Revoked(reason="ended"):
                self._fail(HandoffEnded())
            case Revoked():
                self._fail(TransferGone(f"P took the transfer back: {message.reason}"))
        self._changed.set()

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            if self._reading is not None:  # nobody waits for bytes that are worth nothing
                self._reading.reschedule(0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _until(self, condition: Callable[[], bool], late: str) -> None:
        """Wait for a message that makes `condition` true; P shows life by beats meanwhile."""
        silent_since = time.monotonic()
        seen = self._ready_tokens
        while True:
            self._raise_failure()
            if condition():
                return
            self._changed.clear()
            link = self._linked().link
            alive_at = max(silent_since, link.acknowledged_at)
            limit_s = alive_at + self.read_timeout_s - time.monotonic()
            if limit_s <= 0:
                raise TransferFailed(late)
            try:
                async with asyncio.timeout(limit_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
            if self._ready_tokens != seen:
                seen, silent_since = self._ready_tokens, time.monotonic()

    def _granted(self) -> ClaimGranted:
        assert self._grant is not None
        return self._grant

    def _reserved(self) -> Reservation:
        assert self._reservation is not None
        return self._reservation

    def _linked(self) -> Peer:
        assert self._peer is not None
        return self._peer
