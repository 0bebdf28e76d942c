"""A real server in this process: workers over gRPC and NIXL, and the router under uvicorn.

Its event loop runs in a thread of its own, so that ordinary blocking clients can use it.
"""

import asyncio
import secrets
import socket
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
import uvloop

from cluster.plain import Worker, make_worker
from contracts.ids import WorkerId
from contracts.worker import Role, WorkerConfig
from router.app import create_app
from router.config import RouterConfig
from tests.support.static_directory import StaticDirectory

MODEL = "demo"
KEY = "live-test-key"
_START_S = 60.0

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread; gRPC wants one loop for all servers of a process."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="live-server", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = _START_S) -> T:
        """Run a coroutine there and wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def acall(self, work: Coroutine[Any, Any, T]) -> T:
        """The same, without blocking the caller's own loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def close(self) -> None:
        """End the loop and its thread."""
        self.call(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_S)
        assert not self._thread.is_alive()
        self._loop.close()


@dataclass
class LiveServer:
    """A server that answers at `url`; `aggregated` has no P."""

    url: str  # http://host:port
    aggregated: bool
    thread: LoopThread
    workers: Mapping[Role, Any] = field(repr=False)

    @property
    def base_url(self) -> str:
        """What OpenAI clients want."""
        return f"{self.url}/v1"

    def ledgers(self) -> list[dict[str, object]]:
        """Each worker's status."""

        async def read() -> list[dict[str, object]]:
            return [worker.status() for worker in self.workers.values()]

        return self.thread.call(read())

    def wait_idle(self, timeout_s: float = 20.0) -> None:
        """Wait until no worker holds anything and each ledger adds up.

        Raises:
            AssertionError: not in time; shows what is held.
        """
        self.thread.call(self._idle(timeout_s))

    async def idle(self, timeout_s: float = 20.0) -> None:
        """The same for asynchronous tests."""
        await self.thread.acall(self._idle(timeout_s))

    async def _idle(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if all(_is_idle(worker.status()) for worker in self.workers.values()):
                        return
                    await asyncio.sleep(0.01)
        except TimeoutError:
            states = {role.value: worker.status() for role, worker in self.workers.items()}
            raise AssertionError(f"not idle: {states}") from None


def _is_idle(status: Mapping[str, object]) -> bool:
    return bool(status["idle"] and status["balanced"] and not status["requests"])


async def _start(
    stack: AsyncExitStack,
    model: Path,
    listener: socket.socket,
    *,
    aggregated: bool,
    router: Mapping[str, Any],
    worker: Mapping[str, Any],
) -> dict[Role, Worker]:
    roles: Sequence[Role] = [Role.DECODE] if aggregated else [Role.PREFILL, Role.DECODE]
    workers: dict[Role, Worker] = {}
    addresses = []
    for role in roles:
        settings: dict[str, Any] = {
            "kv_memory_bytes": 64 << 20,
            "num_threads": 1,
            "check_ledger": True,
            **worker,
        }
        workers[role] = make_worker(
            WorkerConfig(
                role=role,
                worker_id=WorkerId(f"{role.value}-{secrets.token_hex(3)}"),
                model_path=str(model),
                cluster_key=KEY,
                **settings,
            )
        )
        stack.push_async_callback(workers[role].close)
        addresses.append(await workers[role].start())
    config = RouterConfig(
        model_path=str(model),
        cluster_key=KEY,
        aggregated=aggregated,
        **{"served_model_name": MODEL, **router},
    )
    app = create_app(config, StaticDirectory(addresses))
    server = uvicorn.Server(
        uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=5)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    await _until_healthy(f"http://127.0.0.1:{listener.getsockname()[1]}/health", serving)
    return workers


async def _until_healthy(url: str, serving: "asyncio.Task[None]") -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(_START_S):
        while True:
            assert not serving.done(), "uvicorn ended at once"
            if (await client.get(url)).status_code == 200:
                return
            await asyncio.sleep(0.02)


@contextmanager
def live_server(
    thread: LoopThread,
    model: Path,
    *,
    aggregated: bool = False,
    router: Mapping[str, Any] | None = None,
    worker: Mapping[str, Any] | None = None,
) -> Iterator[LiveServer]:
    """Serve `model` on a free loopback port until the end of the block.

    `router` and `worker` override fields of RouterConfig and of each WorkerConfig.
    """
    stack = AsyncExitStack()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        try:
            workers = thread.call(
                _start(
                    stack,
                    model,
                    listener,
                    aggregated=aggregated,
                    router=router or {},
                    worker=worker or {},
                )
            )
            yield LiveServer(f"http://127.0.0.1:{port}", aggregated, thread, workers)
        finally:
            thread.call(stack.aclose())
