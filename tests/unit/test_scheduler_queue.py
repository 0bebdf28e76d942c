"""Who goes first when memory or places are short: the queue, the running, arriving handoffs."""

import pytest

from contracts.errors import InvalidRequest, OutOfBlocks
from contracts.events import TokensOut
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.scheduler import Scheduler, SchedulerConfig
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
