"""The run: traffic, pauses in which everything must become idle, samples all along."""

import asyncio
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from contracts.errors import ServingError
from rpc.status import fetch_status
from tests.soak.answers import Wrong
from tests.soak.client import Clients
from tests.soak.mix import LEASE_S, Mix
from tests.soak.processes import Cluster
from tests.soak.record import STATES, Record, Sample, SampleFile, WorkerState

IDLE_S = LEASE_S + 15.0  # a pause that takes longer is a leak
_SETTLE_S = 10.0  # for connections and threads on their way out
_FIRST_SETTLE_S = 1.0  # there is nothing to compare with
_POLL_S = 0.1


@dataclass(frozen=True)
class Settings:
    """Of one run."""

    duration_s: float
    seed: int = 1
    clients: int = 6  # requests at once, at most: no backlog can build up
    rate: float | None = None  # requests a second, at most
    period_s: float = 60.0  # from one idle point to the next
    requests: int | None = None  # the run ends with that many, even if there is time
    period_requests: int | None = None  # likewise the periods
    sample_s: float = 5.0
    num_references: int = 24
    progress_s: float = 2.0  # from one line to the next; 0: none


class Soak:
    """Drives one cluster. `stop` ends it early and well."""

    def __init__(self, cluster: Cluster, settings: Settings, file: SampleFile) -> None:
        self._cluster = cluster
        self._file = file
        self._settings = settings
        self._mix = Mix(settings.seed, num_references=settings.num_references)
        self._clients = Clients(cluster.url)
        self._next_index = 0
        self._next_at = 0.0
        self._began = time.monotonic()
        self._until = math.inf
        self._stopped = asyncio.Event()
        self._sampling = asyncio.Lock()
        self._settled: list[tuple[int, int]] = []
        self.record = Record()

    @property
    def elapsed_s(self) -> float:
        """Since the start, the reference questions included."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Send nothing more; the run ends as if its time were over."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    async def run(self) -> None:
        """All of it. Failures are counted, not raised."""
        self._began = time.monotonic()
        sampler = asyncio.create_task(self._sample_on(), name="samples")
        try:
            await self._learn()
            await self._idle_point()
            self._until = self.elapsed_s + self._settings.duration_s
            while not self._over:
                await self._traffic()
                await self._idle_point()
            await self._last_words()
        finally:
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)
            await self._clients.forget()

    @property
    def _over(self) -> bool:
        enough = self._next_index >= (self._settings.requests or math.inf)
        late = self.elapsed_s >= self._until
        return enough or late or self._stopped.is_set() or bool(self._cluster.dead())

    async def _learn(self) -> None:
        for number, question in enumerate(self._mix.references):
            if self._over:
                return
            try:
                await self._clients.learn(number, question)
            except (Wrong, aiohttp.ClientError, TimeoutError) as error:
                self.record.tally.fail(f"reference: {error}", request=question.fields)
                self._mix.forget_reference(number)

    # -- traffic ----------------------------------------------------------------------------

    async def _traffic(self) -> None:
        """Until the next pause is due; returns when every client has its answer or has left."""
        until = min(self.elapsed_s + self._settings.period_s, self._until)
        by_number = self._settings.period_requests  # then the pause may come at any moment
        last = self._next_index + by_number if by_number else math.inf
        self._next_at = self.elapsed_s

        async def client() -> None:
            while self.elapsed_s < until and await self._turn(until):
                if self._over or self._next_index >= last:
                    return
                room_s = 0.0 if by_number else until - self.elapsed_s
                plan = self._mix.plan(self._next_index, room_s=room_s)
                self._next_index += 1
                self.record.tally.take(plan, await self._clients.send(plan))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._settings.clients):
                tasks.create_task(client())

    async def _turn(self, until: float) -> bool:
        """Wait for this client's turn; false if the pause or the end comes first."""
        if self._settings.rate is None:
            return True
        self._next_at = max(self._next_at, self.elapsed_s - 1.0) + 1 / self._settings.rate
        if self._next_at >= until:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._next_at - self.elapsed_s)):
                await self._stopped.wait()
        return not self._stopped.is_set()

    # -- pauses -----------------------------------------------------------------------------

    async def _idle_point(self) -> None:
        """Wait until nothing is held anywhere, let connections end, sample."""
        began = time.monotonic()
        while True:
            workers, running = await self._look()
            if running == 0 and len(workers) == 2 and all(w.idle for w in workers.values()):
                break
            if time.monotonic() - began > IDLE_S or self._cluster.dead():
                told = f"router runs {running}, workers {workers}"
                self.record.tally.fail(f"not-idle: after {IDLE_S:.0f} s: {told}")
                break
            await asyncio.sleep(_POLL_S)
        self.record.idle_points.append((self.elapsed_s, time.monotonic() - began))
        await self._audit()
        async with self._sampling:  # whose connection would be counted
            await self._clients.forget()
            await self._settle()
            with suppress(psutil.Error):
                await self._sample(idle=True)

    async def _audit(self) -> None:
        """Let the workers look at every block themselves."""
        statuses = await self._statuses(audit=True)
        findings = [f"{role}: {one}" for role, s in statuses.items() for one in s["findings"]]
        if len(statuses) < len(self._cluster.addresses):
            findings.append(f"only {sorted(statuses)} answered")
        for finding in findings:
            self.record.tally.fail(f"audit: {finding}")

    async def _settle(self) -> None:
        """Until counts are what they were at the last idle point, or some time has passed."""
        deadline = time.monotonic() + (_SETTLE_S if self._settled else _FIRST_SETTLE_S)
        with suppress(psutil.Error):
            while True:
                counts = [(usage.fds, usage.threads) for usage in self._cluster.usage()]
                if counts == self._settled or time.monotonic() > deadline:
                    self._settled = counts
                    return
                await asyncio.sleep(_POLL_S)

    # -- what is seen -----------------------------------------------------------------------

    async def _sample_on(self) -> None:
        shown_at = 0.0
        while True:
            with suppress(psutil.Error):  # a dead process ends the run, elsewhere
                async with self._sampling:
                    await self._sample(idle=False)
                if self._settings.progress_s and time.monotonic() - shown_at > self._pace():
                    shown_at = time.monotonic()
                    self._show()
            await asyncio.sleep(self._settings.sample_s)

    async def _sample(self, *, idle: bool) -> None:
        usages = self._cluster.usage()  # first: to look takes connections
        workers, running = await self._look()
        tally = self.record.tally
        samples = [
            Sample(
                self.elapsed_s,
                idle,
                usage,
                workers.get(usage.process),
                running if usage.process == "router" else None,
                tally.done,
                tally.failures.total(),
            )
            for usage in usages
        ]
        self.record.samples += samples
        self._file.write(samples)

    async def _look(self) -> tuple[dict[str, WorkerState], int | None]:
        """The workers that answer, and how many requests are in the router."""
        statuses, running = await asyncio.gather(self._statuses(), self._running())
        return {name: _worker_state(status) for name, status in statuses.items()}, running

    async def _statuses(self, *, audit: bool = False) -> dict[str, dict[str, Any]]:
        async def ask(address: str) -> dict[str, Any] | None:
            with suppress(ServingError):
                return await fetch_status(
                    address, cluster_key=self._cluster.key, timeout_s=10.0, audit=audit
                )
            return None

        found = await asyncio.gather(*map(ask, self._cluster.addresses))
        statuses = {str(status["role"]): status for status in found if status is not None}
        self.record.workers |= statuses
        return statuses

    async def _running(self) -> int | None:
        with suppress(aiohttp.ClientError, TimeoutError):
            self.record.metrics = _counters(await self._clients.text("/metrics"))
            return int(self.record.metrics["vllm:num_requests_running"])
        return None

    async def _last_words(self) -> None:
        """What the whole run must not have seen."""
        tally = self.record.tally
        for name in self._cluster.dead():
            tally.fail(f"died: {name}")
        if faults := self.record.metrics.get("baton:token_faults_total", 0):
            tally.fail(f"token-faults: the router counts {faults:.0f}")

    def _pace(self) -> float:
        return self._settings.progress_s * (1 if sys.stderr.isatty() else 15)

    def _show(self) -> None:
        tally = self.record.tally
        memory = "  ".join(
            f"{usage.process} {usage.rss >> 20}" for usage in self._cluster.usage() if usage.rss
        )
        line = (
            f"{self.elapsed_s:6.0f} of {self._settings.duration_s:.0f} s  {tally.done} requests"
            f"  {tally.failures.total()} failures  RSS in MiB: {memory}"
        )
        ends = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
        print(ends[0] + line, end=ends[1], file=sys.stderr, flush=True)


def _worker_state(status: Mapping[str, Any]) -> WorkerState:
    ledger = status["ledger"]
    return WorkerState(
        {state: int(ledger[state]) for state in STATES},
        int(ledger["total"]),
        int(status["requests"]),
        int(status.get("transfers", 0)),
    )


def _counters(text: str) -> dict[str, float]:
    """Counters and gauges of the router; labels other than the model's are part of the name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type not in ("counter", "gauge"):
            continue
        for sample in family.samples:
            labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
            if not sample.name.endswith("_created"):
                found[" ".join([sample.name, *labels])] = sample.value
    return found
