"""Running decodes, planned as columns and committed all at once."""

from dataclasses import replace
from typing import Any

import pytest

from contracts.events import FinishReason, RequestFailed, TokenLogprob, TokensOut
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.plan import Sampled, StepPlan, StepResult
from engine.scheduler import EngineEvent, Scheduler, SchedulerConfig
from engine.sequence import extend_keys
from tests.support.paged_oracle import PagedOracle, continuation

BLOCK, BLOCKS = 4, 64
END = 7


def scheduler_of(blocks: int = BLOCKS, max_step_tokens: int = 2048) -> Scheduler:
    pool = BlockPool(blocks, GenerationWords(blocks, incarnation=1))
    config = SchedulerConfig(BLOCK, max_model_len=200, max_step_tokens=max_step_tokens)
    return Scheduler(config, pool)


def request_of(name: str, length: int = 5, new: int = 20, **params: Any) -> GenerationRequest:
    prompt = tuple(sum(name.encode()) + i for i in range(length))
    made = SamplingParams(max_tokens=new, temperature=0.0, eos_token_ids=(END,), **params)
    return GenerationRequest(RequestId(name), prompt, made)


def decoding(*requests: GenerationRequest) -> Scheduler:
    """A scheduler that has drawn the first token, 1, of each choice."""
    scheduler = scheduler_of()
    for request in requests:
        scheduler.add(request, export=False)
    plan = scheduler.schedule()
    draws = [Sampled(1) for chunk in plan.chunks for _ in chunk.slots]
    scheduler.commit(plan, StepResult(draws))
    scheduler.take_events()
    return scheduler


def settled(scheduler: Scheduler) -> Scheduler:
    """One more step, after which all choices are streams: each has drawn for itself."""
    plan = scheduler.schedule()
    scheduler.commit(plan, StepResult([Sampled(1) for c in plan.chunks for _ in c.slots]))
    scheduler.take_events()
    return scheduler


def content(plan: StepPlan) -> list[list[object]]:
    decodes = plan.decodes
    columns = (decodes.starts, decodes.token_ids, decodes.block_tables, decodes.outputs)
    return [[list(column) for column in columns], list(decodes.chunks())]


def test_a_step_has_streams_in_columns_and_the_rest_as_chunks() -> None:
    penalised = request_of("b", length=3, presence_penalty=0.5)
    scheduler = decoding(request_of("a", length=5), penalised)
    scheduler.add(request_of("new", length=9), export=False)
    plan = scheduler.schedule()
    assert [stream.num_prompt for stream in plan.decodes.streams] == [5, 3]
    assert len(plan.others) == 1
    first, second, prompt = plan.chunks
    assert (first.start, first.token_ids, len(first.block_table)) == (5, (1,), 2)
    assert (second.start, second.token_ids, len(second.block_table)) == (3, (1,), 1)
    assert prompt is plan.others[0]
    assert plan.num_tokens == 11
    assert list(plan.decodes.slots()) == [first.slots[0], second.slots[0]]
    assert (first.slots[0].position, first.slots[0].prompt_ids) == (1, ())
    assert (second.slots[0].prompt_ids, second.slots[0].output_ids) == (penalised.prompt_ids, (1,))


def test_a_plan_stays_as_it_is_while_its_sequences_go_on() -> None:
    scheduler = decoding(request_of("a"), request_of("b", presence_penalty=0.5))
    plans, seen = [], []
    for _ in range(3 * BLOCK):
        plan = scheduler.schedule()
        plans.append(plan)
        seen.append(content(plan))
        scheduler.commit(plan, StepResult(tokens=[2] * len(plan.decodes)))
    assert [content(plan) for plan in plans] == seen


def test_a_block_table_is_the_same_object_until_it_grows() -> None:
    scheduler = decoding(request_of("a", length=BLOCK))
    tables = []
    for _ in range(2 * BLOCK):
        plan = scheduler.schedule()
        tables.append(plan.decodes.block_tables[0])
        scheduler.commit(plan, StepResult(tokens=[2]))
    assert len({id(table) for table in tables}) == 2
    assert [len(table) for table in tables] == [2] * BLOCK + [3] * BLOCK
    assert tables[-1][:2] == tables[0]


def test_what_a_stream_has_computed_is_found_by_the_next_request() -> None:
    """Its full blocks, outputs included, each as soon as it is full."""
    scheduler = decoding(request_of("a", length=5, new=12))
    prompt = request_of("a", length=5).prompt_ids
    keys: list[bytes] = []
    extend_keys(keys, [*prompt, *[1] * 11], BLOCK, "", 4)
    for computed in range(6, 17):
        scheduler.commit(scheduler.schedule(), StepResult(tokens=[1]))
        assert len(scheduler.pool.lookup(keys)) == computed // BLOCK
    assert not scheduler.has_work


def all_events(*, as_tokens: bool) -> list[list[EngineEvent]]:
    scheduler, oracle = scheduler_of(blocks=12), PagedOracle(12, BLOCK, as_tokens=as_tokens)
    for name, length, new in (("a", 3, 9), ("b", 9, 14), ("c", 6, 11), ("d", 4, 13)):
        scheduler.add(request_of(name, length, new), export=False)
    told = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.commit(plan, oracle.compute(plan))
        scheduler.pool.check()
        told.append(scheduler.take_events())
    assert scheduler.preemptions, "memory is to be short"
    assert scheduler.pool.ledger().idle
    return told


