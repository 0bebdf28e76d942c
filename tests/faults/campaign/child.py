"""The processes of a cluster: a worker or a router as it is, with the hooks and a channel."""

import asyncio
import contextvars
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

import router.chat
import router.endpoints.completions
from cluster.plain import make_worker
from contracts.errors import ServingError
from contracts.ids import RequestId, WorkerId, new_request_id
from contracts.worker import WorkerAddress, WorkerConfig
from engine import grammar
from engine.grammar_lane import Job
from router.app import create_app, open_grpc_session
from router.config import RouterConfig
from router.middleware import sent_request_id
from tests.faults.campaign.channel import Served
from tests.faults.campaign.hooks import Hooks
from tests.faults.campaign.traps import Reading, Trap

_SEND_BUFFER_BYTES = 8192  # small, so that a client that reads slowly is felt soon


def _begin(log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.captureWarnings(True)


class InlineLane:
    """Compiles grammars in a thread here: starting a child for each takes seconds of CPU."""

    def __init__(self, name: str, settings: Any, *args: Any, **kwargs: Any) -> None:
        self.pid = None
        self._settings = settings
        self._backends: Any = None
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""

    def put(self, job: Job) -> None:
        """Compile one grammar."""
        threading.Thread(target=self._compile, args=(job,), daemon=True).start()

    def _compile(self, job: Job) -> None:
        from engine.grammar_backends import Backends

        settings = self._settings
        try:
            with self._lock:
                if self._backends is None:
                    self._backends = Backends(
                        settings.path, settings.vocab_size, settings.end_token_ids
                    )
                result: Any = self._backends.compile(job.grammar)
        except ServingError as error:
            result = error
        job.done(job, result)


# -- workers --------------------------------------------------------------------------------


def worker(sock: socket.socket, config: WorkerConfig, setup: dict[str, Any]) -> None:
    """Run one worker until its channel closes. `setup`: log, environment, peers."""
    _begin(setup["log"])
    os.environ.update(setup["environment"])
    cast(Any, grammar).Lane = InlineLane
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_worker(sock, config, setup["peers"]))
    logging.shutdown()
    os._exit(0)


