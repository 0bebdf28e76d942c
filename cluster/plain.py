"""Workers and routers as ordinary processes, without Ray: `baton worker` and `baton router`."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn, Protocol

from cluster.draining import Drainable, drain_while_alive
from cluster.where import tell_on_signal
from contracts.errors import ConfigurationError, EngineFailure, ServingError
from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role, WorkerAddress, WorkerConfig
from router.config import RouterConfig
from rpc.status import fetch_status

logger = logging.getLogger(__name__)

_PULSE_S = 1.0
_LOOK_S = 0.2  # for a worker that has not answered yet
_LOOK_AGAIN_S = 1.0  # for one that may have restarted


class Worker(Protocol):
    """What both kinds of worker offer."""

    async def start(self) -> WorkerAddress:
        """Load the model and begin to serve."""
        ...

    def assert_pulse(self) -> None:
        """Raises EngineFailure if the engine is dead or stuck."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing, wait for what runs."""
        ...

    async def close(self) -> None:
        """End. Idempotent; accepts a half-started worker."""
        ...


def make_worker(config: WorkerConfig) -> Worker:
    """The worker of the configuration's role (imports torch)."""
    if config.role is Role.PREFILL:
        from prefill_worker.worker import PrefillWorker

        return PrefillWorker(config)
    from decode_worker.worker import DecodeWorker

    return DecodeWorker(config)


def run_worker(config: WorkerConfig, *, drain_s: float) -> int:
    """Serve until SIGTERM or SIGINT, then drain for at most `drain_s`, or until a second signal.

    Prints one line on stdout once requests can come. Returns 0, or 1 if the engine died.

    Raises:
        ServingError: the worker cannot start.
    """
    return asyncio.run(_serve_worker(config, drain_s))


async def _serve_worker(config: WorkerConfig, drain_s: float) -> int:
    signals: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, None)
    tell_on_signal(loop)
    logger.info("starting %s worker %s", config.role, config.worker_id)
    worker = make_worker(config)
    stopped = asyncio.create_task(signals.get(), name="first-signal")
    try:
        starting = asyncio.create_task(worker.start(), name="start")
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await worker.close()
            _end_now()  # the loading thread cannot be stopped, and nobody is served yet
        address = starting.result()
        print(
            f"baton worker ready role={config.role} address={address.address}"
            f" id={address.worker_id}",
            flush=True,
        )
        while not stopped.done():
            await asyncio.wait({stopped}, timeout=_PULSE_S)
            worker.assert_pulse()
        logger.info("draining worker %s, for at most %g s", config.worker_id, drain_s)
        await drain_until_signal(worker, drain_s, signals)
        return 0
    except EngineFailure:
        logger.exception("worker %s is given up", config.worker_id)
        return 1
    finally:
        stopped.cancel()
        await worker.close()


async def drain_until_signal(
    worker: Drainable, drain_s: float, signals: "asyncio.Queue[None]"
) -> None:
    """Drain for at most `drain_s`; one more signal ends it at once.

    Raises:
        EngineFailure: the engine has no pulse, so what runs would never end.
    """
    draining = asyncio.create_task(drain_while_alive(worker, drain_s), name="drain")
    again = asyncio.create_task(signals.get(), name="second-signal")
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if draining.done():
        draining.result()
    else:
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)


def _end_now() -> NoReturn:
    """End the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class StatusDirectory:
    """router.directory.WorkerDirectory for plain workers: addresses are given, the rest is asked.

    A worker is listed once it has answered, and again with its new incarnation after a restart.
    """

    def __init__(self, addresses: Sequence[tuple[Role, str]], cluster_key: str) -> None:
        self._addresses = tuple(addresses)
        self._cluster_key = cluster_key

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the list whenever it changes; never ends."""
        known: dict[str, WorkerAddress] = {}
        listed: tuple[WorkerAddress, ...] | None = None
        while True:
            answers = await asyncio.gather(*(self._ask(*where) for where in self._addresses))
            known |= {answer.address: answer for answer in answers if answer is not None}
            if tuple(known.values()) != listed:
                listed = tuple(known.values())
                yield listed
            await asyncio.sleep(_LOOK_AGAIN_S if len(known) == len(self._addresses) else _LOOK_S)

    async def _ask(self, role: Role, address: str) -> WorkerAddress | None:
        with suppress(ServingError, OSError, KeyError, ValueError):
            status = await fetch_status(address, cluster_key=self._cluster_key, timeout_s=2.0)
            if status["role"] != role:
                logger.warning("%s is a %s worker, not %s", address, status["role"], role)
                return None
            return WorkerAddress(
                WorkerId(str(status["worker_id"])),
                role,
                address,
                Incarnation(int(str(status.get("incarnation", 0)))),  # 0: whichever answers
            )
        return None


def parse_addresses(role: Role, text: str) -> list[tuple[Role, str]]:
    """`host:port,host:port` as addresses of workers of that role.

    Raises:
        ConfigurationError: a part is no host:port.
    """
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigurationError(f"{address!r} is no worker address; write host:port")
    return [(role, address) for address in addresses]


def run_router(
    config: RouterConfig,
    addresses: Sequence[tuple[Role, str]],
    *,
    host: str,
    port: int,
    drain_s: float,
) -> int:
    """Serve HTTP until SIGTERM or SIGINT, then let streams end for at most `drain_s`, or until a
    second signal.

    Prints one line on stdout once it listens (workers may still be missing: see /health).

    Raises:
        ConfigurationError: the model folder lacks a tokenizer or a chat template.
    """
    import uvicorn

    from router.app import create_app, stop_admission

    app = create_app(config, StatusDirectory(addresses, config.cluster_key))
    gc.collect()
    gc.freeze()  # as in router/deployment.py

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            tell_on_signal(asyncio.get_running_loop())
            if self.started:
                bound = self.servers[0].sockets[0].getsockname()[1]
                print(f"baton router ready url=http://{host}:{bound}", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            stop_admission(app)
            self.force_exit = self.should_exit
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=max(1, int(drain_s)),
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handled)  # uvicorn raises again what it has handled
    server.run()
    return 0 if server.started else 1


def _handled(number: int, frame: object) -> None:
    """Nothing is left to do."""
