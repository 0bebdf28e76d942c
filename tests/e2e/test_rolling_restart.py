"""SIGTERM and a new start for every worker of a plain cluster, under load: nobody notices."""

import asyncio
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.demo_model import ensure_demo_model
from cluster.ports import free_ports
from rpc.status import fetch_status
from tests.support.commands import CLUSTER_KEY, TIMEOUT_S, Command, healthy, wait_for
from tests.support.streams import Traffic, undisturbed, until, varied

CLIENTS = 8
ROLES = ("prefill", "decode")


class Cluster:
    """Two workers of each role at fixed ports, and a router."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = str(ensure_demo_model(folder / "demo"))
        self.ports = dict(zip([(r, i) for r in ROLES for i in (0, 1)], free_ports(4), strict=True))
        self.commands: list[Command] = []

    def run(self, *arguments: str) -> Command:
        self.commands.append(Command(self._folder / str(len(self.commands)), *arguments))
        return self.commands[-1]

    def worker(self, role: str, index: int, drain_s: float) -> Command:
        flags = f"--num-threads 1 --kv-memory 32MiB --drain-timeout {drain_s} --check-ledger"
        port = str(self.ports[role, index])
        return self.run("worker", role, self._model, *flags.split(), "--port", port)

    def router(self) -> str:
        addresses = []
        for role in ROLES:
            at = ",".join(f"127.0.0.1:{self.ports[role, index]}" for index in (0, 1))
            addresses += [f"--{role}", at]
        flags = "--served-model-name demo --reasoning-parser none --port 0"
        command = self.run("router", self._model, *addresses, *flags.split())
        return command.ready(r"^baton router ready url=(http://127\.0\.0\.1:\d+)$")

    def tell_where(self) -> None:
        """Print where each process is, and what it said."""
        for command in self.commands:
            command.process.send_signal(signal.SIGUSR1)
        time.sleep(2.0)  # not to be known otherwise
        for command in self.commands:
            print(command.output)

    async def until(self, true_of: Callable[[dict[str, object]], object], what: str) -> None:
        """Wait until it is true of every worker's status, one after the other."""
        for port in self.ports.values():
            status: dict[str, object] = {}
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    while not status or not true_of(status):
                        address = f"127.0.0.1:{port}"
                        status = await fetch_status(address, cluster_key=CLUSTER_KEY)
                        await asyncio.sleep(0.1)
            except TimeoutError:
                raise AssertionError(f"waited for {what}: {status}") from None


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for command in cluster.commands:
        command.close()


def replays(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    (count,) = [line.split()[1] for line in lines if line.startswith("baton:replays_total ")]
    return float(count)


@pytest.mark.timeout(600)
async def test_a_rolling_restart_fails_no_request(cluster: Cluster) -> None:
    # The first of each role does not wait for its streams, the second does.
    drains = (0.01, 60.0)
    workers = {(r, i): cluster.worker(r, i, drains[i]) for r in ROLES for i in (0, 1)}
    for worker in workers.values():
        worker.ready(r"^baton worker ready .* address=(\S+)")
    url = cluster.router()
    wait_for(lambda: healthy(url), "a healthy router")
    pool = varied(12, tokens=(60, 120))
    asking = asyncio.create_task(undisturbed(url, pool))
    if not (await asyncio.wait({asking}, timeout=TIMEOUT_S))[0]:
        cluster.tell_where()
    expected = await asking
    handed_over = 0.0
    async with Traffic(url, pool, clients=CLIENTS) as traffic:
        for index, drain_s in enumerate(drains):
            await until(lambda: len(traffic.running()) == CLIENTS, TIMEOUT_S, "streams to run")
            before = replays(url)
            for role in ROLES:
                workers[role, index].process.send_signal(signal.SIGTERM)
            for role in ROLES:
                code = await asyncio.to_thread(workers[role, index].process.wait, TIMEOUT_S)
                assert code == 0, workers[role, index].output
            handed_over = handed_over or replays(url) - before
            again = [cluster.worker(role, index, drain_s) for role in ROLES]
            for worker in again:
                await asyncio.to_thread(worker.ready, r"^baton worker ready .* address=(\S+)")
        await cluster.until(lambda status: status["steps"], "use of all workers")
    assert traffic.wrong(expected) == []
    assert handed_over > 0
    await cluster.until(
        lambda status: status["idle"] and status["balanced"] and not status["requests"],
        "all workers to be idle",
    )