def test_tokens_alone_say_what_draws_say() -> None:
    told = all_events(as_tokens=True)
    assert told == all_events(as_tokens=False)
    tokens = [e for step in told for e in step if isinstance(e, TokensOut) and e.request_id == "b"]
    assert [e.token_ids[0] for e in tokens] == continuation(request_of("b", 9).prompt_ids, 14)


@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_stream_ends_with_its_end_token_or_its_length(as_tokens: bool) -> None:
    scheduler = decoding(request_of("a"), request_of("b", new=2), request_of("c"))
    plan = scheduler.schedule()
    tokens = [END, 3, 4]
    if as_tokens:
        scheduler.commit(plan, StepResult(tokens=tokens))
    else:
        scheduler.commit(plan, StepResult([Sampled(token) for token in tokens]))
    assert scheduler.take_events() == [
        TokensOut(RequestId("a"), 0, 0, 1, (END,), (), FinishReason.STOP),
        TokensOut(RequestId("b"), 0, 0, 1, (3,), (), FinishReason.LENGTH),
        TokensOut(RequestId("c"), 0, 0, 1, (4,)),
    ]
    assert scheduler.load().running == 1
    scheduler.abort(RequestId("c"), 0)
    assert scheduler.pool.ledger().idle


def test_log_probabilities_of_a_stream_are_told() -> None:
    scheduler = decoding(request_of("a", logprobs=1), request_of("b"))
    found = TokenLogprob(-0.5, ((3, -0.5),))
    scheduler.commit(scheduler.schedule(), StepResult([Sampled(3, found), Sampled(4)]))
    assert scheduler.take_events() == [
        TokensOut(RequestId("a"), 0, 0, 1, (3,), (found,)),
        TokensOut(RequestId("b"), 0, 0, 1, (4,)),
    ]


def test_a_grammar_that_is_closed_ends_its_stream() -> None:
    scheduler = decoding(request_of("a"), request_of("b"))
    scheduler.commit(scheduler.schedule(), StepResult([Sampled(3, ended=True), Sampled(4)]))
    assert set(scheduler.take_events()) == {
        TokensOut(RequestId("a"), 0, 0, 1, (3,), (), FinishReason.STOP),
        TokensOut(RequestId("b"), 0, 0, 1, (4,)),
    }
    assert scheduler.load().running == 1


def test_a_failed_draw_ends_all_streams_of_its_request() -> None:
    several = request_of("several", n=3)
    scheduler = settled(decoding(several, request_of("other")))
    plan = scheduler.schedule()
    assert len(plan.decodes) == 4
    draws = [Sampled(5)] * 4
    draws[1] = Sampled(0, error="no")
    scheduler.commit(plan, StepResult(draws))
    failure, out = scheduler.take_events()
    assert failure == RequestFailed(several.request_id, 0, "EngineFailure", "no")
    assert out == TokensOut(RequestId("other"), 0, 0, 2, (5,))
    scheduler.pool.check()
    assert scheduler.load().running == 1


def test_a_budget_below_the_number_of_streams_serves_the_first() -> None:
    scheduler = scheduler_of(max_step_tokens=2)
    oracle = PagedOracle(BLOCKS, BLOCK)
    for name in "abcd":
        scheduler.add(request_of(name, length=1, new=3), export=False)
    done: list[str] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert 0 < plan.num_tokens <= 2
        scheduler.commit(plan, oracle.compute(plan))
        done += [
            event.request_id
            for event in scheduler.take_events()
            if isinstance(event, TokensOut) and event.finish is not None
        ]
    assert done == ["a", "b", "c", "d"]
    assert scheduler.pool.ledger().idle


def test_a_stream_without_a_block_gives_way_to_those_before_it() -> None:
    """Two cross the border of a block in the same step, and one block is left."""
    scheduler = scheduler_of(blocks=9)
    for name in "ab":
        scheduler.add(request_of(name, length=15, new=40), export=False)
    oracle = PagedOracle(9, BLOCK)
    for _ in range(3):
        plan = scheduler.schedule()
        scheduler.commit(plan, oracle.compute(plan))
    assert scheduler.preemptions == 1
    (stream,) = plan.decodes.streams
    assert stream.num_prompt == 15
    assert scheduler.load().waiting == 1
    assert scheduler.load().waiting_tokens > 15


@pytest.mark.parametrize(
    ("changed", "bare"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"logprobs": 0}, False),
        ({"logit_bias": ((1, 2.0),)}, False),
        ({"allowed_token_ids": (1, 2)}, False),
        ({"min_tokens": 3}, False),
        ({"bad_words": ((1,),)}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"seed": 9}, True),
        ({"top_p": 0.5}, True),
    ],
)
def test_a_stream_is_bare_if_its_draw_is_an_arg_max(changed: dict[str, Any], bare: bool) -> None:
    request = request_of("a")
    request = replace(request, params=replace(request.params, **changed))
    (stream,) = decoding(request).schedule().decodes.streams
    assert stream.bare == bare
    assert stream.params is request.params
