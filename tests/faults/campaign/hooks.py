"""What the campaign does to a worker from inside. Around the real parts: NIXL and gRPC stay real.

A *trap* stops one request at a named point of its way until it is released:

    p_compute   P is about to compute a step with it         d_claim    D is about to open the link
    d_read      D is about to read a part of its KV          d_words    ... its generation words
    d_verified  D has read the words                         d_compute  D is about to decode it

A *reading* changes reads below that: they fail, or land late, as a slow network's do. The hooks
sit where interfaces are (classes that others are built from), not inside what is tested.
"""

import asyncio
import contextvars
import ctypes
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

import kv_transfer.reading
from contracts.errors import OutOfBlocks
from contracts.handoff import ClaimGranted
from decode_worker.peers import PeerTable
from decode_worker.worker import DecodeWorker
from engine.block_pool import BlockPool
from engine.host import EngineHost, ModelComputer
from engine.scheduler import Scheduler
from engine.sequence import Reservation
from kv_transfer.connector import Read, ReadHandle, ReadState
from kv_transfer.layout import WORD_BYTES, Region
from kv_transfer.leases import Ended, ExportState, ExportTable
from kv_transfer.nixl import NixlConnector
from rpc.peer_client import PeerLink
from tests.faults.campaign.traps import MAX_HELD_S, Late, Named, Reading, Trap

_request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="")


