"""One run: traffic, a fault, and the checks that follow."""

import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.campaign import answers
from tests.faults.campaign.client import Client, Json, Reply
from tests.faults.campaign.cluster import DECODES, PREFILLS, ROUTERS, WORKERS, Cluster
from tests.faults.campaign.traffic import Question

DEADLINE_S = 30.0  # of all clients; beyond: a hang
SETTLE_S = 20.0  # until everything runs again
IDLE_S = 8.0  # then until nothing is held
BOUNDS_S = {"client": 1.0, "router": 2.0}  # from the end of who asked to the release of all
_MOST_CHARS = 2000  # of a failure
_traps = itertools.count(1)


@dataclass(eq=False)
class Asked:
    """A request of a run, and what may become of it: `exact`, `left` or `cut`."""

    question: Question
    client: Client
    router: str
    stream: bool
    expected: Json
    may: str = "exact"
    cut_at: float = 0.0
    task: "asyncio.Task[Reply] | None" = None

    @property
    def prefix(self) -> str:
        """How its ids begin at the workers."""
        return f"{self.client.label}-"

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.task is not None and self.task.done()


@dataclass(frozen=True)
class Release:
    """How long something was held after it should have been let go."""

    kind: str  # what ended, and in which window
    seconds: float
    bound_s: float


@dataclass
class Outcome:
    """What a run came to."""

    index: int
    fault: str = ""
    struck: bool = False  # the fault came at the moment it was meant for
    failures: list[str] = field(default_factory=list[str])
    results: Counter[str] = field(default_factory=Counter[str])
    served: Counter[str] = field(default_factory=Counter[str])
    releases: list[Release] = field(default_factory=list[Release])
    seconds: float = 0.0


