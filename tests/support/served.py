"""`baton serve` as a person runs it: real Ray, Serve, HAProxy, router and workers."""

import asyncio
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from cluster.launch_plan import read_plan
from cluster.resolve import ResolvedCluster
from contracts.errors import ServingError
from rpc.status import fetch_status

START_S = 120.0
END_S = 30.0
# In a folder of its own and with other people's settings out of reach.
IGNORED = ("BATON_", "RAY_")


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


class Served:
    """One `baton serve`."""

    app_name = "baton"

    def __init__(self, folder: Path, *flags: str, model: tuple[str, ...] = ()) -> None:
        # Not in `folder`: the paths of sockets must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
        self._output = folder / "output"
        arguments = model or ("--demo", "--demo-dir", str(folder / "demo"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(IGNORED)}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", *arguments, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | {"TMPDIR": str(self.temporary)},
            )

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def wait_until_ready(self) -> str:
        def told() -> bool:
            return "baton ready" in self.output or self.process.poll() is not None

        wait_for(told, START_S, "the ready line")
        found = re.search(r"^baton ready url=(\S+) ", self.output, re.MULTILINE)
        assert found is not None, self.output
        return found[1]

    def family(self) -> list[psutil.Process]:
        """Every process below the command, all at once."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def named(self, part: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self.family():
            try:
                if part in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    @cached_property
    def cluster(self) -> ResolvedCluster:
        """What the command resolved its flags to; it holds the cluster key."""
        (folder,) = self.temporary.glob("baton-*")
        return read_plan(folder)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment that serve or start."""
        found = self.named(f"ray::ServeReplica:{self.app_name}:{deployment}")
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def redeploy(self) -> "subprocess.Popen[bytes]":
        """Begin to replace every replica, as Serve does it."""
        (folder,) = self.temporary.glob("baton-*")
        (raylet,) = self.named("raylet/raylet")
        (gcs,) = (a for a in raylet.cmdline() if a.startswith("--gcs-address="))
        (controller,) = self.named("ray::ServeController")
        command = [sys.executable, "-m", "tests.support.redeploy", str(folder)]
        return subprocess.Popen(
            [*command, gcs.removeprefix("--gcs-address=")], env=controller.environ()
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(END_S)
        shutil.rmtree(self.temporary, ignore_errors=True)


def listening(processes: list[psutil.Process]) -> set[int]:
    """TCP ports that these processes listen on."""
    ports: set[int] = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        ports |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return ports


def all_listening() -> set[int]:
    return {
        c.laddr.port
        for c in psutil.net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr
    }


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


async def status_of(process: psutil.Process, cluster_key: str) -> dict[str, Any] | None:
    """A worker's status, found by what its process listens on; None if it has none (yet)."""
    for port in sorted(listening([process])):
        with suppress(ServingError):
            return await fetch_status(f"127.0.0.1:{port}", cluster_key=cluster_key, timeout_s=2.0)
    return None


def ingress_of(process: psutil.Process) -> str | None:
    """The URL of a router replica itself, behind HAProxy; None if it does not answer (yet)."""
    for port in sorted(listening([process])):
        url = f"http://127.0.0.1:{port}"
        with (
            suppress(OSError, ValueError, http.client.HTTPException),
            urllib.request.urlopen(f"{url}/load", timeout=2) as answer,
        ):
            if "server_load" in json.loads(answer.read()):
                return url
    return None


async def statuses(served: Served, deployment: str) -> dict[int, dict[str, Any]]:
    """The status of each worker that answers, by process id."""
    key = served.cluster.cluster_key
    found: dict[int, dict[str, Any]] = {}
    for process in await asyncio.to_thread(served.replicas, deployment):
        status = await status_of(process, key)
        if status is not None:
            found[process.pid] = status
    return found


async def until_idle(served: Served, workers: int = 4) -> None:
    """Wait until that many workers live, hold nothing and their ledgers add up."""
    held: dict[str, Any] = {}
    try:
        async with asyncio.timeout(START_S):
            while True:
                held = {r: await statuses(served, r) for r in ("PrefillWorker", "DecodeWorker")}
                found = [status for by_pid in held.values() for status in by_pid.values()]
                idle = [s["idle"] and s["balanced"] and not s["requests"] for s in found]
                if len(idle) == workers and all(idle):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not idle: {held}") from None
