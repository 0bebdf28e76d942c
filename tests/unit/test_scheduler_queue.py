"""Who goes first when memory or places are short: the queue, the running, arriving handoffs."""

from dataclasses import replace

import pytest

from contracts.errors import InvalidRequest, OutOfBlocks
from contracts.events import PromptScores, RequestFailed, TokensOut
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.plan import Sampled, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import extend_keys
from tests.support.paged_oracle import PagedOracle, next_token

BLOCK, BLOCKS = 4, 16


def scheduler_of(max_running: int = 8) -> Scheduler:
    pool = BlockPool(BLOCKS, GenerationWords(BLOCKS, incarnation=1))
    config = SchedulerConfig(block_size=BLOCK, max_model_len=60, max_running=max_running)
    return Scheduler(config, pool)


def request_of(name: str, length: int, new: int = 40) -> GenerationRequest:
    prompt = tuple(sum(name.encode()) + i for i in range(length))
    return GenerationRequest(RequestId(name), prompt, SamplingParams(max_tokens=new))


def hand_over(scheduler: Scheduler, request: GenerationRequest) -> None:
    """A handoff whose blocks have arrived."""
    reservation = scheduler.reserve(request)
    token = next_token(request.prompt_ids)
    scheduler.adopt(reservation, [TokensOut(request.request_id, 0, 0, 0, (token,))])


def plan(scheduler: Scheduler) -> None:
    """A step of which nothing is computed: only who runs matters."""
    scheduler.schedule()
    scheduler.take_events()


def test_blocked_ends_with_the_blocked_request() -> None:
    scheduler = scheduler_of()
    held = scheduler.pool.allocate(BLOCKS - 1)
    scheduler.add(request_of("big", 30), export=True)
    plan(scheduler)
    assert scheduler.blocked
    scheduler.abort(RequestId("big"), 0)
    assert not scheduler.blocked, "P would revoke transfers for nobody"
    scheduler.pool.release(held)


def test_handoffs_respect_max_running() -> None:
    scheduler = scheduler_of(max_running=2)
    first = scheduler.reserve(request_of("a", 4))
    hand_over(scheduler, request_of("b", 4))
    with pytest.raises(OutOfBlocks):
        scheduler.reserve(request_of("c", 4))
    scheduler.unreserve(first)
    hand_over(scheduler, request_of("c", 4))
    assert scheduler.load().running == 2


@pytest.mark.parametrize("short_of", ["blocks", "places"])
def test_the_head_of_the_queue_does_not_starve_behind_handoffs(short_of: str) -> None:
    """Small handoffs come and go without end; a waiting request gets its turn (M7)."""
    scheduler = scheduler_of(max_running=2 if short_of == "places" else 8)
    oracle = PagedOracle(BLOCKS, BLOCK)
    waiting = request_of("waiting", 50 if short_of == "blocks" else 4)
    handed: list[RequestId] = []
    for count in range(300):
        while len(handed) < 2:
            name = f"h{count}-{len(handed)}"
            request = request_of(name, 3, new=6)
            try:
                reservation = scheduler.reserve(request)
            except OutOfBlocks:
                break
            for position, token in enumerate(request.prompt_ids):
                oracle.slots[reservation.blocks[0]][position] = (position, token)
            token = next_token(request.prompt_ids)
            scheduler.adopt(reservation, [TokensOut(request.request_id, 0, 0, 0, (token,))])
            handed.append(request.request_id)
        if count == 0:
            scheduler.add(waiting, export=False)
        step = scheduler.schedule()
        scheduler.commit(step, oracle.compute(step))
        for event in scheduler.take_events():
            if event.request_id == waiting.request_id:
                return
            if isinstance(event, TokensOut) and event.finish is not None:
                handed.remove(event.request_id)
    pytest.fail("the waiting request never started")


def test_a_replay_longer_than_the_context_is_refused() -> None:
    """Its emitted tokens count: queued, it would block the queue for ever."""
    scheduler = scheduler_of()
    request = request_of("r", 20, new=100)
    replay = GenerationRequest(
        request.request_id, request.prompt_ids, request.params, output_ids=(tuple(range(50)),)
    )
    with pytest.raises(InvalidRequest, match="70 tokens"):
        scheduler.add(replay, export=False)
    assert not scheduler.has_work


def finished(scheduler: Scheduler, oracle: PagedOracle) -> list[str]:
    """Run to the end: the requests in the order in which they finish."""
    order: list[str] = []
    while scheduler.has_work:
        step = scheduler.schedule()
        scheduler.commit(step, oracle.compute(step))
        order += [
            event.request_id
            for event in scheduler.take_events()
            if isinstance(event, TokensOut) and event.finish is not None
        ]
    return order


