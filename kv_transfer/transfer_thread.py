"""The one thread that owns a connector (Q6): posting may copy in the calling thread.

    asyncio ──commands──> queue ──> transfer thread: post, poll, resolve ──call_soon──> asyncio

A posted read cannot be taken back, so whoever stops waiting for one still learns of its end:
futures of `submit_read` cannot be cancelled, and `read` reports through `on_terminal`.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Self, TypeVar

from contracts.errors import EngineFailure, TransferFailed
from kv_transfer.connector import KvConnector, PeerHandle, ReadHandle, ReadState, RegionKind
from kv_transfer.flight import Flight, ReadResult
from kv_transfer.layout import MemoryRegion, Region

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_EAGER_POLLS = 4  # then wait: over TCP, polling without pause starves UCX's progress thread
_MIN_WAIT_S = 50e-6
_MAX_WAIT_S = 5e-3
_WAIT_SHARE = 0.01  # of the time since something last ended: a wait adds at most 1 % to a read


@dataclass(frozen=True, slots=True)
class Following:
    """A read that is posted when others have landed, before anyone else is asked (F5).

    No lease ends it: what it reads is small, and of no use if the lease is over.
    """

    kind: RegionKind
    regions: Sequence[Region]
    remote: MemoryRegion


class TransferThread:
    """Runs a connector in a thread of its own; all methods may be called from any thread.

    `make_connector` is called in that thread; the connector lives until `close`.
    """

    def __init__(
        self,
        make_connector: Callable[[], KvConnector],
        *,
        name: str = "kv-transfer",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_connector = make_connector
        self._clock = clock
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._in_flight: dict[ReadHandle, _Posted] = {}  # the thread's own
        self._lock = threading.Lock()  # guards _closed: nothing is queued after the last drain
        self._closed = False
        self._fault: Exception | None = None
        self._started: Future[None] = _running_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def start(self) -> Self:
        """Start the thread and wait until it has its connector; raises what making it raised."""
        self._thread.start()
        await asyncio.wrap_future(self._started)
        return self

    def assert_pulse(self) -> None:
        """Raise EngineFailure if it has stopped on a fault: its worker can read nothing more."""
        if self._fault is not None:
            raise EngineFailure(f"the transfer thread failed: {self._fault!r}")

    async def register(self, kv: MemoryRegion, words: MemoryRegion) -> None:
        """See KvConnector."""
        await self._call(lambda connector: connector.register(kv, words))

    async def agent_metadata(self) -> bytes:
        """See KvConnector."""
        return await self._call(lambda connector: connector.agent_metadata())

    async def add_peer(self, metadata: bytes) -> PeerHandle:
        """See KvConnector."""
        return await self._call(lambda connector: connector.add_peer(metadata))

    async def remove_peer(self, peer: PeerHandle) -> None:
        """See KvConnector."""
        await self._call(lambda connector: connector.remove_peer(peer))

    def submit_read(
        self, peer: PeerHandle, kind: RegionKind, regions: Sequence[Region], remote: MemoryRegion
    ) -> Future[ReadResult]:
        """Post one read; see KvConnector.post_read.

        The future resolves only when nothing of the read can write local memory any more (its
        terminal state, or the connector's close); it cannot be cancelled. Callbacks added to
        it run in the transfer thread. A read outside the registered memory is `ok=False`.
        """
        future: Future[ReadResult] = _running_future()
        self._submit(future, _posting(peer, kind, regions, remote))
        return future

    def _submit(
        self,
        future: Future[ReadResult],
        post: Callable[[KvConnector], ReadHandle],
        chain: "_Chain | None" = None,
    ) -> None:
        def run(connector: KvConnector) -> None:
            self._post(connector, _Posted(future, self._clock(), chain), post)

        def refuse() -> None:
            _end(_Posted(future, 0.0, chain), _failed(_CLOSED))

        self._put(_Command(run, refuse))

    def _post(
        self,
        connector: KvConnector,
        posted: "_Posted",
        post: Callable[[KvConnector], ReadHandle],
    ) -> None:
        try:
            handle = post(connector)
        except Exception as error:  # nothing was posted
            _end(posted, _failed(str(error)))
            return
        self._in_flight[handle] = posted

    async def read(
        self,
        peer: PeerHandle,
        kind: RegionKind,
        slices: Sequence[Sequence[Region]],
        remote: MemoryRegion,
        *,
        deadline: float,
        then: Following | None = None,
        lease_deadline: Callable[[], float] | None = None,
        on_terminal: Callable[[], None] | None = None,
        depth: int = 2,
    ) -> ReadResult:
        """Read all slices, `depth` of them in flight at a time (Q3).

        Args:
            peer: from `add_peer`.
            kind: which registered memory to read into.
            slices: each is posted as one read.
            remote: the peer's memory that `src_offset`s count from.
            then: read this too, posted in the transfer thread the moment all slices have landed;
                not if one of them failed or this call was given up. The result counts neither
                its bytes nor its time.
            deadline: give up at this time of the clock; what is posted lands all the same.
            lease_deadline: asked before each post; no slice is posted after it (L1).
            on_terminal: called exactly once, on the event loop, when nothing posted by this
                call can write local memory any more: before a successful return, else
                possibly long after the raise or cancellation. Until then the target blocks
                are quarantined (Q1).
            depth: 2 keeps the link busy while the loop turns around.

        Raises:
            TransferFailed: a read failed, or a deadline passed. Nothing more is posted after
                that, nor after a cancellation.
        """
        if then is not None and not slices:
            raise ValueError("there is no read for another to follow")
        flight = Flight(asyncio.get_running_loop(), on_terminal)
        started_at = self._clock()
        chain: _Chain | None = None
        if then is not None:
            chain = _Chain(self, peer, then, waits_for=len(slices))
            flight.follow(chain.future)
        try:
            for regions in slices:
                await self._until_below(flight, depth, deadline)
                now = self._clock()
                if now >= deadline or (lease_deadline is not None and now >= lease_deadline()):
                    raise TransferFailed("the time for reading is over")
                future: Future[ReadResult] = _running_future()
                flight.add(future)
                self._submit(future, _posting(peer, kind, regions, remote), chain)
            await self._until_below(flight, 0, deadline)
        finally:
            flight.seal()
            if chain is not None and not chain.future.done():
                self._put(_Command(lambda _: chain.give_up(), chain.give_up))
        seconds = self._clock() - started_at - flight.following_s
        return ReadResult(True, flight.num_bytes, flight.num_descriptors, seconds)

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Close the connector and end the thread; whether it ended in time. Idempotent.

        Reads still in flight resolve as failed once the connector is closed.
        """
        return await asyncio.to_thread(self.stop, timeout_s)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Blocking form of `close`."""
        if self._thread.ident is None:
            with self._lock:
                self._closed = True
            return True
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    async def _until_below(self, flight: "Flight", limit: int, deadline: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                await flight.until_below(limit)
        except TimeoutError:
            raise TransferFailed("the read did not end in time") from None

    async def _call(self, function: Callable[[KvConnector], _T]) -> _T:
        future: Future[_T] = _running_future()

        def run(connector: KvConnector) -> None:
            try:
                future.set_result(function(connector))
            except Exception as error:
                future.set_exception(error)

        def refuse() -> None:
            future.set_exception(TransferFailed(_CLOSED))

        self._put(_Command(run, refuse))
        return await asyncio.wrap_future(future)

    def _put(self, command: "_Command") -> None:
        with self._lock:
            if not self._closed:
                self._commands.put(command)
                return
        command.refuse()

    def _run(self) -> None:
        try:
            connector = self._make_connector()
        except Exception as error:
            self._finish()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._serve(connector)
        except Exception as error:
            self._fault = error
            _log.exception("the transfer thread stops on a fault of its own")
        finally:
            connector.close()  # raising here leaves the futures open: their blocks stay lost
            while self._in_flight:
                _, posted = self._in_flight.popitem()
                _end(posted, _failed(_CLOSED, self._clock() - posted.posted_at))
            self._finish()

    def _finish(self) -> None:
        """Refuse new commands and answer those already queued."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command.refuse()

    def _serve(self, connector: KvConnector) -> None:
        polls = 0
        progress_at = self._clock()
        while True:
            wait_s: float | None = None
            if self._in_flight:
                idle_s = self._clock() - progress_at
                wait_s = min(max(_MIN_WAIT_S, idle_s * _WAIT_SHARE), _MAX_WAIT_S)
                wait_s = 0.0 if polls < _EAGER_POLLS else wait_s
            progress = False
            for command in self._take(wait_s):
                if command is None:
                    return
                command.run(connector)
                progress = True
            progress |= self._poll(connector)
            polls = 0 if progress else polls + 1
            if progress:
                progress_at = self._clock()

    def _take(self, wait_s: float | None) -> Iterable["_Command | None"]:
        """What is queued now; if that is nothing, what comes within `wait_s` (None: for ever)."""
        with contextlib.suppress(queue.Empty):
            if wait_s == 0.0:
                yield self._commands.get_nowait()
            else:
                yield self._commands.get(timeout=wait_s)
            while True:
                yield self._commands.get_nowait()

    def _poll(self, connector: KvConnector) -> bool:
        """Resolve the reads that have ended; whether there were any."""
        ended = False
        for handle, posted in list(self._in_flight.items()):
            state = connector.poll(handle)
            if not state.terminal:
                continue
            ended = True
            del self._in_flight[handle]
            connector.release(handle)
            seconds = self._clock() - posted.posted_at
            if state is ReadState.DONE:
                result = ReadResult(True, handle.num_bytes, handle.num_descriptors, seconds)
            else:
                result = _failed("the connector reports a failed read", seconds)
            _end(posted, result, connector)
        return ended


_CLOSED = "the connector is closed"


@dataclass(frozen=True, slots=True)
class _Command:
    """Exactly one of the two is called, once."""

    run: Callable[[KvConnector], None]
    refuse: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Posted:
    future: Future[ReadResult]
    posted_at: float
    chain: "_Chain | None" = None


@dataclass(slots=True, eq=False)
class _Chain:
    """A read that follows others. Touched in the transfer thread, or once that has ended."""

    thread: TransferThread
    peer: PeerHandle
    following: Following
    waits_for: int
    future: Future[ReadResult] = field(default_factory=lambda: _running_future())
    over: bool = False  # posted, or never to be

    def ended(self, result: ReadResult, connector: KvConnector | None) -> None:
        """One of the others has. Without a connector nothing can be posted any more."""
        self.waits_for -= 1
        if not result.ok or connector is None:
            self.give_up()
        elif not self.waits_for and not self.over:
            self.over = True
            posted = _Posted(self.future, self.thread._clock())
            what = self.following
            post = _posting(self.peer, what.kind, what.regions, what.remote)
            self.thread._post(connector, posted, post)

    def give_up(self) -> None:
        """It is not wanted any more, or cannot be."""
        if self.over:
            return
        self.over = True
        with contextlib.suppress(InvalidStateError):  # closed: by two threads at once
            self.future.set_result(_failed("the reads before it did not end well"))


def _posting(
    peer: PeerHandle, kind: RegionKind, regions: Sequence[Region], remote: MemoryRegion
) -> Callable[[KvConnector], ReadHandle]:
    return lambda connector: connector.post_read(peer, kind, regions, remote)


def _end(posted: _Posted, result: ReadResult, connector: KvConnector | None = None) -> None:
    """Nothing of that read can write any more."""
    posted.future.set_result(result)
    if posted.chain is not None:
        posted.chain.ended(result, connector)


def _failed(error: str, seconds: float = 0.0) -> ReadResult:
    return ReadResult(False, 0, 0, seconds, error)


def _running_future() -> Future[_T]:
    """A future whose waiters cannot cancel it."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()
    return future
