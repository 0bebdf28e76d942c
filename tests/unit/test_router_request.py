import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import (
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ServingError,
    Unavailable,
)
from contracts.events import FinishReason, RequestFailed, TokensOut
from contracts.ids import WorkerId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from router.choice import EndRules, Piece, TokenFault
from router.config import RouterConfig
from router.detokenizer import Vocabulary
from router.job import Job
from router.metrics import RouterMetrics
from router.outbox import Outbox, SlowReader
from router.request import Generation
from router.workers import WorkerPool
from tests.support.fake_worker import FakeCluster, FakeWorker, Script, byte_level_tokenizer, until

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.token_to_id("<|im_end|>") or 0
TEXT = "one two three four five six seven eight nine ten"


def script(request: GenerationRequest, choice: int) -> Sequence[int]:
    return [*TOKENIZER.encode(TEXT + str(choice)).ids, EOS]


LENGTH = len(TOKENIZER.encode(TEXT + "0").ids) + 1


def fake(name: str, tokens: Script = script) -> FakeWorker:
    role = Role.PREFILL if name[0] == "p" else Role.DECODE
    return FakeWorker(WorkerId(name), role, tokens)


@dataclass
class Router:
    pool: WorkerPool
    config: RouterConfig
    metrics: RouterMetrics

    def start(
        self,
        *,
        stop: Sequence[str] = (),
        limit_bytes: int | None = None,
        **params: Any,
    ) -> "Run":
        sampling = SamplingParams(**{"max_tokens": 100, "eos_token_ids": (EOS,), **params})
        job = Job(
            new_request_id(),
            tuple(TOKENIZER.encode("the prompt").ids),
            sampling,
            EndRules(tuple(stop), EOS),
        )
        generation = Generation(
            job,
            pool=self.pool,
            vocabulary=Vocabulary(TOKENIZER),
            outbox=Outbox(limit_bytes),
            config=self.config,
            metrics=self.metrics,
        )
        generation.start()
        return Run(generation)

    def count(self, name: str) -> float:
        for line in self.metrics.render(()).decode().splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


class Run:
    """A generation and what has come out of it."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pieces: list[Piece] = []

    @property
    def request_id(self) -> str:
        return self.generation.job.request_id

    async def rest(self) -> "Run":
        """Read to the end; raises what the request ended with."""
        async with asyncio.timeout(10):
            while pieces := await self.generation.outbox.take():
                self.pieces.extend(pieces)
        return self

    async def some(self) -> "Run":
        async with asyncio.timeout(10):
            self.pieces.extend(await self.generation.outbox.take())
        return self

    def text(self, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces if piece.choice == choice)

    def tokens(self, choice: int = 0) -> list[int]:
        return [t for piece in self.pieces if piece.choice == choice for t in piece.token_ids]


@asynccontextmanager
async def router(tmp_path: Path, *workers: FakeWorker, **settings: Any) -> AsyncIterator[Router]:
    config = RouterConfig(
        model_path=str(tmp_path),
        served_model_name="m",
        cluster_key="k",
        **{"worker_wait_s": 2.0, **settings},
    )
    cluster = FakeCluster(*workers)
    pool = WorkerPool(cluster, cluster.open_session, router_id="r", cluster_key="k")
    pool.start()
    await until(lambda: len(pool.snapshot()) == sum(not w.down for w in workers))
    try:
        yield Router(pool, config, RouterMetrics("m"))
    finally:
        await pool.close()


def nothing_left(*workers: FakeWorker) -> bool:
    return all(worker.running == 0 for worker in workers)


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
