import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from contracts.events import Adopted, PathTaken, WorkerEvent, WorkerLoad
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerAddress
from router.placement import Need
from router.workers import WorkerPool
from tests.support.fake_worker import FakeCluster, FakeWorker, until
from tests.support.static_directory import StaticDirectory

REQUEST = GenerationRequest(RequestId("r"), (1, 2, 3), SamplingParams(max_tokens=2))


def fake(name: str) -> FakeWorker:
    role = Role.PREFILL if name[0] == "p" else Role.DECODE
    return FakeWorker(WorkerId(name), role, lambda request, choice: [5])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def pool_of(cluster: FakeCluster, clock: Clock | None = None) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(
        cluster, cluster.open_session, router_id="r", cluster_key="k", clock=clock or Clock()
    )
    pool.start()
    try:
        yield pool
    finally:
        await pool.close()


class Recorder:
    def __init__(self) -> None:
        self.events: list[WorkerEvent] = []
        self.lost: list[str] = []
        self.drained: list[bool] = []

    def on_event(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        self.events.append(event)

    def on_worker_lost(self, worker_id: WorkerId, *, drained: bool) -> None:
        self.lost.append(worker_id)
        self.drained.append(drained)


async def test_connects_to_all_and_says_who_is_able() -> None:
    p, d = fake("p"), fake("d")
    d.max_model_len = 77
    async with pool_of(FakeCluster(p, d)) as pool:
        await until(lambda: len(pool.snapshot()) == 2)
        assert pool.able(Role.PREFILL)
        assert pool.able(Role.DECODE)
        assert pool.max_model_len == 77
        d.session.report(WorkerLoad(running=3, draining=True))
        assert not pool.able(Role.DECODE)
        assert {w.worker_id: w.load.running for w in pool.snapshot()} == {"p": 0, "d": 3}
    assert p.session.lost
    assert d.session.lost
    assert pool.snapshot() == ()


async def test_a_static_directory_is_enough() -> None:
    d = fake("d")
    cluster = FakeCluster(d)
    pool = WorkerPool(
        StaticDirectory([d.address]), cluster.open_session, router_id="r", cluster_key="k"
    )
    pool.start()
    await until(lambda: pool.able(Role.DECODE))
    d.session.lose()
    await until(lambda: len(d.sessions) == 2)
    await pool.close()


async def test_a_lost_session_is_told_once_and_opened_again_under_a_new_epoch() -> None:
    d = fake("d")
    cluster = FakeCluster(d)
    async with pool_of(cluster) as pool:
        await until(pool.snapshot)
        recorder = Recorder()
        pool.register(RequestId("r"), recorder)
        d.session.lose("broken")
        assert recorder.lost == ["d"]
        assert pool.snapshot() == ()
        await until(pool.snapshot)
        assert recorder.lost == ["d"]
        assert cluster.epochs == [1, 2]


async def test_tries_again_while_a_worker_is_down() -> None:
    d = fake("d")
    d.down = True
    async with pool_of(FakeCluster(d)) as pool:
        await pool.changed(0.01)
        assert pool.snapshot() == ()
        d.down = False
        await until(pool.snapshot)


async def test_a_new_incarnation_replaces_the_old() -> None:
    d = fake("d")
    cluster = FakeCluster(d)
    async with pool_of(cluster) as pool:
        await until(pool.snapshot)
        old = d.session
        cluster.list(WorkerAddress(d.worker_id, d.role, "elsewhere", Incarnation(2)))
        await until(lambda: len(d.sessions) == 2 and pool.snapshot())
        assert old.lost
        assert not d.session.lost


async def test_a_worker_that_leaves_the_list_keeps_its_session_while_that_lives() -> None:
    d = fake("d")
    cluster = FakeCluster(d)
    async with pool_of(cluster) as pool:
        await until(pool.snapshot)
        cluster.list()
        await pool.changed(0.02)
        assert pool.able(Role.DECODE)
        cluster.list(d.address)  # a registry that had restarted empty
        await pool.changed(0.02)
        assert len(d.sessions) == 1
        cluster.list()
        await pool.changed(0.02)
        d.session.lose()
        await pool.changed(0.2)
        assert len(d.sessions) == 1


async def test_a_failing_directory_leaves_the_last_list_in_force() -> None:
    d = fake("d")

    class Failing:
        def __init__(self) -> None:
            self.asked = 0

        async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
            self.asked += 1
            yield (d.address,)
            raise OSError("registry gone")

    directory = Failing()
    pool = WorkerPool(directory, FakeCluster(d).open_session, router_id="r", cluster_key="k")
    pool.start()
    await until(lambda: directory.asked == 2)
    assert len(d.sessions) == 1
    assert pool.able(Role.DECODE)
    await pool.close()


async def test_events_go_to_their_request_and_late_ones_nowhere() -> None:
    d = fake("d")
    async with pool_of(FakeCluster(d)) as pool:
        await until(pool.snapshot)
        recorder = Recorder()
        pool.register(RequestId("r"), recorder)
        event = Adopted(RequestId("r"), 0, True)
        d.session.send(event, Adopted(RequestId("other"), 0, True))
        assert recorder.events == [event]
        pool.unregister(RequestId("r"))
        d.session.send(event)
        assert recorder.events == [event]


async def test_counts_what_it_sent_until_the_worker_can_have_reported_it() -> None:
    d = fake("d")
    d.pause_at = 0
    clock = Clock()
    async with pool_of(FakeCluster(d), clock) as pool:

        def unreported() -> tuple[int, int]:
            (worker,) = pool.snapshot()
            return worker.unreported, worker.unreported_tokens

        await until(pool.snapshot)
        pool.expect(d.worker_id, RequestId("e"), Need(prompt_tokens=100, max_tokens=2))
        assert unreported() == (1, 0)
        clock.now += 1000
        d.session.report(WorkerLoad())  # the handoff was not offered yet, whatever the time
        assert unreported() == (1, 0)
        pool.unregister(RequestId("e"))
        assert unreported() == (0, 0)

        pool.submit(d.worker_id, REQUEST, handoff=False)
        assert unreported() == (1, 3)
        clock.now += 0.01
        d.session.report(WorkerLoad())  # may have crossed the request on its way
        assert unreported() == (1, 3)
        clock.now += 1
        d.session.report(WorkerLoad(waiting=1))
        assert unreported() == (0, 0)

        pool.submit(d.worker_id, REQUEST, handoff=False)
        d.session.send(Adopted(REQUEST.request_id, 0, True))  # it speaks, so it knows
        assert unreported() == (0, 0)
        pool.abort(d.worker_id, REQUEST.request_id, 0)


async def test_a_promise_holds_from_the_choice_to_the_handoffs_end() -> None:
    d = fake("d")
    d.pause_at = 0
    need = Need(prompt_tokens=100, max_tokens=2, num_choices=2)
    async with pool_of(FakeCluster(d)) as pool:
        await until(pool.snapshot)

        def promised() -> int:
            return pool.snapshot()[0].promised_blocks

        first, second = RequestId("1"), RequestId("2")
        pool.expect(d.worker_id, first, need)
        pool.adopt(d.worker_id, replace(REQUEST, request_id=second), "{}", need)
        assert promised() == 2 * 8
        d.session.send(Adopted(second, 0, True))
        assert promised() == 2 * 8
        d.session.send(PathTaken(second, 0, "remote"))  # it has its blocks
        assert promised() == 8
        pool.forget(d.worker_id, first)
        assert promised() == 0


async def test_a_refusal_is_believed_until_something_ends_there_or_a_second_has_passed() -> None:
    d = fake("d")
    clock = Clock()
    async with pool_of(FakeCluster(d), clock) as pool:
        await until(pool.snapshot)
        need = Need(prompt_tokens=1, max_tokens=2)

        def refuse(load: WorkerLoad) -> None:
            pool.expect(d.worker_id, REQUEST.request_id, need)
            d.session.send(Adopted(REQUEST.request_id, 0, False, "full"))
            d.session.report(load)  # of the same frame: what it was like when it refused

        def refuses() -> bool:
            return pool.snapshot()[0].refuses

        refuse(WorkerLoad(waiting=3, free_blocks=5))
        assert refuses()
        assert pool.snapshot()[0].promised_blocks == 0
        d.session.report(WorkerLoad(waiting=4, free_blocks=5))
        assert refuses()
        changed = asyncio.create_task(pool.changed(20))
        await asyncio.sleep(0)
        d.session.report(WorkerLoad(waiting=2, free_blocks=5))
        assert not refuses()
        await changed  # who waits for room hears of it
        refuse(WorkerLoad(waiting=3, free_blocks=5))
        clock.now += 1
        d.session.report(WorkerLoad(waiting=3, free_blocks=5))
        assert not refuses()


async def test_a_session_that_breaks_while_its_worker_drains_was_expected_to() -> None:
    d1, d2 = fake("d1"), fake("d2")
    broken: list[Role] = []
    cluster = FakeCluster(d1, d2)
    pool = WorkerPool(
        cluster, cluster.open_session, router_id="r", cluster_key="k", on_broken=broken.append
    )
    pool.start()
    await until(lambda: len(pool.snapshot()) == 2)
    recorder = Recorder()
    pool.register(RequestId("r"), recorder)
    d1.drain()
    d1.session.lose()
    d2.session.lose()
    assert (recorder.lost, recorder.drained) == (["d1", "d2"], [True, False])
    await until(lambda: len(pool.snapshot()) == 2)
    await pool.close()
    assert recorder.drained[2:] == [True, True]
    assert broken == [Role.DECODE] * 2  # those that it closed itself are not


async def test_workers_that_are_gone_leave_nothing_behind() -> None:
    """Under Serve, each restart of a worker is a new name."""
    workers = [fake(f"d{number}") for number in range(5)]
    cluster = FakeCluster(*workers)
    async with pool_of(cluster) as pool:
        for worker in workers:
            cluster.list(worker.address)
            await until(lambda worker=worker: worker.sessions)  # type: ignore[misc]
        cluster.list()
        await until(lambda: not pool._addresses)
        for worker in workers:
            worker.session.lose()
        await until(lambda: not pool._keepers)
        assert pool.snapshot() == ()


async def test_closing_does_not_wait_for_a_session_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.workers._CLOSE_TIMEOUT_S", 0.05)
    d = fake("d")
    release = asyncio.Event()
    cluster = FakeCluster(d)
    pool = WorkerPool(cluster, cluster.open_session, router_id="r", cluster_key="k")
    pool.start()
    await until(pool.snapshot)
    d.session.close = release.wait  # type: ignore[method-assign,assignment]
    await pool.close()
    assert "1 sessions did not end" in caplog.text
    release.set()
