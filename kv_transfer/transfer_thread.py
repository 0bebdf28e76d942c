"""The one thread that owns a connector (Q6): posting may copy in the calling thread.

    asyncio ──commands──> queue ──> transfer thread: post, poll, resolve ──call_soon──> asyncio

A posted read cannot be taken back, so whoever stops waiting for one still learns of its end:
futures of `submit` cannot be cancelled, and `reading.read` reports through `on_terminal`.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Self, TypeVar

from contracts.errors import EngineFailure, TransferFailed
from kv_transfer.connector import KvConnector, PeerHandle, Read, ReadHandle, ReadState
from kv_transfer.flight import ReadResult, failed, running_future
from kv_transfer.layout import MemoryRegion

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_EAGER_POLLS = 4  # then wait: over TCP, polling without pause starves UCX's progress thread
_MIN_WAIT_S = 50e-6
_MAX_WAIT_S = 5e-3
_WAIT_SHARE = 0.01  # of the time since something last ended: a wait adds at most 1 % to a read


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
        self._started: Future[None] = running_future()
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

    def submit(self, read: Read) -> Future[ReadResult]:
        """Post one read; see KvConnector.post_read.

        The future resolves only when nothing of the read can write local memory any more (its
        terminal state, or the connector's close); it cannot be cancelled. Callbacks added to
        it run in the transfer thread. A read outside the registered memory is `ok=False`.
        """
        future: Future[ReadResult] = running_future()

        def run(connector: KvConnector) -> None:
            self._post(connector, _Posted(future, self._clock()), read)

        self._put(_Command(run, lambda: future.set_result(failed(_CLOSED))))
        return future

    def _post(self, connector: KvConnector, posted: "_Posted", read: Read) -> None:
        try:
            handle = connector.post_read(read.peer, read.kind, read.regions, read.remote)
        except Exception as error:  # nothing was posted
            posted.future.set_result(failed(str(error)))
            return
        self._in_flight[handle] = posted

    def chain(self, reads: Sequence[Read], waits_for: int) -> "Chain":
        """Prepare reads that follow `waits_for` others, of whatever rank (F5)."""
        return Chain(self, reads, waits_for, [running_future() for _ in reads])

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

    async def _call(self, function: Callable[[KvConnector], _T]) -> _T:
        future: Future[_T] = running_future()

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
                posted.future.set_result(failed(_CLOSED, self._clock() - posted.posted_at))
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
                result = failed("the connector reports a failed read", seconds)
            posted.future.set_result(result)
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


@dataclass(slots=True, eq=False)
class Chain:
    """Reads that follow others, posted before anyone else is asked; see `TransferThread.chain`.

    `futures`: one for each, resolved as those of `submit`. No lease ends them: what they read is
    small, and of no use if the lease is over. Apart from `landed` and `give_up` it is touched
    in the transfer thread, or once that has ended.
    """

    thread: TransferThread
    reads: Sequence[Read]
    waits_for: int
    futures: list[Future[ReadResult]]
    over: bool = False  # posted, or never to be

    def landed(self, before: Future[ReadResult]) -> None:
        """One of those before has ended. From any thread."""
        ok = before.result().ok
        self.thread._put(_Command(lambda connector: self.ended(ok, connector), self._drop))

    def give_up(self) -> None:
        """They are not wanted any more. From any thread."""
        self.thread._put(_Command(lambda _: self._drop(), self._drop))

    def ended(self, ok: bool, connector: KvConnector) -> None:
        """One of those before has, and this is the transfer thread."""
        self.waits_for -= 1
        if not ok:
            self._drop()
        elif not self.waits_for and not self.over:
            self.over = True
            for future, read in zip(self.futures, self.reads, strict=True):
                self.thread._post(connector, _Posted(future, self.thread._clock()), read)

    def _drop(self) -> None:
        if self.over:
            return
        self.over = True
        for future in self.futures:
            with contextlib.suppress(InvalidStateError):  # closed: by two threads at once
                future.set_result(failed("the reads before it did not end well"))
