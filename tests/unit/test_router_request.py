"""The life of a request before its first token: paths, refusals, failures."""

import asyncio
from pathlib import Path

import pytest

from contracts.errors import (
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ServingError,
    Unavailable,
)
from contracts.request import GenerationRequest
from tests.support.fake_worker import until
from tests.support.router_request import (
    EOS,
    LENGTH,
    TEXT,
    fake,
    nothing_left,
    router,
    script,
)

# Paths


async def test_remote_path(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    p.cached_tokens = 2
    async with router(tmp_path, p, d) as r:
        run = await r.start().rest()
    assert run.text() == TEXT + "0"
    assert run.tokens() == list(script(p.submitted[0][0], 0))
    assert p.submitted[0][1] is True
    assert "transfer_id" in d.adopted[0][1]
    assert d.adopted[0][0] == p.submitted[0][0]
    assert not d.submitted
    usage = run.generation.usage
    assert (usage.completion_tokens, usage.cached_tokens) == (LENGTH, 2)
    assert run.pieces[-1].finish_reason == "stop"
    assert run.pieces[-1].stop_reason is None
    assert p.aborted == d.aborted == []


async def test_local_path_when_aggregated(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    d.cached_tokens = 1
    async with router(tmp_path, p, d, aggregated=True) as r:
        run = await r.start().rest()
    assert run.text() == TEXT + "0"
    assert not p.submitted
    assert d.submitted[0][1] is False
    assert run.generation.usage.cached_tokens == 1
    assert d.aborted == []


async def test_one_token_involves_no_decode_worker(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d) as r:
        run = await r.start(max_tokens=1, n=3).rest()
    assert p.submitted[0][1] is False
    assert [run.tokens(i) for i in range(3)] == [
        [script(p.submitted[0][0], i)[0]] for i in range(3)
    ]
    assert {piece.finish_reason for piece in run.pieces} == {"length"}
    assert (d.submitted, d.adopted, p.aborted) == ([], [], [])


async def test_several_choices(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d) as r:
        run = await r.start(n=3).rest()
    assert [run.text(i) for i in range(3)] == [TEXT + str(i) for i in range(3)]
    assert run.generation.usage.completion_tokens == 3 * LENGTH
    assert sum(piece.first for piece in run.pieces) == 3


async def test_first_tokens_come_before_the_decode_worker_has_any(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    d.pause_at = 0
    async with router(tmp_path, p, d) as r:
        run = await r.start().some()
        assert len(run.tokens()) == 1
        d.resume()
        await run.rest()
    assert run.text() == TEXT + "0"


async def test_decode_workers_first_frame_may_overtake_the_prefill_workers(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    p.pause_at = 0
    async with router(tmp_path, p, d) as r:
        run = r.start()
        await until(lambda: d.running == 0 and d.adopted)
        p.resume()
        await run.rest()
    assert run.text() == TEXT + "0"


async def test_token_one_that_ends_all_choices_needs_no_acceptance(tmp_path: Path) -> None:
    p, d = fake("p", lambda *_: [EOS]), fake("d", lambda *_: [EOS])
    d.refuse_adopts = True
    p_only = fake("p", lambda *_: [EOS])
    async with router(tmp_path, p_only, d) as r:
        run = await r.start(n=2).rest()
    assert [piece.finish_reason for piece in run.pieces] == ["stop", "stop"]
    assert p.aborted == p_only.aborted == []


# Refusals


async def test_a_refused_handoff_goes_to_another_decode_worker(tmp_path: Path) -> None:
    p, d1, d2 = fake("p"), fake("d1"), fake("d2")
    d1.refuse_adopts = True
    async with router(tmp_path, p, d1, d2) as r:
        run = await r.start().rest()
        assert r.count("baton:refused_handoffs_total") == 1
    assert run.text() == TEXT + "0"
    assert len(p.submitted) == len(d1.adopted) == len(d2.adopted) == 1
    assert d1.aborted == p.aborted == []


async def test_refused_by_all_takes_the_local_path(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    d.refuse_adopts = True
    async with router(tmp_path, p, d) as r:
        run = await r.start().rest()
    assert run.text() == TEXT + "0"
    assert [(request.attempt, handoff) for request, handoff in d.submitted] == [(1, False)]
    assert p.aborted == [(run.request_id, 0)]
    assert d.aborted == []


async def test_refused_everywhere_is_overload(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    d.refuse_adopts = True
    d.fail_kind = ""
    async with router(tmp_path, p, d) as r:
        original = d.session.submit

        def full(request: GenerationRequest, *, handoff: bool) -> None:
            d.fail_kind = "Overloaded"
            original(request, handoff=handoff)

        d.session.submit = full  # type: ignore[method-assign]
        with pytest.raises(Overloaded):
            await r.start().rest()
    assert nothing_left(p, d)


# Failures before the first token


async def test_another_prefill_worker_after_a_failure(tmp_path: Path) -> None:
    p1, p2, d = fake("p1"), fake("p2"), fake("d")
    p1.fail_kind = "EngineFailure"
    async with router(tmp_path, p1, p2, d) as r:
        run = await r.start().rest()
        assert r.count("baton:retries_total") == 1
    assert run.text() == TEXT + "0"
    assert p2.submitted[0][0].attempt == 1
    assert p2.submitted[0][0].params == p1.submitted[0][0].params


async def test_local_path_when_the_only_prefill_worker_is_full(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    p.fail_kind = "Overloaded"
    async with router(tmp_path, p, d) as r:
        run = await r.start().rest()
    assert run.text() == TEXT + "0"
    assert len(d.submitted) == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [("EngineFailure", EngineFailure), ("Overloaded", Overloaded), ("Nonsense", EngineFailure)],
)
async def test_the_last_workers_error_is_the_clients(
    tmp_path: Path, kind: str, error: type[ServingError]
) -> None:
    d = fake("d")
    d.fail_kind = kind
    async with router(tmp_path, d, aggregated=True) as r:
        with pytest.raises(error):
            await r.start().rest()
    assert len(d.submitted) == 1
    assert d.aborted == []


async def test_retries_are_bounded(tmp_path: Path) -> None:
    workers = [fake(f"d{i}") for i in range(6)]
    for worker in workers:
        worker.fail_kind = "EngineFailure"
    async with router(tmp_path, *workers, aggregated=True) as r:
        with pytest.raises(EngineFailure):
            await r.start().rest()
    assert sum(len(worker.submitted) for worker in workers) == 3


async def test_the_callers_fault_is_not_tried_again(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.fail_kind = "InvalidRequest"
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        with pytest.raises(InvalidRequest):
            await r.start().rest()
    assert not d2.submitted


async def test_a_prefill_worker_lost_before_the_handoff(tmp_path: Path) -> None:
    p1, p2, d = fake("p1"), fake("p2"), fake("d")
    p1.pause_at = -1
    async with router(tmp_path, p1, p2, d) as r:
        run = r.start()
        await until(lambda: p1.paused.is_set())
        p1.session.lose()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert p2.submitted[0][0].attempt == 1


async def test_a_prefill_worker_lost_after_acceptance_is_the_decode_workers_matter(
    tmp_path: Path,
) -> None:
    p, d = fake("p"), fake("d")
    p.pause_at = 0
    d.pause_at = 0
    async with router(tmp_path, p, d) as r:
        run = r.start()
        await until(lambda: d.paused.is_set())
        p.session.lose()
        p.pause_at = None
        d.resume()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert len(d.adopted) == 1
    assert not d.submitted


async def test_no_worker_at_all(tmp_path: Path) -> None:
    async with router(tmp_path, worker_wait_s=0.01) as r:
        with pytest.raises(Unavailable):
            await r.start().rest()


async def test_waits_for_a_worker_to_connect(tmp_path: Path) -> None:
    d = fake("d")
    d.down = True
    async with router(tmp_path, d, aggregated=True, worker_wait_s=5) as r:
        run = r.start()
        await asyncio.sleep(0)
        d.down = False
        await run.rest()
    assert run.text() == TEXT + "0"
