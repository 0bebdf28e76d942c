"""What the router wants of a session to a worker; `rpc.session_client` is the real one."""

from collections.abc import Awaitable, Sequence
from typing import Protocol

from contracts.events import WorkerEvent, WorkerLoad
from contracts.ids import RequestId, WorkerId
from contracts.request import GenerationRequest
from contracts.worker import WorkerAddress, WorkerInfo


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