class Hooks:
    """All hooks of one worker process; made before its worker."""

    def __init__(self, tell: Callable[[str, Any], None], peers: dict[str, str]) -> None:
        self.tell = tell
        self.peers = peers  # the proxy before each P's address
        self.host: EngineHost | None = None
        self.exports: ExportTable | None = None
        self.traps: list[Trap] = []
        self.readings: list[Reading] = []
        self.slow_s = 0.0
        self.slow_steps = 0
        self.reserved: dict[int, Reservation] = {}  # by id()
        self.quarantined: list[tuple[str, set[int]]] = []
        self.expire: set[str] = set()  # transfers to end at the next look
        self.expire_all = False
        self.mute = False  # the expired are not told to D
        self.taken: list[int] = []  # blocks held by an exhaustion
        self.fence_off = False  # a deliberate bug, to see that the checks find it
        self.generations: dict[int, int] = {}  # by P's block, as granted last
        self.words: dict[ReadHandle, Sequence[Region]] = {}
        self.step_requests: set[str] = set()
        self._late: dict[ReadHandle, Late] = {}

    # -- traps ------------------------------------------------------------------------------

    def find(self, point: str, requests: Iterable[str]) -> Trap | None:
        """The armed trap that one of the requests runs into now."""
        for trap in self.traps:
            if trap.point != point or trap.hit:
                continue
            if not any(request.startswith(trap.prefix) for request in requests):
                continue
            if trap.skip:
                trap.skip -= 1
                continue
            trap.hit = True
            self.tell("trap", trap.number)
            return trap
        return None

    async def stop_at(self, point: str) -> None:
        """Wait here if a trap says so."""
        trap = self.find(point, [_request.get()])
        until = time.monotonic() + MAX_HELD_S
        while (  # noqa: ASYNC110 - opened from another thread too
            trap is not None and not trap.opened.is_set() and time.monotonic() < until
        ):
            await asyncio.sleep(0.002)

    def clear(self) -> None:
        """Open all traps, end all that is going on."""
        for trap in self.traps:
            trap.opened.set()
        self.traps.clear()
        self.readings.clear()
        self.slow_steps = 0
        self.expire.clear()
        self.expire_all = self.mute = self.fence_off = False
        for late in list(self._late.values()):
            late.due = min(late.due, 0.0)
        self.give_back()

    # -- memory -----------------------------------------------------------------------------

    def reuse(self) -> "Future[int]":
        """Give every free block to somebody else, who fills it with garbage and leaves."""
        assert self.host is not None
        memory = self.host.parts.memory
        return self.host.call(lambda scheduler: _scribble(scheduler.pool, memory))

    def take(self, leave: int) -> "Future[int]":
        """Hold all blocks that are free now but `leave`."""
        assert self.host is not None

        def run(scheduler: Scheduler) -> int:
            count = max(0, scheduler.pool.available - leave)
            self.taken += scheduler.pool.allocate(count)
            return count

        return self.host.call(run)

    def give_back(self) -> None:
        """Free what `take` holds."""
        if self.host is not None and self.taken:

            def run(scheduler: Scheduler) -> None:
                blocks, self.taken = self.taken, []
                scheduler.pool.release(blocks)

            self.host.call(run)

    def held_in_engine(self, prefix: str) -> "Future[list[str]]":
        """What the engine holds for requests of that prefix, once all earlier commands ran."""
        assert self.host is not None

        def run(scheduler: Scheduler) -> list[str]:
            found = [
                f"sequence {seq.request.request_id}"
                for seq in scheduler._roster.by_key.values()
                if seq.request.request_id.startswith(prefix)
            ]
            open_ones = [r for r in self.reserved.values() if not r.reclaimed]
            names = [r.request.request_id for r in open_ones]
            found += [f"reservation {name}" for name in names if name.startswith(prefix)]
            return found + [
                f"quarantine {r}"
                for r, blocks in self.quarantined
                if blocks and r.startswith(prefix)
            ]

        return self.host.call(run)

    # -- installing -------------------------------------------------------------------------

    def install(self) -> None:
        """Wrap the classes of this process."""
        hooks = self
        host_init, table_init = EngineHost.__init__, ExportTable.__init__

        def init_host(self: EngineHost, *args: Any, **kwargs: Any) -> None:
            host_init(self, *args, **kwargs)
            hooks.host = self

        def init_table(self: ExportTable, *args: Any, **kwargs: Any) -> None:
            table_init(self, *args, **kwargs)
            hooks.exports = self

        _set(EngineHost, "__init__", init_host)
        _set(ExportTable, "__init__", init_table)
        self._wrap_leases()
        self._wrap_scheduler()
        self._wrap_compute()
        self._wrap_handoff()
        self._wrap_reads()

    def _wrap_leases(self) -> None:
        hooks, expired = self, ExportTable.expired

        def look(self: ExportTable, now: float | None = None) -> list[Ended]:
            ends = expired(self, now)
            if not hooks.expire and not hooks.expire_all:
                return ends
            for export in list(self):
                if not hooks.expire_all and export.transfer_id not in hooks.expire:
                    continue
                if hooks.mute and export.state is ExportState.PREFILL:
                    return ends  # no lease runs yet, and a D that is not told would wait for it
                hooks.expire.discard(export.transfer_id)
                end = self.revoke(export.transfer_id, "expired")
                if end is not None:
                    claimer = None if hooks.mute else end.claimer
                    ends.append(
                        Ended(end.transfer_id, end.block_ids, end.reason, end.in_prefill, claimer)
                    )
            hooks.expire.clear()  # the others are over
            hooks.expire_all = False
            return ends

        _set(ExportTable, "expired", look)

    def _wrap_scheduler(self) -> None:
        hooks = self
        schedule, reserve = Scheduler.schedule, Scheduler.reserve
        unreserve, adopt, unquarantine = (
            Scheduler.unreserve,
            Scheduler.adopt,
            BlockPool.unquarantine,
        )

        def plan(self: Scheduler) -> Any:
            planned = schedule(self)
            known = self._roster.by_key
            hooks.step_requests = {
                known[chunk.sequence].request.request_id
                for chunk in planned.chunks
                if chunk.sequence in known
            }
            return planned

        def reserved(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> Any:
            reservation = reserve(self, request, *args, **kwargs)
            hooks.reserved[id(reservation)] = reservation
            return reservation

        def unreserved(self: Scheduler, reservation: Any, in_flight: Iterable[int] = ()) -> None:
            blocks = set(in_flight)
            hooks.reserved.pop(id(reservation), None)
            if blocks:
                hooks.quarantined.append((reservation.request.request_id, set(blocks)))
            unreserve(self, reservation, blocks)

        def adopted(self: Scheduler, reservation: Any, *args: Any, **kwargs: Any) -> None:
            hooks.reserved.pop(id(reservation), None)
            adopt(self, reservation, *args, **kwargs)

        def terminal(self: BlockPool, blocks: Sequence[int]) -> None:
            unquarantine(self, blocks)
            for _, held in hooks.quarantined:
                held -= set(blocks)
            hooks.quarantined = [one for one in hooks.quarantined if one[1]]

        _set(Scheduler, "schedule", plan)
        _set(Scheduler, "reserve", reserved)
        _set(Scheduler, "unreserve", unreserved)
        _set(Scheduler, "adopt", adopted)
        _set(BlockPool, "unquarantine", terminal)

    def _wrap_compute(self) -> None:
        hooks, compute = self, ModelComputer.compute

        def slowly(self: ModelComputer, plan: Any) -> Any:
            for point in ("p_compute", "d_compute"):
                trap = hooks.find(point, hooks.step_requests)
                if trap is not None:
                    trap.opened.wait(MAX_HELD_S)
            if hooks.slow_steps > 0:
                hooks.slow_steps -= 1
                time.sleep(hooks.slow_s)
            return compute(self, plan)

        _set(ModelComputer, "compute", slowly)

    def _wrap_handoff(self) -> None:
        hooks, adopt, peer = self, DecodeWorker.adopt, PeerTable.peer
        on_message, listen = PeerTable.on_message, PeerTable.listen
        open_link, read = PeerLink.open.__func__, kv_transfer.reading.read  # type: ignore[attr-defined]

        def named(self: DecodeWorker, request: Any, *args: Any, **kwargs: Any) -> None:
            token = _request.set(request.request_id)  # what the handoff starts inherits it
            try:
                adopt(self, request, *args, **kwargs)
            finally:
                _request.reset(token)

        async def find_peer(self: PeerTable, address: str) -> Any:
            await hooks.stop_at("d_claim")
            return await peer(self, address)

        async def dial(cls: type[PeerLink], /, address: str, **kwargs: Any) -> PeerLink:
            link: PeerLink = await open_link(cls, hooks.peers.get(address, address), **kwargs)
            return link

        async def stopping(*args: Any, then: Sequence[Read] = (), **kw: Any) -> Any:
            try:
                await hooks.stop_at("d_read")
            except BaseException:
                told = kw.get("on_terminal")  # nothing was posted
                if told is not None:
                    told()
                raise
            if not then:
                return await read(*args, **kw)
            words = Named(then[0].regions)
            words.request = _request.get()
            then = (replace(then[0], regions=words), *then[1:])
            result = await read(*args, then=then, **kw)
            await hooks.stop_at("d_verified")
            return result

        def hear(self: PeerTable, link: PeerLink, message: Any) -> None:
            if isinstance(message, ClaimGranted):
                granted = zip(message.block_ids, message.generations, strict=True)
                hooks.generations.update(granted)
            on_message(self, link, message)

        def listen_for(
            self: PeerTable, to: Any, transfer: Any, listener: Callable[[Any], None]
        ) -> None:
            request = _request.get()

            def told(message: Any) -> None:  # what it starts belongs to the request
                token = _request.set(request)
                try:
                    listener(message)
                finally:
                    _request.reset(token)

            listen(self, to, transfer, told)

        _set(PeerTable, "on_message", hear)
        _set(PeerTable, "listen", listen_for)
        _set(DecodeWorker, "adopt", named)
        _set(PeerTable, "peer", find_peer)
        _set(PeerLink, "open", classmethod(dial))
        kv_transfer.reading.read = stopping

    def _wrap_reads(self) -> None:
        """Below the transfer thread: all of this runs in it."""
        hooks = self
        post, poll, release = NixlConnector.post_read, NixlConnector.poll, NixlConnector.release
        numbers = itertools.count()

        def posted(self: NixlConnector, peer: Any, kind: Any, regions: Any, remote: Any) -> Any:
            reading = hooks.reading(kind)
            trap = None
            if reading is None and isinstance(regions, Named):
                trap = hooks.find("d_words", [regions.request])
            if reading is None and trap is None:
                posted_handle = post(self, peer, kind, regions, remote)
                if hooks.fence_off and kind == "words":
                    hooks.words[posted_handle] = regions
                return posted_handle
            handle = ReadHandle(peer, sum(r.length for r in regions), len(regions))
            now = time.monotonic()
            late = Late(now + MAX_HELD_S, lambda: post(self, peer, kind, regions, remote), trap)
            if reading is not None:
                late.due = now + reading.late_s if reading.late_s else -1.0
                hooks.tell("reading", next(numbers))
            hooks._late[handle] = late
            return handle

        def polled(self: NixlConnector, handle: ReadHandle) -> ReadState:
            late = hooks._late.get(handle)
            if late is None:
                state = poll(self, handle)
                if handle in hooks.words and state is ReadState.DONE:
                    hooks.forge(self._own["words"].address, hooks.words.pop(handle))
                return state
            if late.due < 0:
                return ReadState.FAILED
            if late.real is None:
                opened = late.trap is not None and late.trap.opened.is_set()
                if time.monotonic() < late.due and not opened:
                    return ReadState.PENDING
                late.real = late.post()
            return poll(self, late.real)

        def released(self: NixlConnector, handle: ReadHandle) -> None:
            late = hooks._late.pop(handle, None)
            if late is None:
                release(self, handle)
            elif late.real is not None:
                release(self, late.real)

        _set(NixlConnector, "post_read", posted)
        _set(NixlConnector, "poll", polled)
        _set(NixlConnector, "release", released)

    def forge(self, table: int, regions: Sequence[Region]) -> None:
        """Let the words that were read be those that were promised: no fence any more."""
        for region in regions:
            for offset in range(0, region.length, WORD_BYTES):
                block = (region.src_offset + offset) // WORD_BYTES
                word = ctypes.c_uint64(self.generations.get(block, 0))
                ctypes.memmove(table + region.dst_offset + offset, ctypes.byref(word), WORD_BYTES)

    def reading(self, kind: str) -> Reading | None:
        """What is to happen to the next read of that kind."""
        for reading in self.readings:
            if reading.count > 0 and reading.kind in ("", kind):
                reading.count -= 1
                return reading
        return None


def _set(owner: type, name: str, value: object) -> None:
    setattr(owner, name, value)


def _scribble(pool: BlockPool, memory: Any) -> int:
    try:
        blocks = pool.allocate(pool.available)
    except OutOfBlocks:
        return 0
    garbage = np.random.default_rng(0).standard_normal(memory.bytes_per_block // 4)
    data = (garbage.astype(np.float32) * 3).tobytes()
    for block in blocks:
        address = memory.base_address + block * memory.bytes_per_block
        ctypes.memmove(address, data, len(data))
    pool.release(blocks)
    return len(blocks)
