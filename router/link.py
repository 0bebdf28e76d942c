"""One session as the pool sees it: the worker's load, and what the load cannot know of yet."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from contracts.events import Adopted, WorkerEvent, WorkerLoad
from contracts.ids import RequestId, WorkerId
from contracts.worker import Role
from router.placement import WorkerSnapshot
from router.session import Session

_SETTLE_S = 0.1  # a load report younger than this may not know of a request yet
_REFUSES_S = 1.0  # so long a D that had no room is believed, unless it says that it has some


class LinkOwner(Protocol):
    """Who keeps the links: the worker pool."""

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds."""
        ...

    def dispatch(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        """An event for its request."""
        ...

    def lost(self, link: "Link", reason: str) -> None:
        """The session is over."""
        ...

    def notify(self) -> None:
        """Who waits for a worker, or for room on one, may look again."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that the worker's reported load may not include yet."""

    sent_at: float
    prompt_tokens: int


@dataclass(slots=True)
class _Refusal:
    """A D had no room; `load` is the first one it told after that."""

    at: float
    load: WorkerLoad | None = None

    def outlived(self, load: WorkerLoad, now: float) -> bool:
        """Whether it may have room again: something has ended there, or time has passed."""
        if now >= self.at + _REFUSES_S:
            return True
        if self.load is None:
            self.load = load
        return (
            load.waiting < self.load.waiting
            or load.running < self.load.running
            or load.free_blocks > self.load.free_blocks
        )


class Link:
    """One session's life as the pool sees it; the listener of that session only.

    Alive from `opened` to the first `on_lost`; what comes before or after is dropped. Its books
    hold only requests that the pool knows: `forget` drops one.
    """

    def __init__(self, pool: LinkOwner, worker_id: WorkerId, role: Role) -> None:
        self.worker_id = worker_id
        self.role = role
        self.session: Session | None = None
        self.load = WorkerLoad()
        self.gone = asyncio.Event()
        self._pool = pool
        self._sent: dict[RequestId, _Sent] = {}
        self._promised: dict[RequestId, int] = {}  # blocks, of handoffs that D has yet to finish
        self._refusal: _Refusal | None = None

    # The session's listener

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        """One frame's events, each for its request."""
        for event in events:
            self._sent.pop(event.request_id, None)
            if event.request_id in self._promised:
                self._settle(event)
            self._pool.dispatch(self.worker_id, event)

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        """The worker's load, with each frame and beat."""
        changed = load.draining != self.load.draining
        self.load = load
        now = self._pool.clock()
        if self._sent:
            settled = now - _SETTLE_S
            self._sent = {i: sent for i, sent in self._sent.items() if sent.sent_at > settled}
        if self._refusal is not None and self._refusal.outlived(load, now):
            self._refusal = None
            changed = True
        if changed:
            self._pool.notify()

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        """The session is over for good."""
        if self.gone.is_set():
            return
        self.gone.set()
        self.session = None
        self._pool.lost(self, reason)

    # The pool's books

    def expect(self, request_id: RequestId, blocks: int) -> None:
        """A handoff will be offered to this D once its P has begun."""
        self._sent[request_id] = _Sent(math.inf, 0)
        self._promised[request_id] = blocks

    def sent(self, request_id: RequestId, prompt_tokens: int) -> None:
        """A request has gone out."""
        self._sent[request_id] = _Sent(self._pool.clock(), prompt_tokens)

    def offered(self, request_id: RequestId, blocks: int) -> None:
        """A handoff has been offered; its prompt is computed elsewhere."""
        self.sent(request_id, 0)
        self._promised[request_id] = blocks

    def forget(self, request_id: RequestId) -> None:
        """Nothing of that request is or will be here."""
        self._sent.pop(request_id, None)
        self._drop_promise(request_id)

    def snapshot(self, session: Session) -> WorkerSnapshot:
        """As placement wants it."""
        info = session.info
        return WorkerSnapshot(
            worker_id=self.worker_id,
            role=info.role,
            semantic_hash=info.semantic_hash,
            max_prompt_tokens=info.max_prompt_tokens,
            load=self.load,
            unreported=len(self._sent),
            unreported_tokens=sum(sent.prompt_tokens for sent in self._sent.values()),
            incarnation=info.incarnation,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            total_blocks=info.total_blocks,
            promised_blocks=sum(self._promised.values()),
            refuses=self._refusal is not None,
        )

    def _settle(self, event: WorkerEvent) -> None:
        """D's blocks are promised until it has them, or gives the handoff up."""
        if isinstance(event, Adopted) and event.accepted:
            return
        if isinstance(event, Adopted):
            self._refusal = _Refusal(self._pool.clock())
        self._drop_promise(event.request_id)

    def _drop_promise(self, request_id: RequestId) -> None:
        if self._promised.pop(request_id, None) is not None:
            self._pool.notify()
