"""A worker of either role as a Serve deployment: a thin shell that starts, announces, drains.

No request passes through Serve; it places the worker, watches its health and ends it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import ray
from ray import serve

from cluster.draining import drain_while_alive
from contracts.events import WorkerLoad
from contracts.worker import Role, WorkerAddress, WorkerConfig

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0  # of the graceful time-out, kept back for closing


class Announcer(Protocol):
    """Where a worker says that it lives (cluster.registry). No call raises or waits long."""

    async def announce(self, address: WorkerAddress) -> None:
        """Now, and again and again until withdrawn."""
        ...

    async def draining(self) -> None:
        """Routers shall not begin with it any more."""
        ...

    async def withdraw(self) -> None:
        """It is gone. Idempotent."""
        ...

    async def failed(self, who: str, error: BaseException) -> None:
        """It could not start."""
        ...


class Worker(Protocol):
    """What the shell needs of prefill_worker.worker and decode_worker.worker."""

    async def start(self) -> WorkerAddress:
        """Load and listen."""
        ...

    def assert_pulse(self) -> None:
        """Raise EngineFailure if the engine is dead or stuck."""
        ...

    def load(self) -> WorkerLoad:
        """Queue and memory."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and let what runs end."""
        ...

    async def close(self) -> None:
        """End. Idempotent."""
        ...


def make_worker(config: WorkerConfig) -> Worker:
    """The worker of `config.role`. Imports torch: 3 s, which the controller need not spend."""
    if config.role is Role.PREFILL:
        from prefill_worker.worker import PrefillWorker

        return PrefillWorker(config)
    from decode_worker.worker import DecodeWorker

    return DecodeWorker(config)


class WorkerDeployment:
    """One replica: one worker.

    Args:
        role: which worker it is.
        configure: gives the worker's configuration for (worker id, this node's IP address).
        announcer: makes this replica's announcer.
        graceful_timeout_s: the deployment's `graceful_shutdown_timeout_s`; Serve kills after it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        role: Role,
        configure: Callable[[str, str], WorkerConfig],
        announcer: Callable[[], Announcer],
        graceful_timeout_s: float,
    ) -> None:
        self._announcer = announcer()
        self._drain_s = max(0.0, graceful_timeout_s - _CLOSE_S)
        worker_id = serve.get_replica_context().replica_id.unique_id
        try:
            config = configure(worker_id, ray.util.get_node_ip_address())
            self._worker = make_worker(config)
            address = await self._worker.start()
        except Exception as error:
            await self._announcer.failed(f"{role} worker", error)
            await self.close()
            raise
        self._started = True
        await self._announcer.announce(address)

    async def check_health(self) -> None:
        """Raises EngineFailure if the engine is dead or stuck; Serve then replaces the replica."""
        self._worker.assert_pulse()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load, for a custom autoscaling policy."""
        load = self._worker.load()
        return {
            "waiting": load.waiting,
            "running": load.running,
            "waiting_tokens": load.waiting_tokens,
            "used_blocks": load.total_blocks - load.free_blocks,
        }

    async def drain(self) -> None:
        """Leave the routers' choice, and let what runs end in the time that Serve gives.

        Raises:
            EngineFailure: the engine is dead or stuck; what it holds must be replayed elsewhere.
        """
        if getattr(self, "_started", False):  # Serve may stop a replica that is still starting
            # At once: the registry may be away just now, and admission ends here anyway.
            await asyncio.gather(
                drain_while_alive(self._worker, self._drain_s), self._announcer.draining()
            )

    async def close(self) -> None:
        """Leave the registry and end the worker. Idempotent; accepts a half-started replica.

        Sessions that still have requests end here, and their routers replay them elsewhere.
        """
        ends = []
        if hasattr(self, "_worker"):
            ends.append(self._worker.close())
        if hasattr(self, "_announcer"):
            ends.append(self._announcer.withdraw())
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def __del__(self) -> None:
        """Awaited by Serve on scale-down, redeploy, failed health and shutdown."""
        try:
            await self.drain()
        except Exception:
            logger.exception("draining failed; closing")
        await self.close()
