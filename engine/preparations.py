"""Requests that wait for their grammar or processors before they may enter the engine."""

import asyncio
import logging
from collections.abc import Callable, Hashable

from contracts.errors import Overloaded, ServingError
from contracts.request import GenerationRequest
from engine.guide import Guide
from engine.host import EngineHost

log = logging.getLogger(__name__)


class Preparations:
    """One task for each request in preparation, by key. On the event loop only.

    Exactly one of the two callbacks of `start` is called, unless `cancel` or `close` comes first.
    """

    def __init__(self, host: EngineHost, limit: int) -> None:
        self._host = host
        self._limit = limit
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self,
        key: Hashable,
        request: GenerationRequest,
        ready: Callable[[Guide | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Prepare `request`, then call back.

        Raises:
            Overloaded: too many are being prepared.
        """
        if len(self._tasks) >= self._limit:
            raise Overloaded(f"{len(self._tasks)} requests are being prepared")
        assert key not in self._tasks
        task = asyncio.create_task(self._prepare(request, ready, failed), name="baton-prepare")
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._done(key, done))

    def cancel(self, key: Hashable) -> None:
        """Stop preparing it. Idempotent, also for what was never started."""
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()
            self._cancelled.add(task)

    async def close(self) -> None:
        """Stop all and wait for their ends. Idempotent."""
        for key in list(self._tasks):
            self.cancel(key)
        await asyncio.gather(*self._cancelled, return_exceptions=True)

    async def _prepare(
        self,
        request: GenerationRequest,
        ready: Callable[[Guide | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        try:
            guide = await self._host.prepare(request)
        except Exception as error:
            if not isinstance(error, ServingError):
                log.exception("request %s: a fault of ours in preparing it", request.request_id)
            failed(error)
        else:
            ready(guide)

    def _done(self, key: Hashable, task: "asyncio.Task[None]") -> None:
        self._cancelled.discard(task)
        if self._tasks.get(key) is task:
            del self._tasks[key]
