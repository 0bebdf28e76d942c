"""Beams: the search equals the naive one, and its sequences live with too little memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.beams import Beam, BeamSearch
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.scheduler import Scheduler, SchedulerConfig
from tests.support.naive_beams import naive_beams
from tests.support.paged_oracle import PagedOracle, candidates

BLOCK = 4


def best(tokens: list[int], count: int) -> tuple[tuple[int, float], ...]:
    return candidates(tokens, count // 2).top


def tokens_of(search: BeamSearch) -> list[list[int]]:
    return [list(unrolled(beam)) for beam in search.live]


def unrolled(beam: Beam) -> list[int]:
    return [] if beam.parent is None else [*unrolled(beam.parent), beam.token_id]


@given(
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    width=st.integers(1, 5),
    most=st.integers(1, 12),
    ends=st.lists(st.integers(0, 11), max_size=3, unique=True).map(tuple),
    penalty=st.sampled_from([1.0, 0.0, 2.5, -1.0]),
)
def test_the_search_is_the_naive_one(
    prompt: list[int], width: int, most: int, ends: tuple[int, ...], penalty: float
) -> None:
    params = SamplingParams(
        max_tokens=most,
        n=width,
        beam=True,
        eos_token_ids=ends,
        length_penalty=penalty,
        logprobs=3,
    )
    search = BeamSearch(params, len(prompt), most)
    steps = 0
    while not search.over:
        live = tokens_of(search)
        search.advance([candidates([*prompt, *tokens], width) for tokens in live])
        steps += 1
    results = search.results()
    expected = naive_beams(best, prompt, width, most, ends, penalty)
    assert [(list(r.token_ids), r.finish.value) for r in results] == expected
    for result in results:
        assert len(result.logprobs) == len(result.token_ids)
        for index, (token, entry) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
            found = dict(best([*prompt, *result.token_ids[:index]], 2 * width))
            assert entry.logprob == found[token]
            assert entry.top == tuple(found.items())[:3]


def test_a_search_ends_once_nothing_can_change() -> None:
    """Closed beams that no live one can catch up with: thousands of steps are saved."""
    params = SamplingParams(max_tokens=5000, n=2, beam=True, eos_token_ids=(0,), length_penalty=0)
    search = BeamSearch(params, 3, 5000)
    search.advance([TokenLogprob(-0.1, ((0, -0.1), (1, -2.0), (2, -3.0), (3, -9.0)))])
    assert not search.over
    search.advance([TokenLogprob(-0.1, ((0, -0.1), (1, -5.0), (2, -6.0), (3, -7.0)))] * 2)
    assert search.over
    assert [list(r.token_ids) for r in search.results()] == [[0], [1, 0]]


@pytest.mark.parametrize("penalty", [1e308, -1e308, 400.0, -400.0])
def test_absurd_penalties_are_survived(penalty: float) -> None:
    params = SamplingParams(max_tokens=3, n=2, beam=True, length_penalty=penalty)
    search = BeamSearch(params, 5, 3)
    while not search.over:
        search.advance([candidates(tokens, 2) for tokens in tokens_of(search)])
    assert len(search.results()) == 2


def test_long_beams_are_dropped_without_recursion() -> None:
    params = SamplingParams(max_tokens=200_000, n=1, beam=True, eos_token_ids=(9,))
    search = BeamSearch(params, 1, 200_000)
    entry = TokenLogprob(0.0, ((1, 0.0), (2, -1.0)))
    while not search.over:
        search.advance([entry])
    assert len(search.results()[0].token_ids) == 200_000
    del search


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("running", [1, 2, 16])
@pytest.mark.parametrize("blocks", [10, 12, 40])
def test_beams_advance_with_too_little_memory(blocks: int, running: int, caching: bool) -> None:
    """Three searches of four beams, where one sequence alone may fill the pool."""
    pool = BlockPool(blocks, GenerationWords(blocks, incarnation=1))
    config = SchedulerConfig(
        block_size=BLOCK, max_model_len=40, max_running=running, prefix_caching=caching
    )
    scheduler = Scheduler(config, pool)
    oracle = PagedOracle(blocks, BLOCK)
    expected = {}
    for number in range(3):
        prompt = tuple(range(number, number + 6))
        params = SamplingParams(max_tokens=30, n=4, beam=True, eos_token_ids=(7,))
        request = GenerationRequest(RequestId(str(number)), prompt, params)
        scheduler.add(request, export=False)
        expected[request.request_id] = naive_beams(best, prompt, 4, 30, (7,))
    found: dict[RequestId, list[tuple[list[int], str]]] = {name: [] for name in expected}
    for _ in range(3000):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        assert plan.chunks, "nothing goes on"
        scheduler.commit(plan, oracle.compute(plan))
        pool.check()
        for event in scheduler.take_events():
            if isinstance(event, TokensOut):
                assert event.choice == len(found[event.request_id])
                assert event.finish is not None
                found[event.request_id].append((list(event.token_ids), event.finish.value))
    assert found == expected
    assert (scheduler.preemptions > 0) == (blocks < 40)
    assert pool.ledger().idle


def test_an_abort_reaches_beams_without_blocks() -> None:
    """A beam that waits for the others without blocks is in no list."""
    pool = BlockPool(10, GenerationWords(10, incarnation=1))
    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK, max_model_len=40), pool)
    oracle = PagedOracle(10, BLOCK)
    params = SamplingParams(max_tokens=30, n=4, beam=True)
    request = GenerationRequest(RequestId("a"), tuple(range(6)), params)
    scheduler.add(request, export=False)
    while not scheduler.preemptions:
        plan = scheduler.schedule()
        scheduler.commit(plan, oracle.compute(plan))
    assert scheduler.abort(request.request_id, 0)
    assert not scheduler.has_work
    assert not scheduler.abort(request.request_id, 0)
    assert pool.ledger().idle


def test_a_prefill_tells_its_candidates_or_ends_it() -> None:
    pool = BlockPool(10, GenerationWords(10, incarnation=1))
    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK, max_model_len=40), pool)
    oracle = PagedOracle(10, BLOCK)
    for name, most in (("long", 9), ("short", 1)):
        params = SamplingParams(max_tokens=most, n=3, beam=True)
        request = GenerationRequest(RequestId(name), (1, 2, 3), params)
        scheduler.add(request, export=True)
        plan = scheduler.schedule()
        scheduler.commit(plan, oracle.compute(plan))
        told = [e for e in scheduler.take_events() if isinstance(e, TokensOut)]
        top = candidates((1, 2, 3), 3).top
        if name == "long":
            assert [(t.choice, t.token_ids, t.finish) for t in told] == [(0, (top[0][0],), None)]
            assert told[0].logprobs[0].top == top
        else:
            assert [t.token_ids for t in told] == [(token,) for token, _ in top[:3]]
            assert {t.finish for t in told} == {FinishReason.LENGTH}
