"""The workers this router is connected to: one session each, opened again after a loss."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Protocol

from contracts.errors import ServingError, Unavailable
from contracts.events import WorkerEvent
from contracts.ids import RequestId, WorkerId, new_incarnation
from contracts.request import GenerationRequest
from contracts.worker import Role, WorkerAddress
from router.directory import WorkerDirectory
from router.link import Link
from router.placement import Instance, Need, WorkerSnapshot
from router.session import OpenSession, Session

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 2.0
_DIRECTORY_RETRY_S = 1.0
_CLOSE_TIMEOUT_S = 5.0  # for all sessions together
_CLOSED = "closed by the router"


class RequestListener(Protocol):
    """One request's end of the event streams."""

    def on_event(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        """An event of this request."""
        ...

    def on_worker_lost(self, worker_id: WorkerId, *, drained: bool) -> None:
        """A session was lost (told to every request, whether it used that worker or not).

        `drained`: that was to be expected, for the worker was leaving.
        """
        ...


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
        on_broken: Callable[[Role], None] = lambda role: None,
    ) -> None:
        """`on_broken` is told of each session that ended by itself."""
        self.clock = clock
        self._on_broken = on_broken
        self._directory = directory
        self._open = open_session
        self._router_id = router_id
        self._cluster_key = cluster_key
        self._incarnation = new_incarnation()
        self._epoch = 0
        self._links: dict[WorkerId, Link] = {}
        self._addresses: dict[WorkerId, WorkerAddress] = {}
        self._keepers: dict[WorkerId, tuple[WorkerAddress, asyncio.Task[None]]] = {}
        self._listeners: dict[RequestId, RequestListener] = {}
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self.line = asyncio.Lock()  # held by the first of those who wait for room on a D

    # Life

    def start(self) -> None:
        """Begin to follow the directory."""
        self._follower = asyncio.create_task(self._follow(), name="follow-directory")

    async def close(self) -> None:
        """End all sessions; requests still there see their workers lost. Idempotent, bounded."""
        tasks = [task for _, task in self._keepers.values()]
        if self._follower is not None:
            tasks.append(self._follower)
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
            if late:
                logger.error("%d sessions did not end within %g s", len(late), _CLOSE_TIMEOUT_S)
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
            task.add_done_callback(partial(self._kept, worker_id))
        for worker_id in self._addresses.keys() - wanted.keys():
            del self._addresses[worker_id]

    def _kept(self, worker_id: WorkerId, task: asyncio.Task[None]) -> None:
        """A keeper has ended: its worker has left the directory, or has another keeper now."""
        if self._keepers.get(worker_id, (None, None))[1] is task:
            del self._keepers[worker_id]

    async def _keep(self, address: WorkerAddress, after: asyncio.Task[None] | None) -> None:
        """Keep a session to one incarnation of one worker, until it leaves the directory."""
        if after is not None:
            await asyncio.wait({after})
        backoff_s = _FIRST_BACKOFF_S
        while self._addresses.get(address.worker_id) == address:
            self._epoch += 1
            link = Link(self, address.worker_id, address.role)
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

    def _opened(self, link: Link, session: Session) -> None:
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

    def lost(self, link: Link, reason: str) -> None:
        """Forget a session and tell the requests."""
        if self._links.get(link.worker_id) is link:
            del self._links[link.worker_id]
            closed = reason == _CLOSED
            if not closed:
                self._on_broken(link.role)
            level = logging.INFO if closed else logging.WARNING
            logger.log(level, "session to %s is over: %s", link.worker_id, reason)
            drained = closed or link.load.draining
            for listener in list(self._listeners.values()):
                listener.on_worker_lost(link.worker_id, drained=drained)
        self.notify()

    def notify(self) -> None:
        """Wake who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    # What requests use

    async def changed(self, timeout_s: float) -> None:
        """Wait until a worker connects, drains, is lost or has room again; at most `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(timeout_s, 0.0))

    def snapshot(self) -> tuple[WorkerSnapshot, ...]:
        """The connected workers."""
        return tuple(
            link.snapshot(link.session) for link in self._links.values() if link.session is not None
        )

    def instance(self, worker_id: WorkerId) -> Instance | None:
        """Which start of that worker this router is connected to."""
        link = self._links.get(worker_id)
        if link is None or link.session is None:
            return None
        return worker_id, link.session.info.incarnation

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
            link.forget(request_id)

    def expect(self, worker_id: WorkerId, request_id: RequestId, need: Need) -> None:
        """Count a request that a D will be offered once its P has begun."""
        link = self._links.get(worker_id)
        if link is not None and link.session is not None:
            link.expect(request_id, need.blocks(link.session.info.block_size))

    def forget(self, worker_id: WorkerId, request_id: RequestId) -> None:
        """Take back what `expect` said."""
        link = self._links.get(worker_id)
        if link is not None:
            link.forget(request_id)

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
        link.sent(request.request_id, tokens)

    def adopt(
        self, worker_id: WorkerId, request: GenerationRequest, params: str, need: Need
    ) -> None:
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
        link.offered(request.request_id, need.blocks(session.info.block_size))

    def abort(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        """Stop an attempt on a worker; nothing happens if it is not connected."""
        link = self._links.get(worker_id)
        if link is not None and link.session is not None:
            link.forget(request_id)
            link.session.abort(request_id, attempt)

    def _connected(self, worker_id: WorkerId) -> tuple[Link, Session]:
        link = self._links.get(worker_id)
        if link is None or link.session is None:
            raise Unavailable(f"worker {worker_id} is not connected")
        return link, link.session
