"""A request among workers that are restarted, killed or full: it waits, moves, or is told why."""

import asyncio
from pathlib import Path

import pytest

from contracts.errors import EngineFailure, Overloaded, Unavailable
from contracts.events import WorkerLoad
from contracts.ids import WorkerId
from contracts.request import GenerationRequest
from router.two_step import Step, Transfer
from tests.support.fake_worker import FakeWorker, until
from tests.support.router_request import (
    LENGTH,
    TEXT,
    Router,
    Run,
    fake,
    nothing_left,
    router,
    script,
)

# Draining


@pytest.mark.parametrize("aggregated", [True, False], ids=["local", "remote"])
async def test_refusals_by_draining_workers_are_not_counted(
    tmp_path: Path, aggregated: bool
) -> None:
    """All but the last worker of each kind have begun to drain, and nobody has heard of it yet."""
    names = [f"d{i}" for i in range(6)]
    if not aggregated:
        names += [f"p{i}" for i in range(6)]
    workers = [fake(name) for name in names]
    for worker in workers:
        worker.draining = worker.worker_id[1] != "5"
    async with router(tmp_path, *workers, aggregated=aggregated) as r:
        run = await r.start().rest()
        await until(lambda: nothing_left(*workers))
    assert run.text() == TEXT + "0"
    assert run.generation.usage.completion_tokens == LENGTH


async def test_every_worker_is_restarted_under_a_stream(tmp_path: Path) -> None:
    """Ten times the worker that runs it drains and then ends; each time the next one goes on."""
    workers = [fake("d0"), fake("d1")]
    for worker in workers:
        worker.pause_at = 1
    async with router(tmp_path, *workers, aggregated=True) as r:
        run = r.start(n=2)
        for position in range(1, 11):
            await until(lambda: any(w.running and w.paused.is_set() for w in workers))
            (busy,) = [w for w in workers if w.running]
            for worker in workers:
                worker.pause_at = position + 1
                worker.paused.clear()
            busy.drain()
            busy.restart()
            await until(lambda: len(r.pool.snapshot()) == 2)
        for worker in workers:
            worker.resume()
        await run.rest()
        assert r.count("baton:replays_total") == 10
    for choice in range(2):
        assert run.text(choice) == TEXT + str(choice)
        assert run.tokens(choice) == list(script(workers[0].submitted[0][0], choice))
    assert run.generation.usage.completion_tokens == 2 * LENGTH


async def test_a_request_waits_for_the_only_worker_to_come_back(tmp_path: Path) -> None:
    d = fake("d")
    d.draining = True
    async with router(tmp_path, d, aggregated=True, worker_wait_s=5.0) as r:
        run = r.start()
        await until(lambda: d.submitted)
        await until(lambda: not r.pool.able(d.role))
        d.restart()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert len(d.submitted) == 2


async def test_a_stream_waits_longer_than_a_request(tmp_path: Path) -> None:
    d, p = fake("d"), fake("p")
    d.pause_at = 4
    async with router(tmp_path, p, d, aggregated=True, worker_wait_s=0.01, replay_wait_s=10.0) as r:
        stream = r.start()
        await until(lambda: d.paused.is_set())
        d.down, d.pause_at = True, None
        d.session.lose()
        with pytest.raises(Unavailable):
            await r.start().rest()
        d.down = False
        await stream.rest()
    assert stream.text() == TEXT + "0"


async def test_a_stream_that_nobody_can_take_ends(tmp_path: Path) -> None:
    d = fake("d")
    d.pause_at = 4
    async with router(tmp_path, d, aggregated=True, replay_wait_s=0.05) as r:
        run = r.start()
        await until(lambda: d.paused.is_set())
        d.down = True
        d.session.lose()
        with pytest.raises(Unavailable):
            await run.rest()
    assert len(run.tokens()) == 4


async def test_where_all_decode_workers_drain_the_remote_path_is_not_given_up(
    tmp_path: Path,
) -> None:
    p, d = fake("p"), fake("d")
    d.draining = True
    async with router(tmp_path, p, d, worker_wait_s=5.0) as r:
        run = r.start()
        await until(lambda: d.adopted)
        await until(lambda: not r.pool.able(d.role))
        d.restart()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert not d.submitted
    assert len(d.adopted) == 2


# Lost workers


