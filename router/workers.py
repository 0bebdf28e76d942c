"""The workers this router is connected to: one session each, opened again after a loss."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from contracts.errors import ServingError, Unavailable
from contracts.events import WorkerEvent, WorkerLoad
from contracts.ids import RequestId, WorkerId, new_incarnation
from contracts.request import GenerationRequest
from contracts.worker import Role, WorkerAddress, WorkerInfo
from router.directory import WorkerDirectory
from router.placement import WorkerSnapshot

logger = logging.getLogger(__name__)

_SETTLE_S = 0.1  # a load report younger than this may not know of a request yet
_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 2.0
_DIRECTORY_RETRY_S = 1.0
_CLOSED = "closed by the router"


class Session(Protocol):
    """A worker session (rpc.session_client.WorkerSession)."""

    @property
    def info(self) -> WorkerInfo:
        """What the worker said of itself."""
        ...

    def submit(self, request: GenerationRequest, *, handoff: bool) -> None:
        """Send a request; raises Unavailable if the session is lost."""
        ...

    def adopt(self, request: GenerationRequest, kv_transfer_params: str) -> None:
        """Ask a D to take a handoff; raises Unavailable if the session is lost."""
        ...

    def abort(self, request_id: RequestId, attempt: int) -> None:
        """Stop an attempt; never raises."""
        ...

    async def close(self) -> None:
        """End the session."""
        ...


class Listener(Protocol):
    """What a session reports to (rpc.session_client.SessionListener)."""

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        """One frame's events."""
        ...

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        """The worker's load."""
        ...

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        """The session is over for good."""
        ...


class OpenSession(Protocol):
    """Opens a session (rpc.session_client.WorkerSession.open)."""

    def __call__(
        self,
        address: WorkerAddress,
        *,
        router_id: str,
        incarnation: int,
        epoch: int,
        cluster_key: str,
        listener: Listener,
    ) -> Awaitable[Session]:
        """Return after both hellos; raises Unavailable."""
        ...


