"""One handoff on D's side: claim, reserve, read as P computes, verify, join.

What happens when is `decode_worker.machine`'s; this file carries its actions out, on the event
loop, and tells it the facts. Whatever ends a handoff, blocks that a posted read may still write
go into quarantine until that read is terminal (Q1), and P is told to release.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contracts.errors import (
    ClaimRefused,
    HandoffError,
    ServingError,
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
    Reading,
    Release,
    Revoked,
)
from contracts.request import GenerationRequest
from decode_worker.machine import (
    Action,
    Actions,
    Connect,
    EndQuarantine,
    Finish,
    GiveBack,
    HandoffMachine,
    HandoffSpec,
    Join,
    PostRead,
    Reserve,
    SendClaim,
    SendReading,
    SendRelease,
)
from decode_worker.peers import Peer, PeerTable, TransferMessage
from decode_worker.quarantine import Quarantine
from decode_worker.reserving import reserve
from decode_worker.totals import HandoffStats
from decode_worker.turns import Line
from engine.guide import Guide
from engine.host import EngineHost, needs_guide
from engine.sequence import Reservation, blocks_for
from kv_transfer.params import KvTransferParams, decode_incarnation
from kv_transfer.rank_transfers import RankTransfers

_READ_BYTES = 256 << 20  # of one `read` call: its time limit is for that much
_REPEATS_BEATS = 4  # a lease is this many beats: own deadline = last acknowledged + lease - margin
_CONNECT_S = 5.0
_STUCK_S = 60.0  # P lives and gets no further: as long as its engine may stand still


class NotPrepared(Exception):
    """The request cannot run here, whatever its prompt's KV: `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class ClaimDeniedByP(HandoffError):
    """P's own word on the params: used, expired, or not its own. `cause` is the error it named."""

    def __init__(self, cause: HandoffError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, slots=True)
class HandoffTools:
    """What all handoffs of a worker share.

    They reserve in the order of `line`: priority, then arrival.
    """

    host: EngineHost
    peers: PeerTable
    transfers: RankTransfers
    quarantine: Quarantine
    line: Line
    block_size: int
    read_timeout_s: float