class TrapSet:
    """A trap armed on several workers; the first that runs into it counts."""

    def __init__(self, cluster: Cluster, names: Sequence[str]) -> None:
        self.number = next(_traps)
        self.names = names
        self.at = ""
        self._cluster = cluster
        self._hit = asyncio.Event()
        cluster.listeners.append(self._heard)

    def _heard(self, name: str, kind: str, value: Any) -> None:
        if kind == "trap" and value == self.number and not self.at:
            self.at = name
            self._hit.set()

    async def hit(self, victim: Asked, timeout_s: float = 5.0) -> str:
        """Where it was hit; empty if the victim ended without."""
        assert victim.task is not None
        waiting = asyncio.create_task(self._hit.wait())
        await asyncio.wait(
            {waiting, victim.task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        return self.at

    async def open(self) -> None:
        """Let who is in it go on, and nobody else in."""
        self._cluster.listeners.remove(self._heard)
        await self._cluster.ask(self.names, "open_trap", number=self.number)


class Run:
    """What a fault works with."""

    def __init__(
        self,
        cluster: Cluster,
        pool: Sequence[Question],
        expected: dict[int, Json],
        seed: int,
        index: int,
    ) -> None:
        self.cluster = cluster
        self.pool = pool
        self.expected = expected
        self.index = index
        self.draws = random.Random(f"run {seed} {index}")
        self.outcome = Outcome(index)
        self.asked: list[Asked] = []
        self._spare = itertools.count(100)

    # -- traffic ----------------------------------------------------------------------------

    def choose(self, count: int) -> None:
        """Choose the run's requests; the first is the victim of targeted faults."""
        for number in range(count):
            question = self.draws.choice(self.pool)
            if number == 0:
                while question.kind == "beams" or question.body["max_tokens"] < 4:
                    question = self.draws.choice(self.pool)
            self.asked.append(self.make(question, f"{self.index}.{number}"))

    def make(
        self,
        question: Question,
        label: str = "",
        *,
        stream: bool | None = None,
        slow: bool = False,
    ) -> Asked:
        """A request that can be sent."""
        draws = self.draws
        label = label or f"{self.index}.{next(self._spare)}"
        if stream is None:
            stream = question.can_stream and draws.random() < 0.6
        salt = label if draws.random() < 0.6 else ""
        body = question.asked(stream=stream, salt=salt)
        router = draws.choice(ROUTERS)
        client = Client(self.cluster[router].port, question.path, body, label, slow=slow)
        return Asked(question, client, router, stream, self.expected[question.number])

    @property
    def victim(self) -> Asked:
        """The first request."""
        return self.asked[0]

    def send(self, asked: Asked, after_s: float = 0.0) -> None:
        """Send one."""

        async def work() -> Reply:
            await asyncio.sleep(after_s)
            return await asked.client.run()

        asked.task = asyncio.create_task(work(), name=asked.client.label)

    def start(self) -> None:
        """Send all that were chosen: the victim at once, the others around it."""
        for number, asked in enumerate(self.asked):
            if asked.task is None:
                self.send(asked, 0.0 if number == 0 else self.draws.uniform(0.0, 0.06))

    async def finish(self) -> None:
        """Wait for all clients.

        Raises:
            AssertionError: not in time.
        """
        tasks = [asked.task for asked in self.asked if asked.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=DEADLINE_S)
            if late:
                names = sorted(task.get_name() for task in late)
                raise AssertionError(f"no end of {names} after {DEADLINE_S:g} s")

    # -- traps ------------------------------------------------------------------------------

    async def arm(self, point: str, asked: Asked | None = None, skip: int = 0) -> TrapSet:
        """Arm a trap for a request (None: any of this run)."""
        trap = TrapSet(self.cluster, PREFILLS if point.startswith("p_") else DECODES)
        prefix = f"{self.index}." if asked is None else asked.prefix
        await self.cluster.ask(
            trap.names, "arm", number=trap.number, point=point, prefix=prefix, skip=skip
        )
        return trap

    async def holders(self, asked: Asked, names: Iterable[str] = WORKERS) -> list[str]:
        """Workers that have to do with a request now; also if their engine stands."""
        found = await self.cluster.ask(names, "serves", prefix=asked.prefix)
        return [name for name, requests in found.items() if requests]

    async def released(self, asked: Iterable[Asked], kind: str, what: str, since: float) -> None:
        """Measure how long it takes until no worker holds anything of these requests.

        The bound is stretched by the slowest look: that is how exact the measurement is.
        """
        prefixes = [one.prefix for one in asked]
        bound_s = BOUNDS_S[kind]
        slowest_s = 0.0
        found: dict[str, list[str]] = {}
        while time.monotonic() < since + bound_s + 5.0:
            asked_at = time.monotonic()
            found = await self.cluster.held(prefixes)
            now = time.monotonic()
            slowest_s = max(slowest_s, now - asked_at)
            if not found:
                self.outcome.releases.append(Release(f"{kind} {what}", now - since, bound_s))
                if now - since > bound_s + slowest_s:
                    self.fail(f"{kind} {what}: released after {now - since:.2f} s")
                return
            await asyncio.sleep(0.004)
        self.fail(f"{kind} {what}: still held: {found}")

    def fail(self, text: str) -> None:
        """Note a failure."""
        self.outcome.failures.append(text[:_MOST_CHARS])

    # -- checks -----------------------------------------------------------------------------

    def check(self) -> None:
        """Look at all answers."""
        for asked in self.asked:
            if asked.task is None:
                continue
            reply = asked.task.result()
            problem = self._problem(asked, reply)
            if problem:
                question = asked.question
                self.outcome.results["wrong"] += 1
                self.fail(
                    f"{asked.client.label} ({question.kind} {question.number},"
                    f" stream={asked.stream}, {asked.router}): {problem}"
                )

    def _problem(self, asked: Asked, reply: Reply) -> str:
        if asked.may != "exact" and not reply.complete:
            self.outcome.results[asked.may] += 1
            if asked.may == "cut" and reply.ended_at - asked.cut_at > BOUNDS_S["router"]:
                return f"the stream ended {reply.ended_at - asked.cut_at:.2f} s after its router"
            return _bad_beginning(asked, reply)
        try:
            found = answers.canonical(reply, stream=asked.stream)
        except answers.Wrong as wrong:
            return str(wrong)
        difference = answers.differences(asked.expected, found)
        if not difference:
            self.outcome.results["exact"] += 1
        return difference

    async def settle(self) -> None:
        """End the fault, wait until everything runs and nothing is held."""
        cluster = self.cluster
        for wire in cluster.wires:
            wire.heal()
        for name in WORKERS:
            if cluster[name].stopped:
                cluster[name].signal(signal.SIGCONT)
        await cluster.ask(WORKERS, "clear")
        await cluster.connected(SETTLE_S)
        await cluster.ask(WORKERS, "clear")
        await cluster.idle(IDLE_S)


def _bad_beginning(asked: Asked, reply: Reply) -> str:
    if not asked.stream or not reply.body:
        return ""
    events, _ = reply.events()
    try:
        return answers.is_start_of(asked.expected, answers.joined(events, partial=True))
    except answers.Wrong as wrong:
        return str(wrong)