class RequestListener(Protocol):
    """One request's end of the event streams."""

    def on_event(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        """An event of this request."""
        ...

    def on_worker_lost(self, worker_id: WorkerId, reason: str) -> None:
        """A session was lost (told to every request, whether it used that worker or not)."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that the worker's reported load may not include yet."""

    sent_at: float
    prompt_tokens: int


class _Link:
    """One session's life as the pool sees it; the listener of that session only.

    Alive from `opened` to the first `lost`; what comes before or after is dropped.
    """

    def __init__(self, pool: "WorkerPool", worker_id: WorkerId) -> None:
        self._pool = pool
        self.worker_id = worker_id
        self.session: Session | None = None
        self.load = WorkerLoad()
        self.sent: dict[RequestId, _Sent] = {}
        self.gone = asyncio.Event()

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        for event in events:
            self.sent.pop(event.request_id, None)
            self._pool.dispatch(self.worker_id, event)

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        self.load = load
        if self.sent:
            settled = self._pool.clock() - _SETTLE_S
            self.sent = {i: sent for i, sent in self.sent.items() if sent.sent_at > settled}
        self._pool.notify()

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        self.session = None
        self._pool.lost(self, reason)


class WorkerPool:
    """Follows a directory and keeps a session to each worker in it.

    A worker that leaves the directory keeps its session while that lives (the registry may have
    restarted empty), but is not connected to again. A new incarnation replaces the old one.
    All methods belong to one event loop.
    """

    def __init__(
        self,
        directory: WorkerDirectory,
        open_session: OpenSession,
        *,
        router_id: str,
        cluster_key: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._directory = directory
        self._open = open_session
        self._router_id = router_id
        self._cluster_key = cluster_key
        self._incarnation = new_incarnation()
        self._epoch = 0
        self._links: dict[WorkerId, _Link] = {}
        self._addresses: dict[WorkerId, WorkerAddress] = {}
        self._keepers: dict[WorkerId, tuple[WorkerAddress, asyncio.Task[None]]] = {}
        self._listeners: dict[RequestId, RequestListener] = {}
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None

    # Life

    def start(self) -> None:
        """Begin to follow the directory."""
        self._follower = asyncio.create_task(self._follow(), name="follow-directory")

    async def close(self) -> None:
        """End all sessions; requests still there see their workers lost. Idempotent."""
        tasks = [task for _, task in self._keepers.values()]
        if self._follower is not None:
            tasks.append(self._follower)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keepers.clear()

    async def _follow(self) -> None:
        while True:
            try:
                async for addresses in self._directory.watch():
                    self._apply(addresses)
                return  # a list that never changes
            except Exception:  # the last list stays in force meanwhile
                logger.exception("the worker directory failed; trying again")
            await asyncio.sleep(_DIRECTORY_RETRY_S)

    def _apply(self, addresses: Iterable[WorkerAddress]) -> None:
        wanted = {address.worker_id: address for address in addresses}
        for worker_id, address in wanted.items():
            self._addresses[worker_id] = address
            kept, old = self._keepers.get(worker_id, (None, None))
            if kept == address and old is not None and not old.done():
                continue
            if old is not None:
                old.cancel()
            task = asyncio.create_task(self._keep(address, after=old), name=f"session-{worker_id}")
            self._keepers[worker_id] = (address, task)
        for worker_id in self._addresses.keys() - wanted.keys():
            del self._addresses[worker_id]

    async def _keep(self, address: WorkerAddress, after: asyncio.Task[None] | None) -> None:
        """Keep a session to one incarnation of one worker, until it leaves the directory."""
        if after is not None:
            await asyncio.wait({after})
        backoff_s = _FIRST_BACKOFF_S
        while self._addresses.get(address.worker_id) == address:
            self._epoch += 1
            link = _Link(self, address.worker_id)
            try:
                session = await self._open(
                    address,
                    router_id=self._router_id,
                    incarnation=self._incarnation,
                    epoch=self._epoch,
                    cluster_key=self._cluster_key,
                    listener=link,
                )
            except Exception as error:  # whatever it was, the next try may succeed
                expected = isinstance(error, ServingError | OSError)
                logger.warning(
                    "no session to %s: %s", address.worker_id, error, exc_info=not expected
                )
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                continue
            backoff_s = _FIRST_BACKOFF_S
            try:
                self._opened(link, session)
                await link.gone.wait()
            finally:
                link.on_lost(address.worker_id, _CLOSED)
                with suppress(Exception):
                    await session.close()
            await asyncio.sleep(backoff_s)

    def _opened(self, link: _Link, session: Session) -> None:
        if link.gone.is_set():
            return
        link.session = session
        self._links[link.worker_id] = link
        logger.info("session to %s (%s) is open", link.worker_id, session.info.role)
        self.notify()

    # What sessions report

    def dispatch(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        """Hand an event to its request; those of ended requests are dropped."""
        listener = self._listeners.get(event.request_id)
        if listener is not None:
            listener.on_event(worker_id, event)

    def lost(self, link: _Link, reason: str) -> None:
        """Forget a session and tell the requests."""
        if self._links.get(link.worker_id) is link:
            del self._links[link.worker_id]
            level = logging.INFO if reason == _CLOSED else logging.WARNING
            logger.log(level, "session to %s is over: %s", link.worker_id, reason)
            for listener in list(self._listeners.values()):
                listener.on_worker_lost(link.worker_id, reason)
        self.notify()

    def notify(self) -> None:
        """Wake who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    # What requests use

    async def changed(self, timeout_s: float) -> None:
        """Wait until a worker connects, is lost or reports its load; at most `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(timeout_s, 0.0))

    def snapshot(self) -> tuple[WorkerSnapshot, ...]:
        """The connected workers."""
        return tuple(
            WorkerSnapshot(
                worker_id=link.worker_id,
                role=link.session.info.role,
                semantic_hash=link.session.info.semantic_hash,
                max_prompt_tokens=link.session.info.max_prompt_tokens,
                load=link.load,
                unreported=len(link.sent),
                unreported_tokens=sum(sent.prompt_tokens for sent in link.sent.values()),
            )
            for link in self._links.values()
            if link.session is not None
        )

    @property
    def max_model_len(self) -> int | None:
        """The least of the connected workers', in tokens; None without any."""
        return min(
            (k.session.info.max_model_len for k in self._links.values() if k.session is not None),
            default=None,
        )

    def able(self, role: Role) -> bool:
        """Whether a worker of that role is connected and takes requests."""
        return any(w.role is role and not w.load.draining for w in self.snapshot())

    def register(self, request_id: RequestId, listener: RequestListener) -> None:
        """Begin to route a request's events."""
        self._listeners[request_id] = listener

    def unregister(self, request_id: RequestId) -> None:
        """Drop what still comes for it."""
        self._listeners.pop(request_id, None)
        for link in self._links.values():
            link.sent.pop(request_id, None)

    def expect(self, worker_id: WorkerId, request_id: RequestId) -> None:
        """Count a request that a D will be offered once its P has begun."""
        link = self._links.get(worker_id)
        if link is not None:
            link.sent[request_id] = _Sent(math.inf, 0)

    def submit(self, worker_id: WorkerId, request: GenerationRequest, *, handoff: bool) -> None:
        """Send a request to a worker.

        Raises:
            Unavailable: not connected.
        """
        link, session = self._connected(worker_id)
        try:
            session.submit(request, handoff=handoff)
        except Unavailable as error:
            link.on_lost(worker_id, str(error))  # it knows before it could say so
            raise
        tokens = len(request.prompt_ids) + sum(len(ids) for ids in request.output_ids)
        link.sent[request.request_id] = _Sent(self.clock(), tokens)

    def adopt(self, worker_id: WorkerId, request: GenerationRequest, params: str) -> None:
        """Offer a handoff to a D. Its prompt tokens are computed elsewhere.

        Raises:
            Unavailable: not connected.
        """
        link, session = self._connected(worker_id)
        try:
            session.adopt(request, params)
        except Unavailable as error:
            link.on_lost(worker_id, str(error))
            raise
        link.sent[request.request_id] = _Sent(self.clock(), 0)

    def abort(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        """Stop an attempt on a worker; nothing happens if it is not connected."""
        link = self._links.get(worker_id)
        if link is not None and link.session is not None:
            link.sent.pop(request_id, None)
            link.session.abort(request_id, attempt)

    def _connected(self, worker_id: WorkerId) -> tuple[_Link, Session]:
        link = self._links.get(worker_id)
        if link is None or link.session is None:
            raise Unavailable(f"worker {worker_id} is not connected")
        return link, link.session
