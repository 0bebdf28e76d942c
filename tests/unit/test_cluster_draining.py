"""Ending a worker: what runs may end, for a time, unless the engine is dead or somebody insists."""

import asyncio

import pytest

from cluster.draining import drain_while_alive
from cluster.plain import drain_until_signal
from contracts.errors import EngineFailure


class Worker:
    """Drains when told; the limit it was given is noted."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.alive = True
        self.limit_s = 0.0
        self.idle = asyncio.Event()

    def assert_pulse(self) -> None:
        if not self.alive:
            raise EngineFailure("no pulse")

    async def drain(self, timeout_s: float) -> None:
        self.told.set()
        self.limit_s = timeout_s
        await self.idle.wait()


async def test_it_waits_for_what_runs() -> None:
    worker = Worker()
    draining = asyncio.create_task(drain_while_alive(worker, 7.0))
    await worker.told.wait()
    assert not draining.done()
    worker.idle.set()
    await draining
    assert worker.limit_s == 7.0


async def test_a_dead_engine_is_not_waited_for() -> None:
    worker = Worker()
    worker.alive = False
    with pytest.raises(EngineFailure):
        await asyncio.wait_for(drain_while_alive(worker, 600.0), 30)
    assert worker.told.is_set()


async def test_a_second_signal_ends_the_wait() -> None:
    worker = Worker()
    signals: asyncio.Queue[None] = asyncio.Queue()
    draining = asyncio.create_task(drain_until_signal(worker, 600.0, signals))
    await worker.told.wait()
    assert not draining.done()
    signals.put_nowait(None)
    await asyncio.wait_for(draining, 30)


async def test_an_idle_worker_needs_no_second_signal() -> None:
    worker = Worker()
    worker.idle.set()
    signals: asyncio.Queue[None] = asyncio.Queue()
    await asyncio.wait_for(drain_until_signal(worker, 600.0, signals), 30)
    assert signals.empty()
