"""The processes of one system under measurement: started together, watched, ended together."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

_LOOK_S = 0.1  # between two looks at a health URL
_TERM_S = 20.0  # from SIGTERM to SIGKILL


class SystemFailed(Exception):
    """A system cannot be started, or a process of it has ended."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process. `env` is added to ours; `health_url` answers 200 once it can serve."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    health_url: str | None = None


@dataclass(frozen=True, slots=True)
class System:
    """A server to measure: an OpenAI-compatible `url` and the processes behind it.

    Without parts it runs already, is never stopped, and its CPU time is not known.
    `served_name` is what requests call the model; None: the first one that the server lists.
    `strict`: it refuses fields that are not OpenAI's, such as `ignore_eos`.
    """

    name: str
    url: str
    parts: tuple[Part, ...] = ()
    served_name: str | None = None
    strict: bool = False


class Running:
    """The processes of one system. `stop` ends what is left of them, whatever state they are in.

    Args:
        system: what to start.
        logs: a folder; each process writes to a file of its own in it.
    """

    def __init__(self, system: System, logs: Path) -> None:
        self.system = system
        self.started = False
        self.term_s = _TERM_S
        self._logs = logs
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self, timeout_s: float) -> float:
        """Start all parts and wait until each is healthy; the seconds that took.

        Raises:
            SystemFailed: a process ended, or is not healthy in time; the rest is stopped.
        """
        began = time.monotonic()
        try:
            for number, part in enumerate(self.system.parts):
                await self._launch(number, part)
            async with asyncio.timeout(timeout_s):
                for part in self.system.parts:
                    await self._healthy(part)
        except TimeoutError as error:
            await self.stop()
            raise SystemFailed(
                f"{self.system.name} was not ready after {timeout_s:g} s; see {self._logs}"
            ) from error
        except BaseException:
            await self.stop()
            raise
        self.started = True
        return time.monotonic() - began

    def check(self) -> None:
        """Raises SystemFailed if a process has ended."""
        for number, process in enumerate(self._processes):
            if process.returncode is not None:
                raise SystemFailed(
                    f"{self.system.name}: process {number} ended with status"
                    f" {process.returncode}; see {self._log(number)}"
                )

    def pause(self) -> None:
        """Stop its processes where they are, so that they use no CPU time (SIGSTOP)."""
        for member in self.processes():
            with suppress(psutil.Error):
                member.suspend()

    async def resume(self, timeout_s: float) -> None:
        """Let them go on, and wait until all parts are healthy again.

        Raises:
            SystemFailed: one has ended, or is not healthy in time.
        """
        self._wake()
        try:
            async with asyncio.timeout(timeout_s):
                for part in self.system.parts:
                    await self._healthy(part)
        except TimeoutError as error:
            raise SystemFailed(f"{self.system.name} did not come back; see {self._logs}") from error

    def _wake(self) -> None:
        for member in self.processes():
            with suppress(psutil.Error):
                member.resume()

    def cpu_s(self) -> float:
        """CPU seconds of all its live processes so far, their children included."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    async def idle_cores(self, over_s: float) -> float:
        """How many cores it keeps busy while nobody asks for anything."""
        before, began = self.cpu_s(), time.monotonic()
        await asyncio.sleep(over_s)
        return max(0.0, self.cpu_s() - before) / (time.monotonic() - began)

    def resident_bytes(self) -> int:
        """Resident memory of all its processes (pages that two share count twice)."""
        total = 0
        for process in self.processes():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    async def stop(self) -> None:
        """End everything, the last part first; SIGKILL after a while. Idempotent."""
        self.started = False
        self._wake()  # a stopped process takes no SIGTERM
        family = self.processes()
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                if process.returncode is None:
                    process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.term_s):
                for process in self._processes:
                    await process.wait()
        for process in self._processes:
            with suppress(ProcessLookupError):  # the group outlives its leader
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        for member in family:  # those that made a session of their own
            with suppress(psutil.Error):
                member.kill()  # psutil checks that the pid is still the same process
        self._processes.clear()

    async def _launch(self, number: int, part: Part) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._log(number).open("ab") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *part.command,
                    env={**os.environ, **part.env},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches us alone; we end them in order
                )
            except OSError as error:
                raise SystemFailed(f"{self.system.name}: {part.command[0]}: {error}") from error
        self._processes.append(process)

    async def _healthy(self, part: Part) -> None:
        if part.health_url is None:
            return
        async with aiohttp.ClientSession() as session:
            while True:
                self.check()
                with suppress(aiohttp.ClientError, TimeoutError):
                    limit = aiohttp.ClientTimeout(total=5.0)
                    async with session.get(part.health_url, timeout=limit) as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(_LOOK_S)

    def processes(self) -> list[psutil.Process]:
        """All that it has started and that still live, their children included."""
        members: list[psutil.Process] = []
        for process in self._processes:
            with suppress(psutil.Error):
                leader = psutil.Process(process.pid)
                members += [leader, *leader.children(recursive=True)]
        return members

    def _log(self, number: int) -> Path:
        return self._logs / f"{self.system.name}-{number}.log"


def free_port() -> int:
    """A TCP port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