async def test_a_request_that_kills_all_workers_is_given_up(tmp_path: Path) -> None:
    workers = [fake(f"d{i}") for i in range(3)]
    for worker in workers:
        worker.pause_at = 2
    async with router(tmp_path, *workers, aggregated=True, max_lost_workers=4) as r:
        run = r.start()
        for _ in range(5):
            await until(lambda: any(w.running and w.paused.is_set() for w in workers))
            (busy,) = [w for w in workers if w.running]
            busy.paused.clear()
            busy.restart()
        with pytest.raises(Unavailable):
            await run.rest()
        assert nothing_left(*workers)
    assert sum(len(w.submitted) for w in workers) == 5


async def test_a_new_incarnation_is_not_the_worker_that_failed(tmp_path: Path) -> None:
    d = fake("d")
    d.fail_kind = "EngineFailure"
    async with router(tmp_path, d, aggregated=True) as r:
        submit = d.session.submit

        def dying(request: GenerationRequest, *, handoff: bool) -> None:
            submit(request, handoff=handoff)
            d.session.report(WorkerLoad(draining=True))  # as a worker whose engine is dead

        d.session.submit = dying  # type: ignore[method-assign]
        run = r.start()
        await until(lambda: d.submitted and nothing_left(d))
        d.fail_kind = ""
        d.restart()
        await run.rest()
    assert run.text() == TEXT + "0"


async def test_both_of_a_pair_are_lost(tmp_path: Path) -> None:
    p1, p2, d1, d2 = (fake(name) for name in ("p1", "p2", "d1", "d2"))
    p1.pause_at = 0
    d1.pause_at = 0
    async with router(tmp_path, p1, p2, d1, d2) as r:
        run = r.start()
        await until(lambda: p1.paused.is_set() and d1.paused.is_set())
        for worker in (p1, d1):
            worker.down = True
            worker.session.lose()
        await run.rest()
        await until(lambda: nothing_left(p1, p2, d1, d2))
    assert run.text() == TEXT + "0"
    assert len(d2.adopted) == 1


async def test_a_decode_worker_lost_before_it_was_asked_is_replaced(tmp_path: Path) -> None:
    p, d1, d2 = fake("p"), fake("d1"), fake("d2")
    p.pause_at = -1
    async with router(tmp_path, p, d1, d2) as r:
        run = r.start()
        await until(lambda: p.paused.is_set())
        d1.down = True
        d1.session.lose()
        p.resume()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert (len(p.submitted), len(d2.adopted)) == (1, 1)


async def test_a_decode_worker_lost_before_it_answered_costs_a_new_attempt(tmp_path: Path) -> None:
    p, d1, d2 = fake("p"), fake("d1"), fake("d2")
    p.pause_at = 0
    async with router(tmp_path, p, d1, d2) as r:

        def silent(request: GenerationRequest, kv_transfer_params: str) -> None:
            d1.adopted.append((request, kv_transfer_params))

        d1.session.adopt = silent  # type: ignore[method-assign]
        run = r.start()
        await until(lambda: d1.adopted)
        d1.down = True
        d1.session.lose()
        await until(lambda: len(p.submitted) == 2)
        p.resume()
        await run.rest()
        await until(lambda: nothing_left(p, d2))
    assert run.text() == TEXT + "0"
    assert p.aborted == [(run.request_id, 0)]


async def test_a_transfer_is_not_brought_to_a_second_decode_worker(tmp_path: Path) -> None:
    """The first one may have claimed it; the second would be told that it is used."""
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 0
    given = Transfer(Step.ADOPT, "{}", "hash", cached_tokens=3)
    async with router(tmp_path, d1, d2) as r:
        run = r.start(transfer=given)
        await until(lambda: d1.paused.is_set())
        d1.down = True
        d1.session.lose()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert run.generation.usage.cached_tokens == 3
    assert (len(d1.adopted), len(d2.adopted), len(d2.submitted)) == (1, 0, 1)


# Full workers


async def test_all_full_before_the_first_token_is_told_at_once(tmp_path: Path) -> None:
    workers = [fake(f"d{i}") for i in range(5)]
    for worker in workers:
        worker.fail_kind = "Overloaded"
    async with router(tmp_path, *workers, aggregated=True, worker_wait_s=30.0) as r:
        with pytest.raises(Overloaded):
            await r.start().rest()
    assert [len(w.submitted) for w in workers] == [1] * 5


