"""Two P, two D and two routers, each a process of its own, with proxies on all their wires."""

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.ids import WorkerId
from contracts.worker import Role, WorkerAddress, WorkerConfig
from router.config import RouterConfig
from tests.faults.campaign import child, zygote
from tests.faults.campaign.channel import CallFailed, Control, Lost
from tests.faults.campaign.proxy import Proxy

PREFILLS, DECODES, ROUTERS = ("p0", "p1"), ("d0", "d1"), ("r0", "r1")
WORKERS = PREFILLS + DECODES
KEY = "campaign"
MODEL = "tiny"
BLOCK_SIZE = 8  # tokens
KV_BYTES = 170 * 4096  # 170 blocks
MAX_MODEL_LEN = 640
LEASE_MS = 1500
READ_TIMEOUT_MS = 1000
TWO_STEP_LEASE_MS = 1500
START_S = 60.0


class Died(Exception):
    """A process ended that nobody killed."""


@dataclass(frozen=True)
class Settings:
    """Of one cluster."""

    number: int
    zygote: str  # its socket
    model: Path
    folder: Path  # of its logs
    transport: str = ""  # UCX_TLS; empty: UCX chooses (shared memory)


class Process:
    """One worker or router; started again under the same name and port after each end."""

    def __init__(self, cluster: "Cluster", name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.starts = 0
        self.pid = 0
        self.expected_end = False
        self.stopped = False  # by SIGSTOP
        self.address: WorkerAddress | None = None
        self.log = Path()
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self._cluster = cluster
        self._control: Control | None = None

    async def start(self) -> None:
        """Fork it; `ready` is set later."""
        self.starts += 1
        self.expected_end = self.stopped = False
        self.ready, self.gone = asyncio.Event(), asyncio.Event()
        self.log = self._cluster.settings.folder / f"{self.name}-{self.starts}.log"
        function, arguments = self._cluster.program(self)
        self.pid, sock = await asyncio.to_thread(
            zygote.fork, self._cluster.settings.zygote, function, *arguments
        )
        control = Control(self._event, lambda: self._lost(control))
        self._control = control
        await control.attach(sock)

    async def call(self, method: str, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """See Control.call."""
        if self._control is None:
            raise Lost
        return await self._control.call(method, timeout_s, **arguments)

    def signal(self, number: int) -> None:
        """Send a signal."""
        if number == signal.SIGKILL:
            self.expected_end = True
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.stopped = number == signal.SIGSTOP
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            self._cluster.complain(f"{self.name} was gone when it got signal {number}")

    def _event(self, kind: str, value: Any) -> None:
        if kind == "ready":
            self.address = value
            self.ready.set()
            self._cluster.is_ready(self)
        else:
            self._cluster.heard(self, kind, value)

    def _lost(self, control: Control) -> None:
        if control is not self._control:
            return
        if not self.expected_end:
            self._cluster.complain(f"{self.name} (pid {self.pid}) ended by itself")
        self.gone.set()
        self.ready.clear()

    def close(self) -> None:
        """Hang up: the process ends by itself."""
        self.expected_end = True
        if self._control is not None:
            self._control.close()


class Cluster:
    """All processes and wires. `complaints` are what no run may leave behind."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.complaints: list[str] = []
        self.listeners: list[Callable[[str, str, Any], None]] = []
        ports = _free_ports(len(WORKERS) + len(ROUTERS))
        self.processes = {
            name: Process(self, name, port)
            for name, port in zip(WORKERS + ROUTERS, ports, strict=True)
        }
        self.sessions = {name: Proxy(self.processes[name].port) for name in WORKERS}
        self.peers = {(d, p): Proxy(self.processes[p].port) for d in DECODES for p in PREFILLS}
        self._restarts: set[asyncio.Task[None]] = set()

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    @property
    def wires(self) -> list[Proxy]:
        """All proxies."""
        return [*self.sessions.values(), *self.peers.values()]

    def program(self, process: Process) -> tuple[str, tuple[Any, ...]]:
        """What a process runs."""
        settings, name = self.settings, process.name
        setup: dict[str, Any] = {"log": str(process.log)}
        if name in ROUTERS:
            config = RouterConfig(
                model_path=str(settings.model),
                served_model_name=MODEL,
                cluster_key=KEY,
                allow_kv_transfer_params=True,
                two_step_lease_ms=TWO_STEP_LEASE_MS,
                reasoning_parser="none",
                tool_call_parser="hermes",
                router_id=f"{name}-{settings.number}",
                worker_wait_s=10.0,
            )
            return "tests.faults.campaign.child:router_process", (config, process.port, setup)
        setup["environment"] = {"UCX_TLS": settings.transport} if settings.transport else {}
        setup["peers"] = {
            f"127.0.0.1:{self.processes[p].port}": f"127.0.0.1:{proxy.port}"
            for (d, p), proxy in self.peers.items()
            if d == name
        }
        worker = WorkerConfig(
            role=Role.PREFILL if name in PREFILLS else Role.DECODE,
            worker_id=WorkerId(name),
            model_path=str(settings.model),
            cluster_key=KEY,
            port=process.port,
            block_size=BLOCK_SIZE,
            kv_memory_bytes=KV_BYTES,
            max_model_len=MAX_MODEL_LEN,
            max_step_tokens=64,
            num_threads=1,
            lease_ms=LEASE_MS,
            read_timeout_ms=READ_TIMEOUT_MS,
            check_ledger=True,
        )
        return "tests.faults.campaign.child:worker", (worker, setup)

    async def start(self) -> None:
        """Start everything and wait until both routers are connected to all workers."""
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        for wire in self.wires:
            await wire.start()
        for process in self.processes.values():
            await process.start()
        await self.connected(START_S)

    def complain(self, text: str) -> None:
        """Note what must not happen."""
        self.complaints.append(text)

    def heard(self, process: Process, kind: str, value: Any) -> None:
        """An event of a process."""
        for listener in list(self.listeners):
            listener(process.name, kind, value)

    # -- faults -----------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL, and a restart at once."""
        self.processes[name].signal(signal.SIGKILL)
        self.restart(name)

    def restart(self, name: str) -> None:
        """Start it again when it has ended."""

        async def again() -> None:
            await self.processes[name].gone.wait()
            await self.processes[name].start()

        task = asyncio.create_task(again(), name=f"restart {name}")
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def stop(self, name: str, drain_s: float) -> None:
        """Drain and end it in an orderly way; started again after that."""
        self.processes[name].expected_end = True
        self.restart(name)
        await self.processes[name].call("stop", timeout_s=drain_s + 10, drain_s=drain_s)

    # -- states -----------------------------------------------------------------------------

    async def ask(self, names: Iterable[str], method: str, **arguments: Any) -> dict[str, Any]:
        """Call those processes that live and are not stopped; answers by name."""
        alive = [
            name
            for name in names
            if self.processes[name].ready.is_set() and not self.processes[name].stopped
        ]
        answers = await asyncio.gather(
            *(self.processes[name].call(method, **arguments) for name in alive),
            return_exceptions=True,
        )
        found: dict[str, Any] = {}
        for name, answer in zip(alive, answers, strict=True):
            if isinstance(answer, Lost):
                continue
            if isinstance(answer, CallFailed | TimeoutError):
                raise AssertionError(f"{name}: {method}: {answer!r}") from answer
            if isinstance(answer, BaseException):
                raise answer
            found[name] = answer
        return found

    async def connected(self, timeout_s: float) -> None:
        """Wait until all processes run and both routers can use all workers."""
        if self._restarts:
            await asyncio.wait(set(self._restarts), timeout=timeout_s)
        for process in self.processes.values():
            async with asyncio.timeout(timeout_s):
                ready = asyncio.create_task(process.ready.wait())
                gone = asyncio.create_task(process.gone.wait())
                await asyncio.wait({ready, gone}, return_when=asyncio.FIRST_COMPLETED)
                ready.cancel()
                gone.cancel()
            if not process.ready.is_set():
                raise Died(f"{process.name} does not start: {process.log}")
        wanted: dict[str, int] = {}
        for name in WORKERS:
            address = self.processes[name].address
            assert address is not None
            wanted[name] = address.incarnation

        async def all_there() -> object:
            answers = await self.ask(ROUTERS, "connected")
            return None if all(answers.get(r) == wanted for r in ROUTERS) else answers

        await until(all_there, timeout_s, "the routers are not connected to all workers")

    def is_ready(self, process: Process) -> None:
        """A process has started: the routers are told where all workers are."""
        task = asyncio.create_task(self._tell_routers(), name=f"{process.name} is ready")
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _tell_routers(self) -> None:
        addresses = tuple(
            child.moved(process.address, self.sessions[name].port)
            for name in WORKERS
            if (process := self.processes[name]).address is not None
        )
        await self.ask(ROUTERS, "workers", addresses=addresses)

    async def idle(self, timeout_s: float) -> None:
        """Wait until no worker holds anything; all ledgers balanced.

        Raises:
            AssertionError: not in time; shows what is held.
        """

        async def nothing() -> object:
            states = await self.ask(WORKERS, "status")
            held = {name: state for name, state in states.items() if not _is_idle(state)}
            busy = {n: c for n, c in (await self.ask(ROUTERS, "busy")).items() if c}
            return {**held, **busy} or None

        await until(nothing, timeout_s, "something is held")

    async def held(self, prefixes: Iterable[str]) -> dict[str, list[str]]:
        """What living workers hold for requests of these prefixes."""
        found: dict[str, list[str]] = {}
        for prefix in prefixes:
            for name, held in (await self.ask(WORKERS, "holds", prefix=prefix)).items():
                if held:
                    found.setdefault(name, []).extend(held)
        return found

    async def close(self) -> None:
        """End everything."""
        for task in list(self._restarts):
            task.cancel()
        for process in self.processes.values():
            if process.stopped:
                process.signal(signal.SIGCONT)
            process.close()
        for process in self.processes.values():
            await _ended(process.pid)
        for wire in self.wires:
            await wire.close()


async def until(
    wrong: Callable[[], Awaitable[object]], timeout_s: float, complaint: str, every_s: float = 0.01
) -> None:
    """Wait until `wrong` gives None.

    Raises:
        AssertionError: not in time, with what was wrong last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = await wrong()
        if found is None:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{complaint} after {timeout_s:g} s: {found}")
        await asyncio.sleep(every_s)


def _is_idle(status: dict[str, Any]) -> bool:
    free = status["idle"] and status["balanced"] and not status["requests"]
    return bool(free and not status.get("transfers") and not status["late_reads"])


async def _ended(pid: int, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while pid and time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.01)
    if pid:
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports below those that the system gives to outgoing connections: they stay ours."""
    found: list[int] = []
    draws = random.Random(os.getpid())
    while len(found) < count:
        port = draws.randrange(12_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
