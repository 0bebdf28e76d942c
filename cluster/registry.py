"""The registry: one named Ray actor per application that knows which workers live.

It is never on a request's path: workers tell it that they live every two seconds, routers ask it
by a long poll, and both go on with what they know while it is away. If it dies, Ray starts it
again, empty; the next heartbeats fill it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.registry_table import (
    HEARTBEAT_S,
    Listing,
    RegistryTable,
    RegistryView,
    StartFailure,
    address_from_dict,
    address_to_dict,
    addresses_from,
)
from contracts.errors import ServingError
from contracts.ids import new_incarnation
from contracts.worker import WorkerAddress

logger = logging.getLogger(__name__)

MAX_WATCH_S = 30.0
_CALL_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 5.0
_EXPIRE_EVERY_S = 0.5


class Registry:
    """The actor's class. Calls carry plain data only."""

    def __init__(self) -> None:
        self._table = RegistryTable(new_incarnation(), time.monotonic)
        self._changed = asyncio.Event()
        self._expirer: asyncio.Task[None] | None = None

    async def register(self, fields: dict[str, object], draining: bool = False) -> None:
        """A worker lives (a heartbeat, too)."""
        if self._expirer is None:
            self._expirer = asyncio.create_task(self._expire_forever(), name="expire")
        self._table.register(address_from_dict(fields), draining=draining)
        self._notify()

    async def unregister(self, fields: dict[str, object]) -> None:
        """A worker has ended."""
        address = address_from_dict(fields)
        self._table.unregister(address.worker_id, address.incarnation)
        self._notify()

    async def report_failure(self, who: str, kind: str, message: str) -> None:
        """Somebody could not start; kept for `failures`."""
        self._table.failures.append(StartFailure(who, kind, message))

    async def failures(self) -> list[tuple[str, str, str]]:
        """All reported failures, (who, kind, message), oldest first."""
        return [(failure.who, failure.kind, failure.message) for failure in self._table.failures]

    async def watch(self, incarnation: int, version: int, timeout_s: float) -> dict[str, Any]:
        """The listing, once it differs from (incarnation, version) or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(timeout_s, MAX_WATCH_S)
        while (incarnation, version) == (self._table.incarnation, self._table.version):
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
        listing = self._table.listing()
        return {
            "incarnation": listing.incarnation,
            "version": listing.version,
            "workers": [address_to_dict(address) for address in listing.workers],
        }

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            self._table.expire()
            self._notify()

    def _notify(self) -> None:
        """Wake all watchers; each decides whether its version is old."""
        self._changed.set()
        self._changed = asyncio.Event()


def registry_handle(app_name: str) -> Any:
    """The application's registry, started by whoever asks first.

    `max_task_retries` is 0: a repeated `watch` would wait on an empty table for nothing.
    """
    actor = ray.remote(Registry)
    return actor.options(
        name=f"{app_name}-registry",
        namespace=app_name,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=1000,
        max_restarts=-1,
        max_task_retries=0,
    ).remote()


class _Caller:
    """Calls the registry and finds it again after an error. Belongs to one event loop."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._registry: Any = None

    async def __call__(self, method: str, *args: object, timeout_s: float) -> Any:
        """The answer of `method(*args)`.

        Raises:
            RayError, TimeoutError, ValueError: the registry is not there, or does not answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self._registry is None:
                    # It may have to be started, which blocks.
                    self._registry = await asyncio.to_thread(registry_handle, self._app_name)
                return await getattr(self._registry, method).remote(*args)
        except (RayError, TimeoutError, ValueError):
            self._registry = None
            raise


class RegistryDirectory:
    """router.directory.WorkerDirectory over the registry."""

    def __init__(self, app_name: str) -> None:
        self._call = _Caller(app_name)

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the list, and again on each change; never ends, never fails."""
        view = RegistryView(time.monotonic)
        backoff_s = _FIRST_BACKOFF_S
        yielded = False
        while True:
            wait_s = MAX_WATCH_S if view.grace_left_s is None else view.grace_left_s
            try:
                answer = await self._call(
                    "watch",
                    view.incarnation,
                    view.version,
                    wait_s,
                    timeout_s=wait_s + _CALL_TIMEOUT_S,
                )
                changed = view.update(
                    Listing(
                        answer["incarnation"],
                        answer["version"],
                        addresses_from(answer["workers"]),
                    )
                )
                backoff_s = _FIRST_BACKOFF_S
            except (RayError, TimeoutError, ValueError) as error:
                logger.warning("the registry does not answer (%s); trying again", _name(error))
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                changed = view.tick()
            if changed or not yielded:
                yielded = True
                yield view.workers


class RegistryAnnouncer:
    """A worker's side: says that it lives, until it is withdrawn. One per worker."""

    def __init__(self, app_name: str) -> None:
        self._caller = _Caller(app_name)
        self._address: WorkerAddress | None = None
        self._draining = False
        self._heart: asyncio.Task[None] | None = None

    async def announce(self, address: WorkerAddress) -> None:
        """Tell the registry, now and with every heartbeat. Does not wait for its answer."""
        self._address = address
        self._heart = asyncio.create_task(self._beat(), name="registry-heartbeat")

    async def draining(self) -> None:
        """Ask routers not to begin with this worker. Waits at most a second."""
        self._draining = True
        if self._address is not None:
            await self._call("register", address_to_dict(self._address), True, timeout_s=1.0)

    async def withdraw(self) -> None:
        """Leave the registry. Waits at most a second; idempotent."""
        heart, self._heart = self._heart, None
        if heart is not None:
            heart.cancel()
            await asyncio.wait({heart})
        address, self._address = self._address, None
        if address is not None:
            await self._call("unregister", address_to_dict(address), timeout_s=1.0)

    async def failed(self, who: str, error: BaseException) -> None:
        """Say why there will be no worker."""
        message = " ".join(str(error).split()) or "no message"
        await self._call("report_failure", who, _name(error), message, timeout_s=2.0)

    async def _beat(self) -> None:
        while True:
            if self._address is not None:
                await self._call("register", address_to_dict(self._address), self._draining)
            await asyncio.sleep(HEARTBEAT_S)

    async def _call(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        try:
            await self._caller(method, *args, timeout_s=timeout_s)
        except (RayError, TimeoutError, ValueError) as error:
            logger.warning("the registry did not take %r: %s", method, _name(error))


def _name(error: BaseException) -> str:
    """An error's class, or for one of ours that crossed a process, its own class."""
    cause = getattr(error, "cause", None)
    return type(cause if isinstance(cause, ServingError) else error).__name__
