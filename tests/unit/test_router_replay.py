"""The life of a request after its first token: replay and ends."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import (
    EngineFailure,
    ServingError,
    Unavailable,
)
from contracts.events import FinishReason, RequestFailed, TokensOut
from contracts.request import GenerationRequest
from router.choice import TokenFault
from router.outbox import SlowReader
from tests.support.fake_worker import until
from tests.support.router_request import (
    EOS,
    LENGTH,
    TEXT,
    TOKENIZER,
    fake,
    nothing_left,
    router,
    script,
)

# Replay


@pytest.mark.parametrize("at", [1, 2, 5, LENGTH - 1])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_lost_decode_worker_loses_and_repeats_no_token(
    tmp_path: Path, at: int, n: int
) -> None:
    p, d1, d2 = fake("p"), fake("d1"), fake("d2")
    p.cached_tokens = 3
    d1.pause_at = at
    async with router(tmp_path, p, d1, d2) as r:
        run = r.start(n=n, seed=7)
        await until(lambda: d1.paused.is_set())
        d1.session.lose()
        await run.rest()
        assert r.count("baton:replays_total") == 1
    for choice in range(n):
        assert run.tokens(choice) == list(script(p.submitted[0][0], choice))
        assert run.text(choice) == TEXT + str(choice)
    request, handoff = d2.submitted[0]
    assert (request.attempt, handoff, request.params.seed) == (1, False, 7)
    assert [len(ids) for ids in request.output_ids] == [at] * n
    usage = run.generation.usage
    assert (usage.completion_tokens, usage.cached_tokens) == (n * LENGTH, 3)
    assert d2.aborted == []


async def test_replay_on_the_same_worker_when_it_is_back(tmp_path: Path) -> None:
    d = fake("d")
    d.pause_at = 4
    async with router(tmp_path, d, aggregated=True) as r:
        run = r.start()
        await until(lambda: d.paused.is_set())
        d.pause_at = None
        d.session.lose()
        await run.rest()
    assert run.text() == TEXT + "0"
    assert len(d.sessions) == 2


async def test_choices_that_are_over_are_left_out_of_a_replay(tmp_path: Path) -> None:
    def uneven(request: GenerationRequest, choice: int) -> Sequence[int]:
        return [EOS] if choice == 1 else script(request, choice)

    d1, d2 = fake("d1", uneven), fake("d2", uneven)
    d1.pause_at = 3
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start(n=3)
        await until(lambda: d1.paused.is_set())
        d1.session.lose()
        await run.rest()
    assert d2.submitted[0][0].finished == (1,)
    assert run.tokens(1) == [EOS]
    assert run.text(2) == TEXT + "2"
    assert d2.aborted == []


async def test_a_failed_worker_in_mid_stream_is_replaced(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.fail_kind_at = 3
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = await r.start().rest()
    assert run.text() == TEXT + "0"


async def test_a_worker_that_drains_hands_its_streams_over(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 3
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start()
        await until(lambda: d1.paused.is_set())
        request = d1.submitted[0][0]
        d1.session.send(TokensOut(request.request_id, 0, 0, 3, (), finish=FinishReason.ABORT))
        await run.rest()
    assert run.text() == TEXT + "0"
    assert run.pieces[-1].finish_reason == "stop"


async def test_replays_are_bounded(tmp_path: Path) -> None:
    workers = [fake(f"d{i}") for i in range(6)]
    for i, worker in enumerate(workers):
        worker.fail_kind_at = i + 1
    async with router(tmp_path, *workers, aggregated=True, max_replays=3) as r:
        run = r.start()
        with pytest.raises(EngineFailure):
            await run.rest()
    assert sum(len(worker.submitted) for worker in workers) == 4
    assert run.tokens() == list(script(workers[0].submitted[0][0], 0))[: len(run.tokens())]
    assert len(run.tokens()) == 4


async def test_replay_never_changes_the_model(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d2.semantic_hash = "another"
    d1.fail_kind_at = 3
    async with router(tmp_path, d1, d2, aggregated=True, worker_wait_s=0.01) as r:
        with pytest.raises(ServingError):
            await r.start().rest()
    assert not d2.submitted


# Ends


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stop_string_aborts_and_drops_the_rest(tmp_path: Path, n: int) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d) as r:
        run = await r.start(stop=["ree fo"], n=n).rest()
        await until(lambda: nothing_left(p, d))
    for choice in range(n):
        assert run.text(choice) == "one two th"
        decoded = TOKENIZER.decode(run.tokens(choice))
        assert decoded.startswith("one two three fo")
        assert TOKENIZER.decode(run.tokens(choice)[:-1]) in "one two three f"
    assert run.pieces[-1].stop_reason == "ree fo"
    assert run.generation.usage.completion_tokens == sum(len(run.tokens(c)) for c in range(n))
    assert d.aborted == [(run.request_id, 0)]
    assert p.aborted == []


@pytest.mark.parametrize("window", ["queued", "prefilled", "decoding"])
async def test_closing_aborts_exactly_who_is_still_at_it(tmp_path: Path, window: str) -> None:
    p, d = fake("p"), fake("d")
    p.pause_at = -1 if window == "queued" else 0
    d.pause_at = 2 if window == "decoding" else 0
    async with router(tmp_path, p, d) as r:
        run = r.start()
        if window == "queued":
            await until(lambda: p.paused.is_set())
            expected: tuple[list[Any], list[Any]] = ([(run.request_id, 0)], [])
        else:
            await until(lambda: d.paused.is_set())
            prefilling = [(run.request_id, 0)] if window == "prefilled" else []
            expected = (prefilling, [(run.request_id, 0)])
        run.generation.stop()
        assert (p.aborted, d.aborted) == expected
        await run.generation.aclose()
        assert (p.aborted, d.aborted) == expected
        await run.generation.aclose()  # again: nothing happens
        assert (p.aborted, d.aborted) == expected
        await until(lambda: nothing_left(d))


async def test_closing_after_the_end_aborts_nobody(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d) as r:
        run = await r.start().rest()
        await run.generation.aclose()
    assert p.aborted == d.aborted == []


async def test_a_slow_reader_loses_its_own_request_only(tmp_path: Path) -> None:
    d = fake("d")
    async with router(tmp_path, d, aggregated=True) as r:
        slow, other = r.start(limit_bytes=2000), r.start(limit_bytes=None)
        await asyncio.wait_for(slow.generation.outbox.overflowed(), 5)
        await other.rest()
        with pytest.raises(SlowReader):
            await slow.rest()
    assert other.text() == TEXT + "0"
    assert (TEXT + "0").startswith(slow.text())
    assert d.aborted == [(slow.request_id, 0)]


async def test_contradicting_tokens_are_a_fault(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d", lambda request, choice: [77, *script(request, choice)])
    async with router(tmp_path, p, d) as r:
        run = r.start()
        with pytest.raises(TokenFault):
            await run.rest()
        assert r.count("baton:token_faults_total") == 1
        await until(lambda: nothing_left(p, d))
    assert d.aborted == [(run.request_id, 0)]


async def test_events_of_an_earlier_attempt_are_dropped(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.fail_kind_at = 2
    d2.pause_at = 4
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start()
        await until(lambda: d2.paused.is_set())
        first = d1.submitted[0][0]
        d1.session.send(TokensOut(first.request_id, 0, 0, 4, (1,)))
        d1.session.send(RequestFailed(first.request_id, 0, "EngineFailure", "late"))
        d1.session.send(TokensOut(first.request_id, 1, 0, 4, (1,)))  # right attempt, wrong worker
        d2.resume()
        await run.rest()
    assert run.text() == TEXT + "0"


async def test_time_limit(tmp_path: Path) -> None:
    d = fake("d")
    d.pause_at = 0
    async with router(tmp_path, d, aggregated=True, request_timeout_s=0.05) as r:
        run = r.start()
        with pytest.raises(Unavailable, match="longer than"):
            await run.rest()
        assert d.aborted == [(run.request_id, 0)]
    deadline_s = d.submitted[0][0].deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s <= 0.05


async def test_a_session_lost_between_choice_and_submit(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        d1.session.lost = True  # the pool has not heard of it yet
        run = await r.start().rest()
    assert run.text() == TEXT + "0"
    assert not d1.submitted