async def test_a_stream_asks_a_full_worker_again(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 3
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start()
        await until(lambda: d1.paused.is_set())
        d2.fail_kind = "Overloaded"
        d1.down = True
        d1.session.lose()
        await until(lambda: len(d2.submitted) == 2)
        d2.fail_kind = ""
        await run.rest()
    assert run.text() == TEXT + "0"


async def test_an_error_of_the_only_able_worker_is_not_waited_for(tmp_path: Path) -> None:
    d = fake("d")
    d.fail_kind_at = 3
    async with router(tmp_path, d, aggregated=True, replay_wait_s=60.0) as r:
        with pytest.raises(EngineFailure):
            await r.start().rest()


# Back-pressure: what no D has room for is not computed


def small(name: str, blocks: int) -> FakeWorker:
    worker = fake(name)
    worker.total_blocks = blocks
    return worker


async def held_back(r: Router, p: FakeWorker, d: FakeWorker) -> tuple[Run, Run, Run]:
    """Three requests of which one fits D at a time; the first is in P's queue."""
    p.pause_at = -1
    runs = r.start(), r.start(), r.start()
    await until(lambda: p.paused.is_set())
    await until(lambda: r.pool.line.locked())
    assert len(p.submitted) == 1
    return runs


async def test_prompts_that_no_decode_worker_has_room_for_are_held_back(tmp_path: Path) -> None:
    p, d = fake("p"), small("d", 1)
    async with router(tmp_path, p, d) as r:
        runs = await held_back(r, p, d)
        p.resume()
        for run in runs:
            await run.rest()
            assert run.text() == TEXT + "0"
        assert r.pool.snapshot()[1].promised_blocks == 0
    assert [q.request_id for q, _ in p.submitted] == [run.request_id for run in runs]  # in order
    assert len(d.adopted) == 3
    assert not d.submitted


async def test_who_was_held_back_for_long_is_told_to_come_again(tmp_path: Path) -> None:
    p, d = fake("p"), small("d", 1)
    async with router(tmp_path, p, d, queue_wait_s=0.05) as r:
        first, second, third = await held_back(r, p, d)
        for run in (second, third):
            with pytest.raises(Overloaded, match="every decode worker is full"):
                await run.rest()
        assert len(p.submitted) == 1
        p.resume()
        await first.rest()
    assert first.text() == TEXT + "0"


async def test_a_client_that_leaves_the_line_lets_the_next_one_go(tmp_path: Path) -> None:
    p, d = fake("p"), small("d", 1)
    async with router(tmp_path, p, d) as r:
        first, second, third = await held_back(r, p, d)
        await second.generation.aclose()
        await first.generation.aclose()  # queued on P: the promise is gone with it
        p.resume()
        await third.rest()
        assert not r.pool.line.locked()
    assert third.text() == TEXT + "0"
    assert p.aborted == [(first.request_id, 0)]


async def test_a_decode_worker_that_refused_is_left_alone_until_something_ended(
    tmp_path: Path,
) -> None:
    """Another router's requests fill it: only it can know."""
    p, d = fake("p"), fake("d")
    d.refuse_adopts = True
    async with router(tmp_path, p, d) as r:
        d.session.report(WorkerLoad(waiting=9))
        local = await r.start().rest()  # had begun when it was refused: D queues it itself
        d.session.report(WorkerLoad(waiting=9))
        waits = r.start()
        await until(lambda: r.pool.line.locked())
        assert len(p.submitted) == 1
        d.refuse_adopts = False
        d.session.report(WorkerLoad(waiting=8))
        await waits.rest()
    assert local.text() == waits.text() == TEXT + "0"
    assert len(p.submitted) == 2


async def test_another_decode_worker_with_room_is_taken(tmp_path: Path) -> None:
    p, d1, d2 = fake("p"), small("d1", 1), fake("d2")
    p.pause_at = -1
    async with router(tmp_path, p, d1, d2) as r:
        runs = [r.start() for _ in range(6)]
        await until(lambda: len(p.submitted) == 6)
        p.resume()
        await asyncio.gather(*(run.rest() for run in runs))
    assert [run.text() for run in runs] == [TEXT + "0"] * 6
    assert (len(d1.adopted), len(d2.adopted)) == (1, 5)


async def test_the_local_path_needs_no_room_in_advance(tmp_path: Path) -> None:
    p, d = fake("p"), small("d", 1)
    async with router(tmp_path, p, d) as r:
        p.down = True
        p.session.lose()
        await until(lambda: len(r.pool.snapshot()) == 1)
        runs = [r.start() for _ in range(3)]
        await asyncio.gather(*(run.rest() for run in runs))
    assert d.worker_id == WorkerId("d")
    assert len(d.submitted) == 3