def test_the_queue_is_by_priority_then_arrival() -> None:
    scheduler = scheduler_of(max_running=1)
    for name, priority in (("a", 0), ("b", 2), ("c", -3), ("d", 0), ("e", -(2**63))):
        request = replace(request_of(name, 3, new=2), priority=priority)
        scheduler.add(request, export=False)
    assert finished(scheduler, PagedOracle(BLOCKS, BLOCK)) == ["e", "c", "a", "d", "b"]


def test_the_victim_of_a_preemption_is_the_least_urgent() -> None:
    """The one that came first gives way, for its number is larger."""
    scheduler = scheduler_of()
    oracle = PagedOracle(BLOCKS, BLOCK)
    for name, priority in (("first", 1), ("second", 0), ("third", 0)):
        request = replace(request_of(name, 20, new=20), priority=priority)
        scheduler.add(request, export=False)
    assert finished(scheduler, oracle) == ["second", "third", "first"]
    assert scheduler.preemptions > 0


def test_an_urgent_handoff_does_not_wait_for_a_patient_head() -> None:
    scheduler = scheduler_of()
    held = scheduler.pool.allocate(BLOCKS - 4)
    scheduler.add(request_of("big", 30), export=False)
    for _ in range(40):
        plan(scheduler)
    with pytest.raises(OutOfBlocks):
        scheduler.reserve(request_of("equal", 3))
    urgent = scheduler.reserve(replace(request_of("urgent", 3), priority=-1))
    scheduler.unreserve(urgent)
    scheduler.pool.release(held)


@pytest.mark.parametrize("length", [1, 4, 7, 8])
def test_a_redrawn_prompt_is_cached_once_it_is_computed(length: int) -> None:
    """Its last token is written here, so nobody may share that block before (F3)."""
    scheduler = scheduler_of()
    oracle = PagedOracle(BLOCKS, BLOCK)
    request = replace(request_of("r", length, new=3), redraw=True)
    keys: list[bytes] = []
    extend_keys(keys, list(request.prompt_ids), BLOCK, "", length // BLOCK)
    for turn in range(2):
        reservation = scheduler.reserve(request)
        assert reservation.num_hits == ((length - 1) // BLOCK if turn else 0)
        for position, token in enumerate(request.prompt_ids[:-1]):
            block = reservation.blocks[position // BLOCK]
            oracle.slots[block][position % BLOCK] = (position, token)
        scheduler.adopt(reservation)
        known = len(scheduler.pool.lookup(keys))
        assert known == (length // BLOCK if turn else (length - 1) // BLOCK)
        assert finished(scheduler, oracle) == ["r"]
        assert len(scheduler.pool.lookup(keys)) == length // BLOCK
    assert scheduler.computed_prompt_tokens == 2
    assert scheduler.pool.ledger().idle


def test_scored_prompts_share_a_bound_on_rows() -> None:
    """Each scored token needs a row of logits: at most 256 in a step, whoever asks."""
    blocks = 300
    pool = BlockPool(blocks, GenerationWords(blocks, incarnation=1))
    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK, max_model_len=1000), pool)
    oracle = PagedOracle(blocks, BLOCK)
    names = ["a", "b", "c"]
    for name in names:
        request = request_of(name, 300, new=2)
        scored = replace(request.params, prompt_logprobs=0)
        scheduler.add(replace(request, params=scored), export=False)
    scheduler.add(request_of("plain", 50, new=2), export=False)
    told = dict.fromkeys(names, 0)
    while scheduler.has_work:
        step = scheduler.schedule()
        assert sum(len(chunk.scored_ids) for chunk in step.chunks) <= 256
        scheduler.commit(step, oracle.compute(step))
        for event in scheduler.take_events():
            if isinstance(event, PromptScores):
                assert event.position == told[event.request_id] + 1
                told[event.request_id] += len(event.entries)
    assert set(told.values()) == {299}


def test_a_failed_draw_ends_its_request_only() -> None:
    scheduler = scheduler_of()
    oracle = PagedOracle(BLOCKS, BLOCK)
    several = request_of("several", 5, new=9)
    several = replace(several, params=replace(several.params, n=3))
    scheduler.add(several, export=False)
    scheduler.add(request_of("other", 5, new=9), export=False)
    for _ in range(3):
        step = scheduler.schedule()
        scheduler.commit(step, oracle.compute(step))
    scheduler.take_events()
    step = scheduler.schedule()
    drawn = list(oracle.compute(step).sampled)
    drawn[1] = Sampled(0, error="no")
    scheduler.commit(step, StepResult(tuple(drawn)))
    events = scheduler.take_events()
    failures = [event for event in events if isinstance(event, RequestFailed)]
    assert failures == [RequestFailed(several.request_id, 0, "EngineFailure", "no")]
    assert [e.request_id for e in events[events.index(failures[0]) + 1 :]] == ["other"]
    assert finished(scheduler, oracle) == ["other"]
    assert scheduler.pool.ledger().idle