@dataclass(slots=True, eq=False)
class Handoff:
    """Drives one transfer; `run` ends in a joined sequence or in an error.

    The request's grammar and processors are prepared meanwhile.
    """

    request: GenerationRequest
    params: KvTransferParams
    digest: str
    tools: HandoffTools
    guide: Guide | None = None
    stats: HandoffStats = field(default_factory=HandoffStats)
    machine: HandoffMachine = field(init=False)
    _nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    _joined: Callable[["Handoff"], None] | None = None
    _peer: Peer | None = None
    _alive_at: float = 0.0
    _reservation: Reservation | None = None
    _reserved: int = 0  # its number
    _handed_over: set[int] = field(default_factory=set[int])  # reads given to the connector
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _error: Exception | None = None
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])
    _preparing: "asyncio.Task[None] | None" = None
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        tools, num_tokens = self.tools, len(self.request.prompt_ids)
        self.machine = HandoffMachine(
            HandoffSpec(
                transfer_id=self.params.transfer_id,
                incarnation=decode_incarnation(self.params.incarnation),
                num_tokens=num_tokens,
                num_blocks=blocks_for(num_tokens, tools.block_size),
                block_size=tools.block_size,
                max_read_blocks=max(1, _READ_BYTES // tools.transfers.layout.bytes_per_block),
                connect_s=_CONNECT_S,
                silence_s=tools.read_timeout_s,
                stuck_s=max(_STUCK_S, tools.read_timeout_s),
            )
        )

    @property
    def first_tokens(self) -> tuple[TokensOut, ...]:
        """P's, as far as they are known."""
        return self.machine.first_tokens

    @property
    def reservation(self) -> Reservation | None:
        """What it holds, if that is its own to give back."""
        return self._reservation

    async def run(self, joined: Callable[["Handoff"], None]) -> None:
        """Do all of it; `joined` is called just before the sequence enters the engine.

        Raises:
            HandoffError: nothing was adopted; recompute (with `first_tokens` if known).
            HandoffEnded: token 1 ended every choice.
            NotPrepared: the request fails.
        """
        self._joined = joined
        self._alive_at = time.monotonic()
        try:
            if needs_guide(self.request.params):
                self._preparing = asyncio.create_task(self._prepare(), name="baton-prepare")
            self._do(self.machine.start(self._alive_at))
            await self._over.wait()
            if self._error is not None:
                raise self._error
        finally:
            self._do(self.machine.abort())
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            self._forget()

    async def prepared(self) -> None:
        """Wait until `guide` is what the request needs. Raises NotPrepared."""
        if self._preparing is not None:
            await asyncio.shield(self._preparing)  # whoever is cancelled here is not alone

    async def close(self) -> None:
        """End what still runs; after `run`."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- actions ----------------------------------------------------------------------------

    def _do(self, actions: Actions) -> None:
        for action in actions:
            self._carry_out(action)
        self._set_timer()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Connect():
                self._begin(lambda: self._connect(action.timeout_s))
            case SendClaim():
                self._send(Claim(self.params.transfer_id, self._nonce, self.digest))
            case SendReading():
                self._send(Reading(self.params.transfer_id))
            case SendRelease():
                self._release()
            case Reserve():
                self._begin(lambda: self._reserve(action.number))
            case PostRead():
                self._post(action)
            case GiveBack():
                self._give_back(action)
            case EndQuarantine():
                self.tools.quarantine.end((self, action.number))
            case Join():
                self._begin(self._join)
            case Finish():
                self._error = action.error
                self._over.set()

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._guarded(work), name="baton-handoff-step")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:
            self._do(self.machine.fail(error))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.machine.deadline(self._heard_at)
        if due is not None:
            wait_s = max(0.0, due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._do(self.machine.tick(time.monotonic(), self._heard_at))

    # -- the link ---------------------------------------------------------------------------

    @property
    def _heard_at(self) -> float:
        """When P last showed life: its links' last acknowledged beat (L1)."""
        if self._peer is not None:
            self._alive_at = max(self._alive_at, self._peer.link.acknowledged_at)
        return self._alive_at

    @property
    def _lease_until(self) -> float:
        """No read is posted after this; until then P may still have the claim (L1)."""
        grant = self.machine.grant
        lease_s = (self.params.lease_ms if grant is None else grant.lease_ms) / 1000
        return self._heard_at + lease_s - lease_s / _REPEATS_BEATS

    async def _connect(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                peer = await self.tools.peers.peer(self.params.peer_address)
            self.tools.peers.listen(peer, self.params.transfer_id, self._on_message)
        except TimeoutError:
            error = TransferFailed("the prefill worker does not answer in time")
            self._do(self.machine.unreachable(error))
        except ServingError as error:
            self._do(self.machine.unreachable(error))
        else:
            self._peer = peer
            self._do(self.machine.linked(peer.link.remote.incarnation, time.monotonic()))

    def _send(self, message: Claim | Reading) -> None:
        if self._peer is not None:
            self._peer.link.send(message)

    def _release(self) -> None:
        grant = self.machine.grant
        lease_ms = self.params.lease_ms if grant is None else grant.lease_ms
        self._forget()
        release = Release(self.params.transfer_id, self._nonce)
        self.tools.peers.release(self.params.peer_address, release, lease_ms / 1000)

    def _forget(self) -> None:
        if self._peer is not None:
            self.tools.peers.forget(self._peer, self.params.transfer_id)

    def _on_message(self, message: TransferMessage | None) -> None:
        machine, now = self.machine, time.monotonic()
        match message:
            case None:
                self._do(machine.link_lost(self._lease_until - now))
            case ClaimGranted():
                self._do(machine.granted(message, now))
            case ClaimDenied():
                self._do(machine.denied(_denial(message)))
            case ChunkReady():
                self._do(machine.chunk_ready(message.ready_tokens, now))
            case FirstTokens():
                self._do(machine.first_tokens_came(message.tokens, now))
            case Revoked():
                self._do(machine.revoked(message.reason))

    # -- memory -----------------------------------------------------------------------------

    async def _reserve(self, number: int) -> None:
        tools, loop = self.tools, asyncio.get_running_loop()

        def reclaimed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: self._do(self.machine.reclaimed(number)))

        try:
            reservation = await reserve(
                tools.host,
                tools.line,
                self.request,
                timeout_s=tools.read_timeout_s,
                on_reclaimed=reclaimed,
            )
        except TransferFailed as error:
            self._do(self.machine.no_memory(number, error))
            return
        self._reservation, self._reserved = reservation, number
        self._do(self.machine.reserved(number, reservation.num_hits))

    def _give_back(self, action: GiveBack) -> None:
        reservation, self._reservation = self._reservation, None
        assert reservation is not None
        posted = self.tools.quarantine.begin([(self, number) for number in action.posted])
        self.tools.host.call(lambda scheduler: scheduler.unreserve(reservation, posted))

    # -- reads ------------------------------------------------------------------------------

    def _post(self, action: PostRead) -> None:
        reservation = self._reservation
        assert reservation is not None
        if not reservation.pin():  # taken back meanwhile (M3)
            self._do(self.machine.reclaimed(self._reserved))
            return
        first = action.first if action.fence is None else action.fence
        self.tools.quarantine.posted((self, action.number), reservation.blocks[first : action.end])
        task = self._begin(lambda: self._read(action, reservation.blocks))
        task.add_done_callback(lambda _: self._never_posted(action.number))

    def _never_posted(self, number: int) -> None:
        """The connector, once it was given the read, says itself when that is terminal."""
        if number not in self._handed_over:
            self._terminal(number)

    async def _read(self, action: PostRead, blocks: Sequence[int]) -> None:
        """Carry a read out. Its slices stop being posted when its lease or time is over (Q3)."""
        tools, machine = self.tools, self.machine
        peer, grant = self._peer, machine.grant
        assert peer is not None
        assert grant is not None
        end = action.end
        remote, local = grant.block_ids[action.first : end], blocks[action.first : end]
        fence = None
        if action.fence is not None:
            fence = grant.block_ids[action.fence : end], blocks[action.fence : end]
        plan = tools.transfers.plan(peer.ranks, remote, local, fence)
        self._handed_over.add(action.number)
        try:
            result = await tools.transfers.read(
                plan,
                deadline=time.monotonic() + tools.read_timeout_s,
                lease_deadline=lambda: self._lease_until,
                on_terminal=lambda: self._terminal(action.number),
            )
        except Exception as error:
            self._do(machine.read_failed(action.number, error))
            return
        self.stats = self.stats.plus(result.num_bytes, result.num_descriptors, result.seconds)
        if fence is None:
            self._do(machine.read_done(action.number, time.monotonic()))
        else:
            found = tools.transfers.words(plan)
            self._do(machine.words(action.number, found, time.monotonic()))

    def _terminal(self, number: int) -> None:
        self.tools.quarantine.terminal((self, number))
        self._do(self.machine.terminal(number))

    # -- the end ----------------------------------------------------------------------------

    async def _prepare(self) -> None:
        try:
            self.guide = await self.tools.host.prepare(self.request)
        except Exception as error:
            failure = NotPrepared(error)
            self._do(self.machine.fail(failure))
            raise failure from error

    async def _join(self) -> None:
        await self.prepared()
        reservation, first, guide = self._reservation, self.first_tokens, self.guide
        assert reservation is not None
        assert self._joined is not None
        if not reservation.pin():  # all was in the cache, so nothing was posted (M3)
            raise TransferFailed("its memory was taken back")
        if not self.machine.taken():
            return
        self._reservation = None
        self.stats = replace(self.stats, hit_blocks=self.machine.hit_blocks)
        self._joined(self)
        adopted = self.tools.host.call(lambda s: s.adopt(reservation, first, guide))
        try:
            await asyncio.shield(asyncio.wrap_future(adopted))
        except Exception as error:
            self._do(self.machine.joined(error))
            return
        self._do(self.machine.joined())


def _denial(message: ClaimDenied) -> HandoffError:
    """P's refusal; whether the params' bearer is to blame is in its kind."""
    if message.kind == "ClaimRefused":
        return ClaimDeniedByP(ClaimRefused(message.message))
    if message.kind == "TransferGone":
        return ClaimDeniedByP(TransferGone(message.message))
    return TransferFailed(message.message)