async def _worker(sock: socket.socket, config: WorkerConfig, peers: dict[str, str]) -> None:
    handlers: dict[str, Any] = {}
    served = Served(handlers)
    await served.attach(sock)
    hooks = Hooks(served.tell, peers)
    hooks.install()
    running: Any = make_worker(config)
    end = asyncio.Event()

    async def status() -> dict[str, object]:
        found: dict[str, object] = running.status()
        reading = {"late_reads": len(hooks._late), "taken": len(hooks.taken)}
        return {**found, **reading}

    async def serves(prefix: str) -> list[str]:
        return [f"request {key[0]}" for key in running._requests if key[0].startswith(prefix)]

    async def holds(prefix: str) -> list[str]:
        found = await serves(prefix)
        return found + await asyncio.wrap_future(hooks.held_in_engine(prefix))

    async def arm(number: int, point: str, prefix: str, skip: int = 0) -> None:
        hooks.traps.append(Trap(number, point, prefix, skip))

    async def open_trap(number: int) -> None:
        for trap in hooks.traps:
            if trap.number == number:
                trap.hit = True
                trap.opened.set()

    async def change_reads(kind: str, count: int, late_s: float) -> None:
        hooks.readings.append(Reading(kind, count, late_s))

    async def slow(steps: int, step_s: float) -> None:
        hooks.slow_steps, hooks.slow_s = steps, step_s

    async def expire(prefix: str = "", mute: bool = False) -> None:
        hooks.mute = mute
        if prefix:
            by_transfer = running._by_transfer.items()
            hooks.expire |= {t for t, key in by_transfer if key[0].startswith(prefix)}
        else:
            hooks.expire_all = True

    async def reuse() -> int:
        return await _wait(hooks.reuse())

    async def exhaust(leave: int) -> int:
        return await _wait(hooks.take(leave))

    async def no_fence() -> None:
        hooks.fence_off = True

    async def clear() -> None:
        hooks.clear()

    async def stop(drain_s: float = 0.0) -> None:
        try:
            if drain_s:
                await running.drain(drain_s)
            await running.close()
        finally:
            end.set()

    every: tuple[Any, ...] = (status, holds, serves, arm, open_trap, change_reads, slow, expire)
    for handler in (*every, reuse, exhaust, no_fence, clear, stop):
        handlers[handler.__name__] = handler
    served.tell("ready", await running.start())
    over = asyncio.create_task(served.over.wait())
    ended = asyncio.create_task(end.wait())
    await asyncio.wait({over, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not end.is_set():
        os._exit(0)
    await asyncio.sleep(0.05)  # the answer to `stop`
    os._exit(0)


async def _wait(future: "Future[int]") -> int:
    return await asyncio.wrap_future(future)


# -- routers --------------------------------------------------------------------------------

_label: contextvars.ContextVar[str] = contextvars.ContextVar("label", default="")


def _labelled_request_id() -> RequestId:
    """The router's own id, with the client's before it: what workers hold can be told apart."""
    return RequestId(f"{_label.get()}-{new_request_id()[:10]}")


class _Labels:
    """Remembers the client's request id for what the request starts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _label.set(sent_request_id(scope) or "")
        await self._app(scope, receive, send)


class ToldDirectory:
    """A WorkerDirectory that the campaign tells."""

    def __init__(self) -> None:
        self._addresses: tuple[WorkerAddress, ...] = ()
        self._changed = asyncio.Event()

    def tell(self, addresses: tuple[WorkerAddress, ...]) -> None:
        """A new list."""
        self._addresses = addresses
        self._changed.set()

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the list whenever it was told."""
        while True:
            self._changed.clear()
            yield self._addresses
            await self._changed.wait()


def router_process(
    sock: socket.socket, config: RouterConfig, port: int, setup: dict[str, Any]
) -> None:
    """Run one router until its channel closes."""
    _begin(setup["log"])
    cast(Any, router.chat).new_request_id = _labelled_request_id
    cast(Any, router.endpoints.completions).new_request_id = _labelled_request_id
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_router(sock, config, port))
    os._exit(0)


async def _router(sock: socket.socket, config: RouterConfig, port: int) -> None:
    handlers: dict[str, Any] = {}
    served = Served(handlers)
    await served.attach(sock)
    directory = ToldDirectory()
    sessions: dict[WorkerId, Any] = {}

    async def open_session(address: WorkerAddress, **kwargs: Any) -> Any:
        session = await open_grpc_session(address, **kwargs)
        sessions[address.worker_id] = session
        return session

    app = create_app(config, directory, open_session=open_session)

    async def workers(addresses: tuple[WorkerAddress, ...]) -> None:
        directory.tell(addresses)

    async def connected() -> dict[str, int]:
        """Incarnation by worker id, of those that take requests."""
        snapshot = app.state.serving.service.pool.snapshot()
        able = [w.worker_id for w in snapshot if not w.load.draining]
        return {name: sessions[name].info.incarnation for name in able if not sessions[name].lost}

    async def metrics() -> str:
        service = app.state.serving.service
        text: bytes = service.metrics.render(service.pool.snapshot())
        return text.decode()

    async def busy() -> int:
        return int(app.state.serving.service.in_flight)

    handlers.update(workers=workers, connected=connected, metrics=metrics, busy=busy)
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.bind(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(_Labels(app), access_log=False, log_level="warning", lifespan="on")
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.005)
    served.tell("ready")
    over = asyncio.create_task(served.over.wait())
    await asyncio.wait({over, serving}, return_when=asyncio.FIRST_COMPLETED)
    os._exit(0 if served.over.is_set() else 1)


def moved(address: WorkerAddress, port: int) -> WorkerAddress:
    """The same worker, reached through a proxy."""
    return replace(address, address=f"127.0.0.1:{port}")
