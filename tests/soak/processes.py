"""A prefill worker, a decode worker and a router as ordinary processes, and what they use."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
# The `baton` command, which also ends if we are killed.
_BATON = """
import sys
from cluster.cli import main
from cluster.reaper import die_with_parent
die_with_parent()
sys.exit(main())
"""
START_S = 120.0
END_S = 60.0
_TROUBLE = re.compile(r"^Traceback|^\S+ \S+ (?:ERROR|CRITICAL) ", re.MULTILINE)


class NotStarted(Exception):
    """A process ended, or said nothing in time; the message has its output."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process uses now, or several together (a process's children)."""

    process: str
    processes: int
    rss: int  # bytes
    uss: int  # bytes; what no other process shares
    fds: int
    threads: int
    sockets: int


class Started:
    """One `baton ...` process, in a session of its own, so that Ctrl-C is ours alone."""

    def __init__(self, name: str, log: Path, environment: Mapping[str, str], *args: str) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BATON, *args],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._watched = psutil.Process(self.process.pid)

    def ready(self, pattern: str) -> str:
        """What the ready line says.

        Raises:
            NotStarted: there is none.
        """
        deadline = time.monotonic() + START_S
        while True:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            if found := re.search(pattern, text, re.MULTILINE):
                return found[1]
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise NotStarted(f"{self.name} did not start:\n{text[-2000:]}")
            time.sleep(0.05)

    def usage(self) -> list[Usage]:
        """The process, then its children together.

        Raises:
            psutil.Error: it has ended.
        """
        children = self._watched.children(recursive=True)
        return [
            _sum(self.name, [self._watched], strict=True),
            _sum(f"{self.name} children", children, strict=False),
        ]

    def troubles(self) -> list[str]:
        """Errors and tracebacks in the log, each with what follows it."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [text[found.start() :][:1000] for found in _TROUBLE.finditer(text)]

    def end(self) -> str:
        """Ask it to end, and see that it does. Returns what was wrong with that, or nothing."""
        if self.process.poll() is not None:
            return f"it had ended with {self.process.returncode}"
        self.process.terminate()
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"it did not end within {END_S:.0f} s"
        return "" if code == 0 else f"it ended with {code}"


class Cluster:
    """All processes of a run."""

    def __init__(
        self, started: Sequence[Started], url: str, addresses: Sequence[str], key: str
    ) -> None:
        self.started = tuple(started)
        self.url = url
        self.addresses = tuple(addresses)  # of the workers, prefill first
        self.key = key

    def usage(self) -> list[Usage]:
        """Of each process.

        Raises:
            psutil.Error: one has ended.
        """
        return [usage for started in self.started for usage in started.usage()]

    def dead(self) -> list[str]:
        """Names of processes that have ended."""
        return [one.name for one in self.started if one.process.poll() is not None]


@contextmanager
def cluster(
    model: Path, logs: Path, *, worker: Sequence[str] = (), router: Sequence[str] = ()
) -> Iterator[Cluster]:
    """Start P, D and router on free ports; whatever happens, they are gone afterwards.

    Raises:
        NotStarted: one of them did not.
    """
    key = secrets.token_hex(16)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")}
    environment |= {"BATON_CLUSTER_KEY": key, "BATON_LOG_LEVEL": "WARNING"}
    started: list[Started] = []

    def start(name: str, *args: str) -> Started:
        started.append(Started(name, logs / f"{name}.log", environment, *args))
        return started[-1]

    logs.mkdir(parents=True, exist_ok=True)
    try:
        drain = ("--drain-timeout", "5")
        flags = ("--num-threads", "1", *drain, *worker)
        workers = [start(role, "worker", role, str(model), *flags) for role in _ROLES]
        line = r"^baton worker ready role=\w+ address=(\S+) "
        addresses = [one.ready(line) for one in workers]
        where = ("--prefill", addresses[0], "--decode", addresses[1])
        front = start("router", "router", str(model), *where, "--port", "0", *drain, *router)
        url = front.ready(r"^baton router ready url=(\S+)$")
        yield Cluster(started, url, addresses, key)
    finally:
        for one in started:
            if one.process.poll() is None:
                with suppress(ProcessLookupError):
                    one.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        for one in started:
            try:
                one.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


_ROLES = ("prefill", "decode")


def _sum(name: str, processes: Sequence[psutil.Process], *, strict: bool) -> Usage:
    found: list[tuple[int, int, int, int, int]] = []
    for process in processes:
        try:
            memory = process.memory_full_info()
            sockets = len(process.net_connections(kind="all"))
            counts = (process.num_fds(), process.num_threads(), sockets)
        except psutil.Error:
            if strict:
                raise
            continue
        found.append((memory.rss, memory.uss, *counts))
    columns = list(zip(*found, strict=True)) or [()] * 5
    rss, uss, fds, threads, sockets = (sum(column) for column in columns)
    return Usage(name, len(found), rss, uss, fds, threads, sockets)
