"""The open loop on a clock of its own: no second passes here."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from benchmarks.client import Recording
from benchmarks.metrics import Phase
from benchmarks.open_loop import OpenLoop
from benchmarks.schedule import PlannedRequest

ORIGIN = 1000.0


def arrivals(window: int, gap_s: float = 1.0, warmup: int = 0) -> Iterator[PlannedRequest]:
    """`warmup` requests, then `window` measured ones, then a tail without end."""
    for index in count():
        phase = (
            Phase.WARMUP
            if index < warmup
            else Phase.WINDOW
            if index < warmup + window
            else Phase.TAIL
        )
        yield PlannedRequest(index, phase, (index - warmup) * gap_s, 1, b"")


@dataclass
class Bench:
    """A clock that moves when somebody sleeps, and a server that answers when told to."""

    overshoot_s: float = 0.0
    now_s: float = ORIGIN - 10.0
    sent: list[Recording] = field(default_factory=list[Recording])
    most_in_flight: int = 0
    in_flight: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0
    slept: asyncio.Condition = field(default_factory=asyncio.Condition)

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.overshoot_s
        async with self.slept:
            self.slept.notify_all()
        await asyncio.sleep(0)

    async def send(self, recording: Recording, origin: float) -> None:
        recording.sent_s = self.now_s - origin
        self.sent.append(recording)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.gate.wait()
            recording.finished = True
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
            recording.end_s = self.now_s - origin

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; looked at after each sleep of the clock."""
        async with self.slept:
            await self.slept.wait_for(condition)


async def test_a_late_client_does_not_shift_later_deadlines() -> None:
    bench = Bench(overshoot_s=0.3)
    loop = OpenLoop(bench.send, bench.clock, bench.sleep)
    bench.gate.set()
    assert await loop.run(arrivals(50), ORIGIN, asyncio.Event())
    window = [record for record in loop.records() if record.phase is Phase.WINDOW]
    assert [record.intended_s for record in window] == [float(index) for index in range(50)]
    lags = [record.send_lag_s for record in window]
    assert all(lag is not None and 0.0 <= lag <= 0.3 + 1e-9 for lag in lags)


async def test_a_stuck_server_does_not_stop_the_arrivals_and_the_tail_goes_on() -> None:
    bench = Bench()
    loop = OpenLoop(bench.send, bench.clock, bench.sleep)
    run = asyncio.create_task(loop.run(arrivals(5, warmup=2), ORIGIN, asyncio.Event()))
    await bench.until(lambda: len(bench.sent) >= 5 + 2 + 20)  # none has been answered
    assert not run.done()
    bench.gate.set()
    assert await run
    phases = [record.phase for record in loop.records()]
    assert phases.count(Phase.WARMUP) == 2
    assert phases.count(Phase.WINDOW) == 5
    assert phases.count(Phase.TAIL) >= 20
    assert loop.in_flight == 0


async def test_stop_cancels_what_runs_and_keeps_it_on_record() -> None:
    bench = Bench()
    loop = OpenLoop(bench.send, bench.clock, bench.sleep)
    stop = asyncio.Event()
    run = asyncio.create_task(loop.run(arrivals(1000), ORIGIN, stop))
    await bench.until(lambda: len(bench.sent) >= 10)
    stop.set()
    assert not await run
    records = loop.records()
    assert len(records) >= 10
    assert bench.cancelled == len(bench.sent)
    assert {record.error for record in records} == {"unfinished"}
    assert all(record.end_s is not None for record in records)


async def test_stop_during_a_long_wait_does_not_wait() -> None:
    bench = Bench()
    loop = OpenLoop(bench.send, bench.clock)  # the real sleep: an hour until the first request
    stop = asyncio.Event()
    stop.set()
    assert not await loop.run(arrivals(3), ORIGIN + 3600.0, stop)
    assert loop.records() == []


async def test_the_cap_holds_and_its_wait_counts_as_latency() -> None:
    bench = Bench()
    loop = OpenLoop(bench.send, bench.clock, bench.sleep, max_in_flight=3)
    run = asyncio.create_task(loop.run(arrivals(6), ORIGIN, asyncio.Event()))
    await bench.until(lambda: len(loop.recordings) >= 10)
    assert len(bench.sent) == 3
    bench.gate.set()
    assert await run
    assert bench.most_in_flight == 3
    fourth = loop.records()[3]
    assert fourth.intended_s == 3.0
    assert fourth.send_lag_s is not None
    assert fourth.send_lag_s >= 6.0  # it waited until the gate opened, at the tenth arrival
